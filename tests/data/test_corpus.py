"""Where text comes from: the standard library, files, TFDS; one-line errors."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import sysconfig

import pyarrow
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from dsv3_jax import errors
from dsv3_jax.data import corpus, files, tokenizer
from tests import settings


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
  """Not the user's own."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


_TEXTS = [f'text {i}: gr\u00fc\u00dfe\n' * (i + 1) for i in range(30)]


def data_config(source, cache_dir='', **changes):
  cfg = settings.small(data__valid_fraction=0.3).data
  return dataclasses.replace(
    cfg, source=str(source), cache_dir=str(cache_dir), **changes
  )


def open_files(pattern, folder):
  return files.open_glob(str(pattern), 'text', folder / 'cache')


def write_text(folder):
  for i, text in enumerate(_TEXTS):
    (folder / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return folder / '*.txt'


def write_jsonl(folder):
  lines = [json.dumps({'text': text}) for text in _TEXTS]
  for name, part in (('a', lines[:10]), ('b', [*lines[10:], '', ''])):
    body = '\n'.join(part) + '\n'
    (folder / f'{name}.jsonl').write_text(body, encoding='utf-8')
  return folder / '*.jsonl'


def write_parquet(folder):
  table = pyarrow.table({'text': _TEXTS, 'other': list(range(30))})
  parquet.write_table(table, folder / 'x.parquet', row_group_size=7)
  return folder / '*.parquet'


@pytest.mark.parametrize('write', [write_text, write_jsonl, write_parquet])
def test_files_give_every_text_once(tmp_path, write):
  opened = corpus.open_corpus(data_config(write(tmp_path)))
  parts = (opened.train, opened.valid)
  texts = [[part[i]['text'] for i in range(len(part))] for part in parts]
  assert sorted(texts[0] + texts[1]) == sorted(_TEXTS)
  assert 3 <= len(texts[1]) <= 15


def test_files_have_no_records_beyond_their_ends(tmp_path):
  records = open_files(write_jsonl(tmp_path), tmp_path)
  assert len(list(records)) == len(records)
  for i in (-1, len(records)):
    with pytest.raises(IndexError):
      records[i]


def test_split_follows_the_name_not_the_place_or_the_others(tmp_path):
  """A moved folder, or one with more files, holds out the same documents."""
  names = {}
  for folder, extra in (('one', 0), ('two', 5)):
    place = tmp_path / folder / 'deep'
    place.mkdir(parents=True)
    source = write_text(place)
    for i in range(extra):
      (place / f'extra{i}.txt').write_text('more')
    valid = corpus.open_corpus(data_config(source)).valid
    held_out = {valid[i]['name'] for i in range(len(valid))}
    names[folder] = {name for name in held_out if 'extra' not in name}
  assert names['one'] == names['two']
  share = sum(corpus.is_held_out(f'{i}', 0.1) for i in range(10_000)) / 10_000
  assert 0.09 < share < 0.11


def test_conversations(tmp_path):
  turns = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
  ]
  lines = [json.dumps({'messages': turns})] * 20
  (tmp_path / 'chat.jsonl').write_text('\n'.join(lines))
  opened = corpus.open_corpus(data_config(tmp_path / '*.jsonl'))
  assert opened.train[0]['messages'] == turns
  assert corpus.document_text(opened.train[0]) == 'a\nb'


@pytest.mark.parametrize(
  ('name', 'body', 'expected'),
  [
    ('a.jsonl', b'{"text": "x"}\n{"text": 3}\n', 'a.jsonl:2: data.text'),
    (
      'a.jsonl',
      b'{"text": "x"}\n{"tex',
      'a.jsonl:2: not JSON: Unterminated string',
    ),
    ('a.jsonl', b'{"text": "x"}\n[1]\n', 'a.jsonl:2: not a JSON object'),
    ('a.jsonl', b'{"body": "x"}\n', "data.text_key='text'"),
    ('a.jsonl', b'{"text": "\xff"}\n', 'a.jsonl:1: not UTF-8'),
    ('a.jsonl', b'{"messages": "x"}\n', 'a.jsonl:1: messages must be a list'),
    (
      'a.jsonl',
      b'{"messages": [{"role": "user"}]}\n',
      'a.jsonl:1: messages[0].content must be a string',
    ),
    (
      'a.jsonl',
      b'{"messages": [{"role": "cat", "content": "x"}]}\n',
      'must be one of: system, user, assistant, tool',
    ),
    ('a.txt', b'\xff\xfe', 'a.txt: not UTF-8: invalid start byte at byte 0'),
    ('a.parquet', b'PAR1 no', 'a.parquet: not a Parquet file: '),
    ('a.csv', b'text', 'a.csv must end in one of'),
  ],
)
def test_bad_files_are_named(tmp_path, name, body, expected):
  (tmp_path / name).write_bytes(body)
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    corpus.open_corpus(data_config(tmp_path / '*'))
  assert '\n' not in str(caught.value)


