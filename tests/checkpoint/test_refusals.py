"""Folders, configs and weights that are refused, each in one line."""

import contextlib
import errno
import json
import os
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors
from dsv3_jax.checkpoint import fp8_blocks, partial_folder
from dsv3_jax.checkpoint.hf import exporter, importer
from experiments import base
from tests.checkpoint.hf import exchanged

BASE = base.get_config().to_dict()
SUMS = 'SHA256SUMS'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Of each dtype, a folder of the same model; not to be changed."""
  cfg, folder = exchanged.make('plain'), tmp_path_factory.mktemp('checkpoints')
  weights = exchanged.random_weights(cfg)
  for dtype in ('float32', 'fp8'):
    exchanged.write(cfg, *weights, folder / dtype, dtype)
  return folder


@pytest.fixture
def folder(folders, tmp_path):
  """An f32 folder of one's own."""
  return shutil.copytree(folders / 'float32', tmp_path / 'a')


def refused(folder, *expected):
  """Import names the folder and what is wrong, and leaves nothing behind."""
  run = folder.with_name('run')
  with pytest.raises(errors.InputError) as caught:
    importer.to_workdir(folder, run, BASE)
  message = str(caught.value)
  assert message.isprintable()
  for part in (str(folder), *expected):
    assert part in message, message
  assert not list(folder.parent.glob('run*'))


@contextlib.contextmanager
def edited(folder):
  """The config of a folder, written back when left."""
  path = folder / 'config.json'
  body = json.loads(path.read_text())
  yield body
  path.write_text(json.dumps(body))


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('attention_bias', True, 'attention_bias=True is not built'),
    ('hidden_act', 'gelu', "hidden_act='gelu' is not built"),
    ('model_type', 'llama', "model_type='llama' is not built"),
    ('tie_word_embeddings', True, 'tie_word_embeddings=True'),
    ('num_key_value_heads', 2, 'num_key_value_heads=2 is not built'),
    ('sliding_window', 4, 'sliding_window=4 is a field that is not known'),
    ('hidden_size', '48', "hidden_size='48' must be of type int"),
    ('hidden_size', None, 'hidden_size=None must be of type int'),
    ('n_group', 3, 'model.moe.num_groups=3 must divide'),
    ('rope_scaling', {'type': 'linear', 'factor': 2}, "of type 'yarn'"),
    ('rope_scaling', [40], 'rope_scaling=[40] must be an object or null'),
    ('rope_parameters', 'yarn', "rope_parameters='yarn' must be an object"),
    ('rope_theta', None, 'must hold numbers'),
    ('rope_theta', 1e300, 'must hold numbers'),
    ('rms_norm_eps', 0, 'model.norm_eps=0.0 must be > 0'),
    ('num_hidden_layers', 10**9, 'num_hidden_layers=1000000000 is more than'),
    ('max_position_embeddings', 2**31, 'must be at most 2147483647'),
    ('a\nb', 1, "'a\\nb'=1 is a field that is not known"),
    ('auto' * 1000, 'x' * 10**5, 'is a field that is not known'),
    ('quantization_config', {'quant_method': 'awq'}, 'quantization_config='),
    ('vocab_size', 65, 'embed_tokens.weight has shape [64, 48], wanted [65'),
    ('num_hidden_layers', 4, 'is missing'),
  ],
)
def test_a_config_that_is_not_built_is_refused(folder, field, value, expected):
  with edited(folder) as body:
    body[field] = value
  refused(folder, 'config.json: ' if field in expected else '', expected)


def test_an_output_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(errors.InputError, match=r'^--output: .* cannot be writt'):
    partial_folder.make(tmp_path / 'file' / 'below')


def test_a_config_without_a_size_is_refused(folder):
  with edited(folder) as body:
    del body['hidden_size']
  refused(folder, 'config.json: hidden_size is missing')


def test_a_config_is_read_strictly(folder):
  path = folder / 'config.json'
  text = path.read_text()
  for more, expected in (
    ('"hidden_size": 48,', "'hidden_size' twice"),
    ('"auto_map": {"a": 1, "a": 2},', "'auto_map' has 'a' twice"),
    ('"bos_token_id": NaN,', 'NaN is no value'),
  ):
    path.write_text(text.replace('{', '{' + more, 1))
    refused(folder, str(path), expected)
  path.unlink()
  refused(folder, str(path), 'cannot be read')


