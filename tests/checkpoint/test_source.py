"""What opens a model: workdirs and Hugging Face folders, through one door."""

import contextlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import lazy_array, source, store
from dsv3_jax.data import tokenizer as tokenizers
from experiments import base
from tests.checkpoint.hf import exchanged

BASE = base.get_config().to_dict()
STEPS = (3, 6)


@pytest.fixture(scope='module')
def weights():
  """A configuration with an average, its parameters and router biases."""
  cfg = exchanged.make('plain', optim__ema_decay=0.9)
  return cfg, *exchanged.random_weights(cfg)


@pytest.fixture(scope='module')
def workdir(weights, tmp_path_factory):
  """Two steps; parameters are multiples of the step, their average is half."""
  cfg, params, router_biases = weights
  folder = tmp_path_factory.mktemp('source') / 'run'
  checkpoints = store.Store(folder / 'checkpoints', keep=2)
  scaled = lambda x: jax.tree.map(lambda w: np.asarray(x * w), params)
  with contextlib.closing(checkpoints):
    for step in STEPS:
      train = {'params': scaled(step), 'router': router_biases}
      checkpoints.save(step, {'train': train, 'ema': scaled(step / 2)}, {})
  (folder / 'config.json').write_text(config.to_json(cfg), encoding='utf-8')
  return folder


@pytest.fixture(scope='module')
def hf_folder(weights, tmp_path_factory):
  return exchanged.write(*weights, tmp_path_factory.mktemp('source') / 'hf')


@pytest.fixture
def copied(workdir, tmp_path):
  """A copy of the workdir that a test may change."""
  return pathlib.Path(shutil.copytree(workdir, tmp_path / 'copy'))


def head(directory, **options):
  with source.open_source(directory, BASE, **options) as (_, leaves):
    return leaves['params', 'head', 'w'][:]


def test_a_workdir_opens_at_the_newest_step_or_any_other(weights, workdir):
  want = np.asarray(weights[1]['head']['w'])
  np.testing.assert_array_equal(head(workdir), 6 * want)
  np.testing.assert_array_equal(head(workdir, step=3), 3 * want)
  np.testing.assert_array_equal(head(workdir, ema=True), 3 * want)
  with pytest.raises(errors.InputError, match=r'000000004 does not exist'):
    head(workdir, step=4)


def test_both_kinds_open_with_the_same_leaves(weights, workdir, hf_folder):
  cfg, params, router_biases = weights
  given = exchanged.leaves_of(params, router_biases)
  for directory in (workdir, hf_folder):
    with source.open_source(directory, BASE) as (opened, leaves):
      assert opened.model.mla == cfg.model.mla
      assert {p: x.shape for p, x in leaves.items()} == {
        p: x.shape for p, x in given.items()
      }
      assert all(isinstance(x, lazy_array.LazyArray) for x in leaves.values())


def test_a_hugging_face_folder_has_no_steps(hf_folder):
  for options in ({'step': 0}, {'ema': True}):
    with pytest.raises(errors.InputError, match='neither steps nor an average'):
      head(hf_folder, **options)


def test_an_average_needs_a_run_that_kept_one(copied, weights):
  settings = config.to_dict(weights[0])
  settings['optim']['ema_decay'] = 0.0
  text = config.to_json(config.from_config_dict(settings))
  (copied / 'config.json').write_text(text, encoding='utf-8')
  with pytest.raises(errors.InputError, match=r'optim\.ema_decay=0\.0'):
    head(copied, ema=True)


def test_a_workdir_without_steps_is_refused(copied):
  shutil.rmtree(copied / 'checkpoints')
  with pytest.raises(errors.InputError, match='holds no committed step'):
    head(copied)


def test_describe_reads_no_weight(weights, copied, hf_folder, tmp_path):
  cfg = weights[0]
  shutil.rmtree(copied / 'checkpoints')
  assert source.describe(copied, BASE) == (cfg, None)
  described, tokenizer = source.describe(hf_folder, BASE)
  assert (described.model.mla, tokenizer) == (cfg.model.mla, None)
  bpe = tokenizers.train(['def main():\n  print(1)\n' * 20], 270)
  bpe.save(copied / 'tokenizer.json')
  assert source.describe(copied, BASE)[1].text == bpe.text
  with pytest.raises(errors.InputError, match=r'config\.json cannot be read'):
    source.describe(tmp_path / 'nowhere', BASE)


def test_settings_are_refused_by_the_file_s_name(tmp_path):
  path = tmp_path / 'config.json'
  for text, message in (
    ('{"seed": 1,', 'is not JSON'),
    ('[]', 'must hold one JSON object'),
    ('{"seed": 1}', 'precision is missing'),
  ):
    path.write_text(text, encoding='utf-8')
    with pytest.raises(errors.InputError, match=message) as refusal:
      source.read_config(tmp_path)
    assert str(refusal.value).startswith(str(path))


def test_a_mark_identifies_the_weights(workdir, hf_folder, copied, tmp_path):
  third, sixth = (source.mark(workdir, step) for step in STEPS)
  assert third != sixth == source.mark(workdir)
  assert source.mark(workdir, ema=True) != sixth
  assert source.mark(copied) == sixth  # of the content, not of the path
  with pytest.raises(errors.InputError, match='000000004 does not exist'):
    source.mark(workdir, 4)
  before = source.mark(hf_folder)
  assert before == source.mark(hf_folder)
  other = pathlib.Path(shutil.copytree(hf_folder, tmp_path / 'hf'))
  marks = {before, source.mark(other)}
  next(other.glob('*.safetensors')).write_bytes(b'')
  assert len(marks | {source.mark(other)}) == 3


@pytest.mark.parametrize('change', ['missing', 'shape'])
def test_a_step_of_another_model_is_refused(workdir, weights, change):
  checkpoints = store.Store(workdir / 'checkpoints', keep=2)
  with contextlib.closing(checkpoints):
    arrays = checkpoints.open(6)
  at = ('train', 'params', 'head', 'w')
  array = arrays.pop(at)
  if change == 'shape':
    arrays[at] = lazy_array.LazyArray(
      (*array.shape, 1), array.dtype, array.read, (*array.chunk, 1)
    )
  has = 'none' if change == 'missing' else r'\[48, 64, 1\]'
  with pytest.raises(
    errors.InputError, match=rf'has {has} for train\.params\.head\.w, wanted'
  ):
    source.step_leaves(arrays, weights[0])


def test_only_matrices_are_cast(workdir, weights):
  with source.open_source(workdir, BASE, step=3) as (cfg, leaves):
    params, router_biases = source.to_devices(leaves, cfg, 'bfloat16')
  assert params['head']['w'].dtype == jnp.bfloat16
  assert params['final_norm']['norm'].dtype == jnp.float32
  assert jax.tree.structure(params) == jax.tree.structure(weights[1])
  jax.tree.map(np.testing.assert_array_equal, router_biases, weights[2])
