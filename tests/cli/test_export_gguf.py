"""`dsv3 export --format=gguf` as a command: sources, options, refusals."""

import contextlib
import shutil
import sys

import jax
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.checkpoint import source, store
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.cli import main as cli
from experiments import base
from tests.checkpoint.gguf import llama
from tests.checkpoint.hf import exchanged

# How ml_collections loads things.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


@pytest.fixture(scope='module')
def model():
  cfg = llama.make('plain', optim__ema_decay=0.9)
  return cfg, *llama.weights(cfg)


@pytest.fixture(scope='module')
def tokenizer():
  return llama.train_tokenizer()


@pytest.fixture(scope='module', params=['float32', 'fp8'])
def folder(request, model, tokenizer, tmp_path_factory):
  """A Hugging Face folder with its tokenizer."""
  path = tmp_path_factory.mktemp('exchange') / request.param
  documents = kept_files.ours(tokenizer, model[0].model.max_seq_len)
  dtype = request.param
  return exchanged.write(*model, path, dtype=dtype, documents=documents)


def export(directory, output, *more):
  args = [f'--checkpoint={directory}', f'--output={output}', '--format=gguf']
  return cli.main(['export', *args, *more])


def test_folders_and_workdirs_give_the_same_file(folder, tmp_path, capsys):
  """Also of FP8, which is dequantised."""
  first, second, run = (tmp_path / name for name in ('a', 'b', 'run'))
  assert not export(folder, first, '--dtype=float32')
  output = capsys.readouterr().out
  assert 'model.mtp.depth=1: left out' in output
  assert f'{first}  0.00 GB' in output
  dtype = f'--dtype={folder.name}'
  assert not cli.main(['import', f'--hf={folder}', f'--output={run}', dtype])
  assert not export(run, second, '--dtype=float32')
  got, again = llama.read(first), llama.read(second)
  for name, array in got.items():
    np.testing.assert_array_equal(again[name], array, err_msg=name)
  with source.open_source(folder, base.get_config().to_dict()) as (_, leaves):
    w_up_EDF = leaves['params', 'moe_layers', 'layers', 'moe', 'w_up'][0]
    path = ('params', 'dense_layers', 'layers', 'attention', 'w_uk')
    w_uk_CNH = leaves[path][0]
  np.testing.assert_array_equal(
    got['blk.1.ffn_up_exps.weight'], w_up_EDF.swapaxes(1, 2)
  )
  np.testing.assert_array_equal(
    got['blk.0.attn_k_b.weight'], w_uk_CNH.swapaxes(0, 1)
  )


@pytest.mark.nightly
def test_steps_and_the_average(model, tokenizer, tmp_path):
  cfg, params, router_biases = model
  run = tmp_path / 'run'
  checkpoints = store.Store(run / 'checkpoints', keep=2)
  scaled = lambda x: jax.tree.map(lambda w: np.asarray(x * w), params)
  with contextlib.closing(checkpoints):
    for step in (2, 4):
      train = {'params': scaled(step), 'router': router_biases}
      checkpoints.save(step, {'train': train, 'ema': scaled(step + 1)}, {})
  (run / 'config.json').write_text(config.to_json(cfg), encoding='utf-8')
  tokenizer.save(run / 'tokenizer.json')
  head_VD = np.asarray(params['head']['w']).T
  for options, factor in (
    ([], 4),
    (['--step=2'], 2),
    (['--ema'], 5),
    (['--ema', '--step=2'], 3),
  ):
    path = tmp_path / f'{factor}.gguf'
    assert not export(run, path, '--dtype=float32', *options)
    got_VD = llama.read(path)['output.weight']
    np.testing.assert_array_equal(got_VD, factor * head_VD)


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (['--dtype=fp8'], '--dtype=fp8 with --format=gguf must be one of: float32'),
    (['--format=hf', '--dtype=q8_0'], '--dtype=q8_0 with --format=hf must be'),
    (['--format=onnx'], 'format'),
    (['--shard_gb=5'], '--shard_gb is for --format=hf'),
    (['--checkpoint=no'], 'no/config.json'),
  ],
)
def test_bad_input_is_one_line(args, expected, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert export('x', 'y', *args) == 2
  stderr = capsys.readouterr().err
  assert expected in stderr and stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(folder, tmp_path, capsys, monkeypatch):
  output = tmp_path / 'out.gguf'
  bare = shutil.copytree(folder, tmp_path / 'bare')
  (bare / 'tokenizer.json').unlink()
  (bare / 'SHA256SUMS').unlink(missing_ok=True)
  assert export(bare, output) == 2
  stderr = capsys.readouterr().err
  assert f'{bare} has no tokenizer.json' in stderr and stderr.count('\n') == 1
  output.write_bytes(b'mine')
  assert export(folder, output) == 2
  assert f'--output={output} exists' in capsys.readouterr().err
  assert output.read_bytes() == b'mine'
  for name in list(sys.modules):
    if name.startswith('dsv3_jax.checkpoint.gguf'):
      monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  monkeypatch.delattr('dsv3_jax.checkpoint.gguf')
  assert export(folder, tmp_path / 'x') == 2
  stderr = capsys.readouterr().err
  assert "package gguf: pip install 'dsv3-jax[gguf]'" in stderr
  assert stderr.count('\n') == 1