def test_no_size_that_a_config_claims_is_ever_made(folder):
  """Layers, experts and dims beyond all memory are refused at once."""
  for field in ('num_hidden_layers', 'n_routed_experts', 'hidden_size'):
    for value in (5000, 2**40):
      path = folder / 'config.json'
      text = path.read_text()
      tracemalloc.start()
      try:
        with edited(folder) as body:
          body[field] = value
        refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
      finally:
        tracemalloc.stop()
        path.write_text(text)


NAME = 'model.layers.1.self_attn.kv_b_proj.weight'


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    (lambda x: x.pop(NAME), f'tensor {NAME} is missing'),
    (lambda x: x.update(more=x[NAME]), 'tensor more is no part of this model'),
    (lambda x: x.update({NAME: x[NAME][1:]}), f'{NAME} has shape'),
    (lambda x: x.update({NAME: x[NAME].astype('i4')}), f'{NAME} has dtype I32'),
    (
      lambda x: x.update({NAME: x[NAME].astype(fp8_blocks.E4M3)}),
      f'{NAME} is FP8 and has no scales',
    ),
    (
      lambda x: x.update({NAME + '_scale_inv': np.ones((1, 1), 'f4')}),
      f'{NAME} has dtype F32, wanted',
    ),
    (
      lambda x: x.update({
        NAME: x[NAME].astype(fp8_blocks.E4M3),
        NAME + '_scale_inv': np.ones((2, 1), 'f4'),
      }),
      f'{NAME}_scale_inv is F32[2, 1], wanted F32[1, 1]',
    ),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, change, expected):
  exchanged.rewrite(folder, change)
  refused(folder, expected)


@pytest.mark.parametrize(
  ('copy', 'of'),
  [('embed_tokens', 'model.embed_tokens'), ('shared_head.head', 'lm_head')],
)
def test_a_copy_that_differs_is_named(folder, copy, of):
  """MTP modules share both: their own copies are never dropped silently."""

  def change(arrays):
    arrays[f'model.layers.3.{copy}.weight'][-1, -1] += 1

  exchanged.rewrite(folder, change)
  refused(folder, f'{copy}.weight differs from {of}.weight')


KINDS = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16, 'F16': np.float16}


@pytest.mark.parametrize('value', [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('kind', KINDS)
def test_a_number_that_is_none_is_named(folder, kind, value):
  def change(arrays):
    arrays[NAME] = arrays[NAME].astype(KINDS[kind])
    arrays[NAME][37, 5] = value

  exchanged.rewrite(folder, change)
  word = 'NaN' if np.isnan(value) else 'infinity'
  refused(
    folder, f'model.safetensors: {NAME} holds', f'first {word} at [37, 5]'
  )
  with pytest.raises(errors.InputError, match=r'at \[37, 5\]'):
    dsv3_jax.load(folder)


@pytest.mark.parametrize(
  ('code', 'scale', 'expected'),
  [
    (0x7F, None, f'{NAME} holds a NaN or an infinity, first NaN at [37, 5]'),
    (0xFF, None, f'{NAME} holds a NaN or an infinity, first NaN at [37, 5]'),
    (None, np.nan, f'{NAME}_scale_inv holds the scale nan at [0, 0]'),
    (None, np.inf, f'{NAME}_scale_inv holds the scale inf at [0, 0]'),
    (None, 0.0, f'{NAME}_scale_inv holds the scale 0.0 at [0, 0]'),
    (None, -1.0, f'{NAME}_scale_inv holds the scale -1.0 at [0, 0]'),
    (None, 1e36, 'must be > 0 and at most 7.6e+35'),
  ],
)
def test_fp8_that_is_no_number_is_named(
  folders, tmp_path, code, scale, expected
):
  """Kept as FP8, dequantised into a workdir, and loaded."""

  def change(arrays):
    if code is not None:
      arrays[NAME].view(np.uint8)[37, 5] = code
    else:
      arrays[NAME + '_scale_inv'][0, 0] = scale

  folder = shutil.copytree(folders / 'fp8', tmp_path / 'a')
  exchanged.rewrite(folder, change)
  for way in (
    lambda: importer.to_workdir(folder, tmp_path / 'run', BASE, 'fp8'),
    lambda: importer.to_workdir(folder, tmp_path / 'run', BASE, 'float32'),
    lambda: dsv3_jax.load(folder),
  ):
    with pytest.raises(errors.InputError) as caught:
      way()
    message = str(caught.value)
    assert message.startswith(f'{folder}/model.safetensors: ')
    assert expected in message and message.isprintable()
    assert not list(tmp_path.glob('run*'))


def test_damage_of_our_shards_is_named(folders, tmp_path):
  for damage in ('flip', 'truncate', 'unlink'):
    folder = shutil.copytree(folders / 'float32', tmp_path / damage)
    path = sorted(folder.glob('*.safetensors'))[1]
    data = bytearray(path.read_bytes())
    if damage == 'flip':
      data[-5] ^= 2
      path.write_bytes(data)
    elif damage == 'truncate':
      path.write_bytes(data[:-7])
    else:
      path.unlink()
    with pytest.raises(errors.InputError, match=path.name):
      dsv3_jax.load(folder)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'fp8'])
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_not_exported(tmp_path, dtype, value):
  """Named by tensor and place, whatever the dtype; nothing is left."""
  cfg = exchanged.make('plain')
  weights = exchanged.random_weights(cfg)
  params, router_biases = jax.tree.map(np.array, weights)
  params['moe_layers']['layers']['moe']['w_up'][1, 3, 2, 1] = value
  name = r'layers\.2\.mlp\.experts\.3\.up_proj\.weight holds .* at \[1, 2\]'
  with pytest.raises(errors.InputError, match=name):
    exchanged.write(cfg, params, router_biases, tmp_path / 'out', dtype)
  assert not list(tmp_path.iterdir())


