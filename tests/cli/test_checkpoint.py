"""export, import and manifest as commands; the tokenizer's files."""

import ast
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers as hf_tokenizers

import dsv3_jax
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.cli import main as cli
from dsv3_jax.data import tokenizer as tokenizers
from tests.checkpoint.hf import exchanged

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = ['a tiny text about tiny texts; tiny texts are texts'] * 4
# How ml_collections and transformers load things.
pytestmark = [
  pytest.mark.filterwarnings('ignore:the load_module'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
]


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(TEXTS, 280)


@pytest.fixture(scope='module')
def folder(tokenizer, tmp_path_factory):
  """An exported model of 280 tokens, with its tokenizer."""
  cfg = exchanged.make('plain', model__vocab_size=280)
  path = tmp_path_factory.mktemp('exchange') / 'hf'
  documents = kept_files.ours(tokenizer, cfg.model.max_seq_len)
  weights = exchanged.random_weights(cfg)
  return exchanged.write(cfg, *weights, path, documents=documents)


def test_there_and_back_by_commands(folder, tmp_path, capsys):
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert not cli.main(['import', f'--hf={folder}', f'--output={run}'])
  args = [f'--checkpoint={run}', f'--output={out}', '--dtype=float32']
  assert not cli.main(['export', *args, '--shard_gb=0.00006'])
  output = capsys.readouterr().out
  assert 'holds step 0' in output and 'model-00002-of-' in output
  for name in ('SHA256SUMS', 'config.json', 'tokenizer_config.json'):
    assert (out / name).read_text() == (folder / name).read_text()
  # A folder is exported as well: from f32 to FP8, and named by `generate`.
  low = tmp_path / 'low'
  args = [f'--checkpoint={folder}', f'--output={low}', '--dtype=fp8']
  assert not cli.main(['export', *args])
  args = [f'--checkpoint={low}', '--prompt=a tiny', '--max_new_tokens=4']
  assert not cli.main(['generate', *args, '--temperature=0'])
  assert capsys.readouterr().out.splitlines()[1].startswith('a tiny')


def test_an_export_without_mtp(folder, tmp_path):
  """However the flag is spelt, in FP8 too: the main model's tensors alone.

  transformers knows the layer of MTP as such only in models of 61 layers; in
  others its tensors are unexpected.
  """
  import transformers

  def read(path):
    """Names of tensors, and whether transformers has a place for all."""
    with shards.Folder(path) as opened:
      names = set(opened.entries)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
      path, output_loading_info=True
    )
    assert not info['missing_keys']
    return names, not info['unexpected_keys']

  names, are_known = read(folder)
  mtp = {name for name in names if name.startswith('model.layers.3.')}
  assert mtp and not are_known
  low = tmp_path / 'low'
  args = [f'--checkpoint={folder}', f'--output={low}', '--dtype=fp8']
  assert not cli.main(['export', *args])
  for flag in ('--no-mtp', '--nomtp', '--mtp=false'):
    out = tmp_path / flag
    args = [f'--checkpoint={folder}', f'--output={out}', '--dtype=float32']
    assert not cli.main(['export', *args, flag])
    assert read(out) == (names - mtp, True)
    body = json.loads((out / 'config.json').read_text())
    assert body['num_nextn_predict_layers'] == 0
  args = [f'--checkpoint={low}', f'--output={low}2', '--dtype=fp8', '--no-mtp']
  assert not cli.main(['export', *args])
  with shards.Folder(f'{low}2') as opened, shards.Folder(low) as whole:
    left = {name for name in whole.entries if 'layers.3.' not in name}
    assert opened.entries.keys() == left
    name = 'model.layers.2.self_attn.o_proj.weight'
    np.testing.assert_array_equal(opened.read(name), whole.read(name))


