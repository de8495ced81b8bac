"""Byte-level BPE: the published one and those trained here."""

import functools
import gzip
import json
import pathlib
import re
import threading
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax import errors
from dsv3_jax.data import tokenizer
from tests.data import make_published

_SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
_PUBLISHED = _SHARED / 'deepseek_tokenizer.json.gz'
_MIXED = (
  'Hello, world! 1234567 \u4f60\u597d\uff0c\u4e16\u754c\u3002'
  '\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 '
  'caf\u00e9 \U0001f600\U0001f468\u200d\U0001f469\n\n'
  'def f(x):\n\treturn {"a": [x, -1.5e-3]}  # done\r\n    \n'
)
_TEXT = (
  'def add(a, b):\n  return a + b\n\n\nprint(add(1, 2));\n'
  'for x in range(10):\n  print(x, "-->", x * x)\n'
) * 40


@functools.cache
def fixture():
  """What `make_published` kept of the published file."""
  return json.loads(gzip.decompress(make_published.FIXTURE.read_bytes()))


@functools.cache
def published():
  """That tokenizer, with names for the entries that were left out."""
  spec = fixture()['tokenizer']
  vocab = spec['model']['vocab']
  missing = set(range(1 + max(vocab.values()))) - set(vocab.values())
  filled = vocab | {f'left out {index}': index for index in missing}
  spec = spec | {'model': spec['model'] | {'vocab': filled}}
  return tokenizer.Tokenizer(json.dumps(spec))


@pytest.mark.skipif(
  not _PUBLISHED.exists(),
  reason='the published tokenizer.json is not at ../shared/data',
)
def test_the_fixture_is_of_the_published_file():
  text = gzip.decompress(_PUBLISHED.read_bytes()).decode()
  assert make_published.reduce(text) == fixture()
  whole = tokenizer.Tokenizer.from_file(_PUBLISHED)
  assert whole.vocab_size == published().vocab_size
  assert whole.encode(_MIXED).size < len(_MIXED.encode()) / 2
  np.testing.assert_array_equal(
    whole.splittable_ids, published().splittable_ids
  )


def test_published_ids_of_200_texts():
  t, cases = published(), fixture()['cases']
  assert len(cases) == 200
  for text, ids in cases:
    assert t.encode(text).tolist() == ids
    assert t.decode(ids) == text
    assert t.decode(t.encode(text, add_bos=True), skip_special=True) == text
  assert len({index for _, ids in cases for index in ids}) > 300


@functools.cache
def trained():
  return tokenizer.train([_TEXT], 300)


def test_published_ids():
  """FACTS of the release: 128,815 ids, FIM and role markers."""
  t = published()
  assert t.vocab_size == 128_815
  assert (t.bos_id, t.eos_id, t.pad_id) == (0, 1, 2)
  fim = (t.fim_hole_id, t.fim_begin_id, t.fim_end_id)
  assert fim == (128_800, 128_801, 128_802)
  assert (t.user_id, t.assistant_id) == (128_803, 128_804)


def test_published_punctuation_with_line_ends():
  """801 tokens of punctuation and symbols with line ends behind."""
  t = published()
  assert len(t.splittable_ids) == 801
  for index in t.splittable_ids.tolist():
    pieces = t.punctuation_newlines[index]
    assert len(pieces) > 1 and t.decode(pieces) == t.decode([index])


def test_published_digits_go_in_threes():
  assert published().encode('1234567').size == 3  # 123 456 7


def test_trained_splits_text_as_the_published_one_does():
  """The same pre-tokenizer: pieces end at the same places."""
  for text in (_MIXED, *(text for text, _ in fixture()['cases'])):
    assert published().pieces(text) == trained().pieces(text)


@hypothesis.given(st.text())
def test_any_text_round_trips(text):
  t = trained()
  ids = t.encode(text)
  assert t.decode(ids) == text
  assert not ids.size or 0 <= ids.min() <= ids.max() < t.vocab_size