def test_a_source_that_cannot_be_read_now_keeps_finished_shards(
  folders, tmp_path, monkeypatch
):
  """As a network disk at times: the same command goes on from them."""
  preadv, left, output = os.preadv, [40], tmp_path / 'out'

  def at_times(*args):
    left[0] -= 1
    if left[0] < 0:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(*args)

  def export():
    with importer.open_folder(folders / 'float32', BASE) as (cfg, leaves):
      exporter.export(cfg, leaves, output, dtype='float32', shard_bytes=60_000)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'preadv', at_times)
    with pytest.raises(errors.InputError, match=r'cannot be read \(Input/outp'):
      export()
  kept = {
    path.name: path.stat().st_mtime_ns
    for path in (tmp_path / 'out.partial').glob('model-*')
  }
  export()
  first = min(kept)
  assert (output / first).stat().st_mtime_ns == kept[first]
  assert (output / SUMS).read_text() == (folders / 'float32' / SUMS).read_text()


def test_an_export_does_not_touch_an_import_s_folder(tmp_path):
  (tmp_path / 'out.partial' / 'checkpoints').mkdir(parents=True)
  cfg = exchanged.make('plain')
  expected = r'out\.partial is of an interrupted import: remove it, or name'
  with pytest.raises(errors.InputError, match=expected):
    exchanged.write(cfg, *exchanged.random_weights(cfg), tmp_path / 'out')
  assert (tmp_path / 'out.partial' / 'checkpoints').is_dir()


def test_an_import_does_not_touch_an_export_s_folder(folder):
  shard = folder.with_name('run.partial') / 'model-00001-of-00002.safetensors'
  shard.parent.mkdir()
  shard.write_bytes(b'finished')
  expected = r'run\.partial is of an interrupted export: remove it, or name'
  with pytest.raises(errors.InputError, match=expected):
    importer.to_workdir(folder, folder.with_name('run'), BASE)
  assert shard.read_bytes() == b'finished'


def test_an_eps_that_the_format_cannot_say_is_not_exported(tmp_path):
  """Readers have 1e-6 in the latents' norms; nothing is written."""
  cfg = exchanged.make('plain', model__latent_norm_eps=1e-5)
  weights = exchanged.random_weights(cfg)
  expected = r'model\.latent_norm_eps=1e-05 must be 1e-06 to be exported'
  with pytest.raises(errors.InputError, match=expected):
    exchanged.write(cfg, *weights, tmp_path / 'out')
  assert not list(tmp_path.iterdir())