def test_no_file_and_empty_parts(tmp_path):
  with pytest.raises(errors.InputError, match='matches no file'):
    corpus.open_corpus(data_config(tmp_path / '*.txt'))
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(errors.InputError, match=r'no (train|valid) documents'):
    corpus.open_corpus(data_config(tmp_path / '*.txt'))


class OddTexts(tfds.core.GeneratorBasedBuilder):
  """A dataset of somebody else, with a split and a field of its own."""

  VERSION = tfds.core.Version('2.0.0')
  splits = {'train': range(20), 'validation': range(20, 25)}

  def _info(self):
    text = tfds.features.Text()
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'body': text})
    )

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(x) for name, x in self.splits.items()}

  def _generate_examples(self, numbers):
    yield from ((i, {'body': _TEXTS[i]}) for i in numbers)


class TextsWithoutSplit(OddTexts):
  """All in one part: the held-out one is cut by a hash of the number."""

  VERSION = tfds.core.Version('2.0.0')
  splits = {'train': range(25)}


class OnlyTestTexts(OddTexts):
  """Nothing to learn from."""

  VERSION = tfds.core.Version('2.0.0')
  splits = {'test': range(25)}


class BrokenTexts(OddTexts):
  VERSION = tfds.core.Version('2.0.0')

  def _generate_examples(self, numbers):
    raise RuntimeError('the download is gone')


@pytest.mark.parametrize('name', ['odd_texts', 'texts_without_split'])
def test_any_tfds_set(tmp_path, name):
  cfg = data_config(f'tfds:{name}', tmp_path, text_key='body')
  opened = corpus.open_corpus(cfg)
  texts = [[x['text'] for x in part] for part in (opened.train, opened.valid)]
  assert sorted(sum(texts, [])) == sorted(_TEXTS[:25])
  if name == 'odd_texts':
    assert sorted(texts[1]) == sorted(_TEXTS[20:25])
  assert opened.fingerprint.startswith(f'{name}/2.0.0 train:')
  with pytest.raises(errors.InputError, match="'text' is no field of text"):
    corpus.open_corpus(data_config(f'tfds:{name}', tmp_path))


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('no_such_set', 'DatasetNotFoundError'), ('broken_texts', 'is gone')],
)
def test_a_tfds_set_that_cannot_be_made_is_one_line(tmp_path, name, expected):
  with pytest.raises(
    errors.InputError, match=f'tfds:{name}.*{expected}'
  ) as caught:
    corpus.open_corpus(data_config(f'tfds:{name}', tmp_path))
  assert '\n' not in str(caught.value)


def test_a_tfds_set_needs_a_split_to_learn_from(tmp_path):
  cfg = data_config('tfds:only_test_texts', tmp_path, text_key='body')
  with pytest.raises(
    errors.InputError, match=r"test_texts' has no split 'train'; it has: test$"
  ):
    corpus.open_corpus(cfg)


def test_fingerprint_is_of_names_and_content(tmp_path):
  marks = []
  for folder in ('one', 'two'):
    (tmp_path / folder).mkdir()
    source = write_text(tmp_path / folder)
    marks.append(corpus.open_corpus(data_config(source)).fingerprint)
  path = tmp_path / 'two' / '00.txt'
  text = path.read_text()
  path.write_text(text[::-1])  # as long as before
  os.utime(path, ns=(1, 1))
  marks.append(corpus.open_corpus(data_config(source)).fingerprint)
  path.rename(path.with_name('0.txt'))
  marks.append(corpus.open_corpus(data_config(source)).fingerprint)
  (tmp_path / 'two' / 'more.txt').write_text('')
  marks.append(corpus.open_corpus(data_config(source)).fingerprint)
  assert marks[0] == marks[1]  # wherever the folder is
  assert len(set(marks)) == 4
  assert all(mark.startswith('content:') for mark in marks)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('x')
  cfg = data_config(write_text(tmp_path), tmp_path / 'file')
  cfg = dataclasses.replace(cfg, tokenizer='', tokenizer_vocab=290)
  opened = corpus.open_corpus(cfg)
  with pytest.raises(errors.InputError, match=r'data\.cache_dir: .*file'):
    corpus.load_tokenizer(cfg, opened)
  cfg = data_config('tfds:odd_texts', tmp_path / 'file')
  with pytest.raises(errors.InputError, match=r'^data\.cache_dir: .*file'):
    corpus.open_corpus(cfg)