def test_manifest_is_what_an_export_holds(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  name = '--config=experiments/quickstart.py'
  assert not cli.main(['manifest', name, '--dtype=fp8'])
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split('\t') for line in lines]
  assert all(len(row) == 3 for row in rows)
  assert ['lm_head.weight', 'BF16', '2048x192'] in rows
  scale = 'model.layers.1.mlp.experts.15.up_proj.weight_scale_inv'
  assert [scale, 'F32', '1x2'] in rows


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (['export', '--output=x'], '--checkpoint=DIR is missing'),
    (['export', '--checkpoint=x'], '--output=DIR is missing'),
    (['export', '--checkpoint=no', '--output=x'], 'no/config.json'),
    (['export', '--checkpoint=x', '--output=x', '--shard_gb=0'], 'shard_gb=0'),
    (['export', '--checkpoint=x', '--output=x', '--dtype=f8'], 'dtype'),
    (['export', '--no-output'], "Unknown command line flag 'no-output'"),
    (['import', '--output=x'], '--hf=DIR is missing'),
    (['import', '--hf=x'], '--output=DIR is missing'),
    (['import', '--hf=no', '--output=x'], 'no is not a folder'),
    (['manifest'], '--config=FILE.py is missing'),
  ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, args, expected):
  monkeypatch.chdir(tmp_path)
  assert cli.main(args) == 2
  stderr = capsys.readouterr().err
  assert expected in stderr and stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_damaged_weights_end_in_one_line(folder, tmp_path, capsys):
  """A NaN is met in mid-import, or in mid-export of the folder itself."""
  bad = shutil.copytree(folder, tmp_path / 'bad')

  def change(arrays):
    arrays['model.layers.2.mlp.gate.weight'][1, 2] = np.nan

  exchanged.rewrite(bad, change)
  for args in (
    ['import', f'--hf={bad}', f'--output={tmp_path / "run"}'],
    ['export', f'--checkpoint={bad}', f'--output={tmp_path / "out"}'],
  ):
    assert cli.main(args) == 2
    stderr = capsys.readouterr().err
    assert stderr.count('\n') == 1 and 'first NaN at [1, 2]' in stderr
    assert f'{bad}/model.safetensors: model.layers.2.mlp.gate.weight' in stderr
    assert [path.name for path in tmp_path.iterdir()] == ['bad']


def test_a_folder_has_neither_steps_nor_an_average(capsys, folder, tmp_path):
  args = ['export', f'--checkpoint={folder}', f'--output={tmp_path / "x"}']
  for more in ('--step=3', '--ema'):
    assert cli.main([*args, more]) == 2
    assert 'neither steps nor an average' in capsys.readouterr().err


def test_transformers_loads_the_tokenizer(folder, tokenizer):
  """The same ids of text and of a conversation."""
  import transformers  # slow, so not by those who only collect tests

  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (
    tokenizer.bos_id,
    tokenizer.eos_id,
  )
  text = 'tiny texts; 1234'
  ids = theirs.encode(text, add_special_tokens=False)
  assert ids == tokenizer.encode(text).tolist()
  turns = [
    {'role': 'system', 'content': 'tiny'},
    {'role': 'user', 'content': 'a text?'},
    {'role': 'assistant', 'content': 'texts'},
    {'role': 'user', 'content': 'more'},
  ]
  for prompt in (False, True):
    ids = theirs.apply_chat_template(
      turns, add_generation_prompt=prompt, return_dict=False
    )
    want, _ = tokenizer.encode_chat(turns, add_generation_prompt=prompt)
    np.testing.assert_array_equal(ids, want)
  # Of itself, `tokenizer.json` also adds bos.
  text = (folder / 'tokenizer.json').read_text()
  assert dsv3_jax.load(folder).tokenizer.text == text
  own = hf_tokenizers.Tokenizer.from_str(text)
  want = tokenizer.encode(TEXTS[0], add_bos=True).tolist()
  assert own.encode(TEXTS[0]).ids == theirs(TEXTS[0]).input_ids == want
  assert want[0] == tokenizer.bos_id


def test_nothing_is_ever_unpickled():
  """No module imports what runs code out of data."""
  forbidden = {'pickle', 'cloudpickle', 'dill', 'marshal', 'shelve', 'torch'}
  paths = [
    path
    for package in ('dsv3_jax', 'pallas_kernels', 'experiments')
    for path in (ROOT / package).rglob('*.py')
  ]
  assert len(paths) > 50
  for path in paths:
    text = path.read_text(encoding='utf-8')
    assert 'allow_pickle' not in text
    for node in ast.walk(ast.parse(text)):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module]
      assert not {name.split('.')[0] for name in names} & forbidden, path
