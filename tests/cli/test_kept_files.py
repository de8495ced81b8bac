"""import and export keep a folder's tokenizer, template and generation config.

Also of tokenizers that are not DeepSeek's, and without any.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.cli import main as cli
from dsv3_jax.data import tokenizer_files
from dsv3_jax.inference import chat, generate
from tests.checkpoint.hf import exchanged
from tests.data import folders

# How ml_collections and transformers load things.
pytestmark = [
  pytest.mark.filterwarnings('ignore:the load_module'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
]
GENERATION = {
  'bos_token_id': 0,
  'eos_token_id': [1, 6],
  'do_sample': True,
  'temperature': 0.6,
}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A folder of a model of 320 tokens, without a tokenizer."""
  sizes = {'vocab_size': 320, 'num_layers': 2, 'mtp__depth': 0}
  changes = {f'model__{name}': size for name, size in sizes.items()}
  cfg = exchanged.make('plain', **changes)
  folder = tmp_path_factory.mktemp('weights') / 'hf'
  return exchanged.write(cfg, *exchanged.random_weights(cfg), folder)


@pytest.fixture
def folder(weights, tmp_path):
  """A copy of it that a test may change."""
  return shutil.copytree(weights, tmp_path / 'hf')


def there_and_back(folder, tmp_path):
  """The workdir and the folder that the two commands make."""
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert not cli.main(['import', f'--hf={folder}', f'--output={run}'])
  args = [f'--checkpoint={run}', f'--output={out}', '--dtype=float32']
  assert not cli.main(['export', *args])
  return run, out


def test_every_file_comes_back_as_it_was(folder, tmp_path):
  body = folders.config(chat_template='a', surplus={'kept': True})
  folders.write(
    folder,
    folders.with_processor(folders.thinking_text(), 'bos', tokenizer_files.BOS),
    body,
    **{
      'generation_config.json': json.dumps(GENERATION),
      'special_tokens_map.json': '{ }',
      'added_tokens.json': '{"<think>": 300}\n',
      'chat_template.jinja': folders.REASONING.replace('\n', '\r\n'),
      'additional_chat_templates/tool_use.jinja': folders.TOOLS,
      'modeling.py': 'raise SystemExit',
    },
  )
  run, out = there_and_back(folder, tmp_path)
  names = [*kept_files.NAMES, 'additional_chat_templates/tool_use.jinja']
  for name in names:
    want = (folder / name).read_bytes()
    assert (run / name).read_bytes() == (out / name).read_bytes() == want
  assert not (out / 'modeling.py').exists()
  settings = json.loads((out / 'config.json').read_text())
  assert (settings['bos_token_id'], settings['eos_token_id']) == (0, [1, 6])
  for directory in (folder, run, out):
    loaded = dsv3_jax.load(directory)
    assert loaded.tokenizer.eos_ids == (1, 6)
    assert loaded.sampling_defaults == {'temperature': 0.6}
    prompt = loaded.tokenizer.apply_chat_template(folders.TURNS[:2])
    assert prompt.opens_thought


def test_token_ids_of_a_config_come_back(folder, tmp_path):
  """Of a folder without a generation_config.json."""
  path = folder / 'config.json'
  ids = {'bos_token_id': 0, 'eos_token_id': [1, 6], 'pad_token_id': 2}
  body = json.loads(path.read_text()) | ids
  path.write_text(json.dumps(body))
  run, out = there_and_back(folder, tmp_path)
  settings = json.loads((out / 'config.json').read_text())
  assert {name: settings[name] for name in ids} == ids
  kept = json.loads((run / 'generation_config.json').read_text())
  assert kept == {'_from_model_config': True} | ids
  assert not (out / 'tokenizer_config.json').exists()


@pytest.fixture(scope='module')
def logits(weights):
  """Tokens, and their logits."""
  tokens_BT = np.random.default_rng(0).integers(0, 290, (1, 9))
  return tokens_BT, dsv3_jax.load(weights).logits(tokens_BT)


@pytest.mark.parametrize('kind', ['none', 'bare', 'own'])
def test_weights_need_no_tokenizer_of_deepseek(folder, logits, tmp_path, kind):
  """They load, give logits, are imported and exported; chats are refused."""
  if kind != 'none':
    body = {'eos_token': '</s>', 'bos_token': '<s>', 'add_bos_token': True}
    body = body if kind == 'own' else None
    folders.write(folder, folders.plain_text(), body)
  _, out = there_and_back(folder, tmp_path)
  tokens_BT, want = logits
  loaded = dsv3_jax.load(out)
  np.testing.assert_array_equal(loaded.logits(tokens_BT), want)
  if kind == 'none':
    with pytest.raises(errors.InputError, match=r'no tokenizer\.json'):
      loaded.generate(['a'], 1)
    return
  ids = loaded.tokenizer.encode('def add', add_bos=True)
  assert loaded.tokenizer.decode(ids, skip_special=True) == 'def add'
  assert loaded.tokenizer.adds_bos is (kind == 'own')
  assert loaded.tokenizer.eos_ids == ((1,) if kind == 'own' else ())
  with pytest.raises(errors.InputError, match=r'lacks .* token .*User'):
    loaded.tokenizer.user_id  # noqa: B018
  body = json.loads((out / 'tokenizer_config.json').read_text())
  assert 'chat_template' not in body