def test_without_locks_or_space_in_the_cache(tmp_path, monkeypatch):
  """Checks go on without; a tokenizer that is trained needs both."""
  cfg = data_config(write_text(tmp_path), tmp_path / 'cache')
  cfg = dataclasses.replace(cfg, tokenizer='', tokenizer_vocab=290)

  def fail(code):
    def call(*args):
      raise OSError(code, os.strerror(code))

    return call

  with monkeypatch.context() as patch:
    patch.setattr(fcntl, 'flock', fail(errno.ENOSYS))
    opened = corpus.open_corpus(cfg)
    assert len(opened.train) + len(opened.valid) == len(_TEXTS)
    expected = r'^data\.cache_dir: .*cache cannot be written \(Function not'
    with pytest.raises(errors.InputError, match=expected):
      corpus.load_tokenizer(cfg, opened)
  monkeypatch.setattr(tokenizer.Tokenizer, 'save', fail(errno.ENOSPC))
  expected = r'^data\.cache_dir: .*cache cannot be written \(No space left'
  with pytest.raises(errors.InputError, match=expected):
    corpus.load_tokenizer(cfg, opened)


def test_a_tokenizer_is_trained_on_texts_that_stay_on_disk(
  tmp_path, monkeypatch
):
  """Of a large corpus only the sample is in memory."""
  cfg = data_config(write_text(tmp_path), tmp_path / 'cache')
  cfg = dataclasses.replace(cfg, tokenizer='', tokenizer_vocab=290)
  opened, read, train = corpus.open_corpus(cfg), [], tokenizer.train

  class Records(list):
    def __getitem__(self, i):
      read.append(i)
      return super().__getitem__(i)

  def trained(texts, *args):
    read.clear()
    assert len(texts) == len(records)
    sample = texts[1::5]
    assert read == list(range(1, len(records), 5))
    assert sample == [x['text'] for x in list(opened.train)[1::5]]
    return train(list(texts), *args)

  records = Records(opened.train)
  monkeypatch.setattr(tokenizer, 'train', trained)
  corpus.load_tokenizer(cfg, dataclasses.replace(opened, train=records))


@pytest.mark.parametrize(
  ('packages', 'size'),
  [
    (('email', 'json', 'site-packages'), 300_000),
    pytest.param((), 10_000_000, marks=pytest.mark.nightly),  # all of it
  ],
)
def test_standard_library(tmp_path, monkeypatch, packages, size):
  """The real builder: bytes, held out by path, read again fast."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  if packages:
    for name in packages[:2]:
      shutil.copytree(root / name, tmp_path / 'lib' / name)
    root = tmp_path / 'lib'
    shutil.copytree(root / 'json', root / packages[2])
    paths = sysconfig.get_paths() | {'stdlib': str(root)}
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: paths)
  cfg = data_config('stdlib', tmp_path, valid_fraction=0.1)
  opened = corpus.open_corpus(cfg)
  names = {opened.valid[i]['name'] for i in range(len(opened.valid))}
  assert names
  assert all(corpus.is_held_out(name, 0.1) for name in names)
  everything = names | {record['name'] for record in opened.train}
  assert not any('site-packages' in name for name in everything)
  record = opened.train[0]
  assert not corpus.is_held_out(record['name'], 0.1)
  assert record['text'] == (root / record['name']).read_text(encoding='utf-8')
  texts = map(corpus.document_text, opened.train)
  assert sum(map(len, texts)) > size
  again = corpus.open_corpus(cfg)
  assert again.train[5] == opened.train[5]


@pytest.mark.parametrize(
  'changes',
  [{'tokenizer_vocab': 291}, {'valid_fraction': 0.2}, {'source': 'more'}],
)
def test_another_corpus_or_size_has_another_tokenizer(tmp_path, changes):
  cfg = data_config(write_text(tmp_path), tmp_path / 'cache')
  cfg = dataclasses.replace(cfg, tokenizer='', tokenizer_vocab=290)
  corpus.load_tokenizer(cfg, corpus.open_corpus(cfg))
  if 'source' in changes:
    (tmp_path / '30.txt').write_text('a text more, of other words')
  else:
    cfg = dataclasses.replace(cfg, **changes)
  corpus.load_tokenizer(cfg, corpus.open_corpus(cfg))
  assert len(list((tmp_path / 'cache').glob('tokenizer-*.json'))) == 2


def test_tokenizer_is_trained_once_and_kept(tmp_path):
  cfg = data_config(write_text(tmp_path), tmp_path / 'cache')
  cfg = dataclasses.replace(cfg, tokenizer='', tokenizer_vocab=290)
  opened = corpus.open_corpus(cfg)
  first = corpus.load_tokenizer(cfg, opened)
  (path,) = (tmp_path / 'cache').glob('tokenizer-*.json')
  stamp = path.stat().st_mtime_ns
  again = corpus.load_tokenizer(cfg, opened)
  assert path.stat().st_mtime_ns == stamp
  assert again.vocab_size == first.vocab_size == 290


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
  table = pyarrow.table({'body': ['x'], 'id': ['1']})
  parquet.write_table(table, tmp_path / 'a.parquet')
  message = re.escape("has no column 'text'; it has: 'body', 'id'")
  with pytest.raises(errors.InputError, match=message):
    open_files(tmp_path / '*', tmp_path)
