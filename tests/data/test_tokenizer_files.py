"""The files beside a tokenizer.json: special tokens, bos, templates."""

import json
import re

import pytest
import tokenizers as hf_tokenizers
from tokenizers import models

from dsv3_jax import errors
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.data import chat, tokenizer, tokenizer_files
from tests.data import folders

# How transformers loads things.
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')
BOS = tokenizer_files.BOS


PLAIN = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>'}
CASES = {
  'DeepSeek, true': ('thinking', None, folders.config(), True),
  'DeepSeek, false': (
    'thinking', None, folders.config(add_bos_token=False), False,
  ),
  'DeepSeek, eos alone is said': (
    'thinking', None,
    folders.config(add_bos_token=None, add_eos_token=False), False,
  ),
  'DeepSeek, nothing': (
    'thinking', None, folders.config(add_bos_token=None), True,
  ),
  'DeepSeek, true, as published': ('thinking', 'bytes', folders.config(), True),
  'the file goes before false': (
    'thinking', 'bos', folders.config(add_bos_token=False), True,
  ),
  'plain, the file': ('plain', 'bos', PLAIN | {'bos_token': '<s>'}, True),
  'plain, nothing': ('plain', None, PLAIN | {'bos_token': '<s>'}, False),
  'plain, true': (
    'plain', None, PLAIN | {'bos_token': '<s>', 'add_bos_token': True}, True,
  ),
  'no bos': ('plain', None, PLAIN | {'add_bos_token': True}, False),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_bos_is_added_where_transformers_adds_it(tmp_path, name):
  """To what we export; to the folder itself if its `tokenizer.json` does."""
  kind, processor, body, adds = CASES[name]
  text = getattr(folders, f'{kind}_text')()
  if processor:
    text = folders.with_processor(text, processor, body['bos_token'])
  folder = folders.write(tmp_path / 'hf', text, body)
  ours, out = folders.load(folder), tmp_path / 'out'
  documents = kept_files.documents(folder, ours, 64)
  out.mkdir()
  kept_files.write(out, documents)
  for directory in (folder, out) if processor == 'bos' or not adds else (out,):
    own, theirs = folders.load(directory), folders.load_theirs(directory)
    assert own.adds_bos is ours.adds_bos is adds
    for sample in ('print(add(1, 2))', '', ' \n f\u00fcr'):
      want = ours.encode(sample, add_bos=True).tolist()
      assert own.encode(sample, add_bos=True).tolist() == want
      assert theirs(sample).input_ids == want
      assert (want[:1] == [ours.bos_id]) if adds else True
  is_kept = documents['tokenizer.json'] == text.encode()
  assert is_kept is (processor == 'bos' or not adds)


def test_folders_of_version_0_2_begin_with_bos(tmp_path):
  """They name DeepSeek's bos, and do not say that it is added."""
  body = folders.config(add_bos_token=None)
  folder = folders.write(tmp_path / 'hf', folders.thinking_text(), body)
  assert folders.load(folder).adds_bos
  assert folders.load(folders.write(tmp_path, folders.thinking_text())).adds_bos


def test_special_tokens_have_several_homes(tmp_path):
  """The map goes before the config, unless that has `added_tokens_decoder`."""
  spelled = {'bos_token': {'content': '<end>'}, 'unk_token': None}
  body = PLAIN | {'bos_token': '<s>', 'image_token': '<end>'}
  text = json.dumps(spelled)
  write = lambda body: folders.write(
    tmp_path, folders.plain_text(), body, **{'special_tokens_map.json': text}
  )
  for given, want in (
    (body, '<end>'), (body | {'added_tokens_decoder': {}}, '<s>'),
  ):  # fmt: skip
    t = folders.load(write(given))
    assert t.settings.special_tokens == {
      'bos_token': want, 'eos_token': '</s>', 'image_token': '<end>',
    }  # fmt: skip
    assert t.decode([t.bos_id]) == want
    assert t.named_token('bos_token') == want
    theirs = folders.load_theirs(tmp_path)
    assert theirs.bos_token == want
    assert theirs.special_tokens_map == t.settings.special_tokens
  (tmp_path / 'tokenizer_config.json').unlink()
  assert folders.load(tmp_path).settings.special_tokens == {
    'bos_token': '<end>'
  }


FORMS = {
  'a string': ({'chat_template': 'a'}, {}, {'default': 'a'}),
  'a list': (
    {'chat_template': [
      {'name': 'default', 'template': 'a'}, {'name': 'rag', 'template': 'b'},
    ]},
    {}, {'default': 'a', 'rag': 'b'},
  ),
  'a file': (
    {'chat_template': 'a'}, {'chat_template_jinja': 'c\r\n'},
    {'default': 'c\r\n'},
  ),
  'files': (
    {'chat_template': 'a'},
    {
      'chat_template_jinja': 'c',
      'additional_chat_templates__tool_use.jinja': 'd',
    },
    {'default': 'c', 'tool_use': 'd'},
  ),
  'none': ({}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize('name', FORMS)
def test_templates_have_several_homes(tmp_path, name):
  changes, files, want = FORMS[name]
  body = folders.config(**changes)
  folder = folders.write(tmp_path, folders.thinking_text(), body, **files)
  assert folders.load(folder).settings.templates == want
  theirs = folders.load_theirs(folder).chat_template
  if name != 'a file':  # their reader changes ends of lines
    assert theirs == (want if len(want) > 1 else want.get('default'))


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    ('{"a": ', 'tokenizer_config.json is not JSON: '),
    ('[]', 'tokenizer_config.json must hold one JSON object'),
    ('{"chat_template": 3}', 'chat_template must be a string, or a list'),
    ('{"chat_template": [3]}', 'chat_template must be a string, or a list'),
    ('{"chat_template": [{"name": "a"}]}', 'must be a string, or a list'),
    ('{"add_bos_token": "yes"}', 'add_bos_token must be true or false'),
  ],
)
def test_damage_is_one_line(tmp_path, body, expected):
  (tmp_path / 'tokenizer_config.json').write_text(body)
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    tokenizer_files.read(tmp_path)
  assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_what_is_no_utf8_is_named(tmp_path):
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(errors.InputError, match=r'template\.jinja is not UTF-8'):
    tokenizer_files.read(tmp_path)


def plain(**settings):
  """A tokenizer without any token of DeepSeek's."""
  return tokenizer.Tokenizer(
    folders.plain_text(), tokenizer_files.TokenizerSettings(**settings)
  )


def test_another_tokenizer_does_what_needs_no_token_of_deepseek():
  t = plain()
  ids = t.encode('print(add(1, 2))', add_bos=True)
  assert t.decode(ids) == 'print(add(1, 2))' and not t.adds_bos
  assert t.eos_ids == () and t.decode_answer([]) == ''
  assert t.special_ids == {0, 1, 2} and t.token_bytes(0) == b'<s>'
  own = plain(
    special_tokens={'bos_token': '<s>', 'eos_token': '</s>'}, adds_bos=True
  )
  assert own.encode('a', add_bos=True).tolist()[0] == own.bos_id == 0
  assert own.eos_ids == (1,)
  assert plain(eos_ids=(5, 1)).eos_ids == (5, 1)


@pytest.mark.parametrize(
  ('use', 'token'),
  [
    (lambda t: t.bos_id, BOS),
    (lambda t: t.eos_id, chat.EOS),
    (lambda t: t.encode_fim('a', 'b'), '<\uff5cfim\u2581begin\uff5c>'),
    (lambda t: t.user_id, chat.USER),
    (lambda t: t.apply_chat_template(folders.TURNS[:2]), BOS),
    (lambda t: t.check_training(), BOS),
    (lambda t: t.check_tools('a.jsonl:3'), chat.CALLS_BEGIN),
  ],
)
def test_what_needs_a_token_names_it(use, token):
  expected = re.escape(f'lacks the special token {token!a}')
  with pytest.raises(errors.InputError, match=expected):
    use(plain())


def test_a_token_without_a_name_is_named_by_its_part():
  with pytest.raises(errors.InputError, match='has no special token pad_token'):
    plain(special_tokens={'bos_token': '<s>'}).pad_id  # noqa: B018


def test_an_answer_ends_before_eos():
  t = plain(eos_ids=(40, 41))
  text = t.decode([50, 60])
  assert t.decode_answer([50, 60, 40]) == t.decode_answer([50, 60]) == text
  assert t.decode_answer([50, 40, 60, 41]) == t.decode([50, 40, 60])


def test_a_vocabulary_of_other_letters_has_bytes():
  """Not byte-level: a token is its own text."""
  bpe = hf_tokenizers.Tokenizer(
    models.BPE({'\u2581a': 0, '\u2581': 1, 'a': 2}, [])
  )
  t = tokenizer.Tokenizer(bpe.to_str())
  assert t.token_bytes(0) == '\u2581a'.encode()
  assert t.pieces('aa a') == ['aa a'] and not t.splits_as_published