def test_trained_vocabulary_has_the_size_asked_for_and_helps():
  t = trained()
  assert t.vocab_size == 300
  assert t.encode(_TEXT).size < len(_TEXT) / 2
  with pytest.raises(errors.InputError, match=r'vocab=9999 must be <= \d+'):
    tokenizer.train(['abc'], 9999)


def test_markers_in_text_stay_text():
  """No document can smuggle in an end of text or a role."""
  t = trained()
  for marker in tokenizer.SPECIAL:
    ids = t.encode(marker)
    assert not set(ids.tolist()) & set(t.special_ids)
    assert t.decode(ids) == marker
    chat = [{'role': 'user', 'content': marker}]
    np.testing.assert_array_equal(t.encode_chat(chat)[0][2:], ids)


def test_other_threads_run_while_a_long_text_is_encoded():
  text, turns = _TEXT * 200, 0
  thread = threading.Thread(target=lambda: trained().encode(text))
  trained()
  thread.start()
  while thread.is_alive():  # once or twice if the other kept the lock
    turns += 1
    time.sleep(0.001)
  assert turns > 5


def test_chat_template():
  t = trained()
  system, user, answer = map(t.encode, ('Be kind.', 'Hi', 'Hello!'))
  ids, learned = t.encode_chat(
    [
      {'role': 'system', 'content': 'Be kind.'},
      {'role': 'user', 'content': 'Hi'},
      {'role': 'assistant', 'content': 'Hello!'},
      {'role': 'user', 'content': 'Hi'},
    ],
    add_generation_prompt=True,
  )
  parts = [[t.bos_id], system, [t.user_id], user, [t.assistant_id], answer]
  parts += [[t.eos_id], [t.user_id], user, [t.assistant_id]]
  np.testing.assert_array_equal(ids, np.concatenate(parts))
  start = 1 + system.size + 1 + user.size + 1
  want = np.zeros(ids.size, bool)
  want[start : start + answer.size + 1] = True  # the answer and its eos
  np.testing.assert_array_equal(learned, want)


def test_save_and_load(tmp_path):
  path = tmp_path / 'tokenizer.json'
  trained().save(path)
  again = tokenizer.Tokenizer.from_file(path)
  np.testing.assert_array_equal(again.encode(_MIXED), trained().encode(_MIXED))
  assert [p.name for p in tmp_path.iterdir()] == ['tokenizer.json']


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    (None, 'cannot be read'),
    (b'{"model": ', 'is damaged'),
    (b'\xff\xfe', 'is damaged'),
    (b'[]', 'tokenizer'),
    (b'{}', 'tokenizer'),
    (b'{"added_tokens": [], "model": {"type": "none"}}', 'is no tokenizer: '),
  ],
)
def test_bad_files_are_named(tmp_path, body, expected):
  path = tmp_path / 'tokenizer.json'
  if body is not None:
    path.write_bytes(body)
  with pytest.raises(errors.InputError, match=expected) as caught:
    tokenizer.Tokenizer.from_file(path)
  assert str(path) in str(caught.value)


def test_a_fault_of_ours_is_not_the_file_s(tmp_path, monkeypatch):
  def fails(self, *args):
    raise RuntimeError('ours')

  trained().save(tmp_path / 'tokenizer.json')
  monkeypatch.setattr(tokenizer.Tokenizer, '__init__', fails)
  with pytest.raises(RuntimeError, match='ours'):
    tokenizer.Tokenizer.from_file(tmp_path / 'tokenizer.json')


def test_training_needs_every_special_token():
  trained().check_training()
  for token in tokenizer.SPECIAL[:-1]:
    other = tokenizer.Tokenizer(trained().text.replace(token, 'other'))
    expected = re.escape(f'lacks the special token {token!a}')
    with pytest.raises(errors.InputError, match=expected):
      other.check_training()