@pytest.mark.parametrize('command', ['chat', 'generate', 'serve'])
def test_commands_without_a_token_are_one_line(folder, command, capsys):
  """chat needs DeepSeek's, if there is no template; the others do not."""
  folders.write(folder, folders.plain_text())
  args = [command, f'--checkpoint={folder}']
  if command == 'serve':
    (folder / 'chat_template.jinja').write_text('{% if %}')
  if command == 'generate':
    (folder / 'generation_config.json').write_text('{"top_p": 7}')
  assert cli.main(args) == 2
  stderr = capsys.readouterr().err
  expected = {
    'chat': 'lacks the special token',
    'serve': 'chat_template.jinja: line 1: Expected an expression',
    'generate': 'generation_config.json: top_p=7 must be in (0, 1]',
  }
  assert expected[command] in stderr
  assert stderr.count('\n') == 1


@pytest.mark.parametrize(
  ('body', 'args', 'want'),
  [
    (None, [], (0.7, 0.95, 0, 0.0, 1.0)),
    ({'temperature': 0.5, 'top_k': 9}, [], (0.5, 0.95, 9, 0.0, 1.0)),
    (
      {'temperature': 0.5, 'repetition_penalty': 1.5, 'min_p': 0.1},
      ['--temperature=0', '--repetition_penalty=1'],
      (0.0, 0.95, 0, 0.1, 1.0),
    ),
    ({'do_sample': False, 'top_k': 9}, [], (0.0, 0.95, 0, 0.0, 1.0)),
  ],
)
def test_defaults_of_commands(folder, monkeypatch, body, args, want, capsys):
  """generation_config.json goes before ours, flags before both."""
  folders.write(folder, folders.thinking_text())
  if body is not None:
    (folder / 'generation_config.json').write_text(json.dumps(body))
  seen = []

  def spy(runner, prompts, count, **options):
    seen.append(options)
    raise errors.InputError('enough')

  class Spy:
    def __init__(self, model, params, *args):
      spy(model, [], 0, **dataclasses.asdict(params))

  monkeypatch.setattr(generate, 'generate', spy)
  monkeypatch.setattr(chat, 'Conversation', Spy)
  for command in ('generate', 'chat'):
    assert cli.main([command, f'--checkpoint={folder}', *args]) == 2
    assert capsys.readouterr().err == 'dsv3: enough\n'
    names = ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty')
    assert tuple(seen[-1][name] for name in names) == want
  assert seen[0]['stop_id'] == (1,)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('{', 'must be JSON'),
    ('[1]', 'must be an object without'),
    ('{"messages": []}', 'must be an object without add_generation_prompt'),
  ],
)
def test_bad_variables_are_one_line(capsys, text, expected):
  args = ['chat', '--checkpoint=x', f'--chat_template_kwargs={text}']
  assert cli.main(args) == 2
  stderr = capsys.readouterr().err
  assert expected in stderr and stderr.count('\n') == 1


def test_transformers_reads_our_export_of_a_kept_folder(folder, tmp_path):
  """The same ids, the same conversation, the same logits."""
  torch = pytest.importorskip('torch')
  import transformers  # slow, so not by those who only collect tests

  body = folders.config(chat_template=folders.REASONING)
  folders.write(folder, folders.thinking_text(), body)
  generation = json.dumps(GENERATION)
  (folder / 'generation_config.json').write_text(generation)
  _, out = there_and_back(folder, tmp_path)
  ours = dsv3_jax.load(out)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  net = transformers.AutoModelForCausalLM.from_pretrained(
    out, attn_implementation='eager', dtype=torch.float32
  )
  assert net.generation_config.eos_token_id == [1, 6]
  assert net.config.eos_token_id == [1, 6]
  ids = theirs('print(add(1, 2))').input_ids
  assert ids == ours.tokenizer.encode('print(add(1, 2))', add_bos=True).tolist()
  assert ids[0] == ours.tokenizer.bos_id
  prompt = ours.tokenizer.apply_chat_template(folders.TURNS[:2])
  assert prompt.ids == theirs.apply_chat_template(
    folders.TURNS[:2], add_generation_prompt=True, return_dict=False
  )
  row = np.array([prompt.ids[:40]])
  with torch.no_grad():
    want = net(torch.tensor(row)).logits.numpy()
  np.testing.assert_allclose(ours.logits(row), want, rtol=0, atol=1e-5)


def test_ours_are_written_where_there_are_none(folder, tmp_path):
  """Of DeepSeek's tokenizer alone: its names, its bos, its chat format."""
  folders.write(folder, folders.thinking_text())
  _, out = there_and_back(folder, tmp_path)
  theirs, ours = folders.load_theirs(out), dsv3_jax.load(out).tokenizer
  assert theirs('add').input_ids == ours.encode('add', add_bos=True).tolist()
  assert theirs('add').input_ids[0] == ours.bos_id
  prompt = ours.apply_chat_template(folders.TURNS[:2])
  assert prompt.ids == theirs.apply_chat_template(
    folders.TURNS[:2], add_generation_prompt=True, return_dict=False
  )
  generation = json.loads((out / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == ours.eos_id
