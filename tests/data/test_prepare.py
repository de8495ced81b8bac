"""Rows that are packed once: the stream's, whatever happens on the way."""

import dataclasses
import errno
import itertools
import json
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import (
  corpus,
  loader,
  output_folder,
  packing,
  prepare,
  selection,
  shards,
  tokenizer,
)
from tests import settings

_TEXTS = [
  f'document {i}: ' + 'alpha beta; ' * (3 * i % 17) + '(gamma)\n\n' * (i % 5)
  for i in range(24)
]
ROWS = 50


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A folder with a corpus and its tokenizer."""
  folder = tmp_path_factory.mktemp('source')
  lines = [json.dumps({'text': text}) for text in _TEXTS]
  (folder / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  tokenizer.train(_TEXTS, 280).save(folder / 'tokenizer.json')
  return folder


def make(source, **changes):
  """A checked `Config` that reads the corpus of `source`."""
  named = {
    'model__vocab_size': 280,
    'data__source': str(source / 'a.jsonl'),
    'data__tokenizer': str(source / 'tokenizer.json'),
    'data__cache_dir': str(source / 'cache'),
    'data__valid_fraction': 0.2,
    'data__fim_rate': 0.3,
    'data__split_rate': 0.3,
    'data__shuffle_window': 32,  # small ones are slow to shuffle
    'data__packing_bins': 4,
    'seed': 3,
  }
  return settings.small(**(named | changes))


def run(cfg, output, rows=ROWS, **options):
  options = {'rows_per_shard': 16} | options
  return prepare.prepare(cfg, output, rows=rows, **options)


def stream(cfg, count):
  """The first rows of on-the-fly reading, one a batch."""
  opened = corpus.open_corpus(cfg.data)
  bpe = corpus.load_tokenizer(cfg.data, opened)
  batches = loader.Loader(opened.train, bpe, cfg.data, seed=cfg.seed, rows=1)
  rows = list(itertools.islice(batches, count))
  batches.close()
  return [{name: x[0] for name, x in row.items()} for row in rows]


def prepared(cfg, output, numbers):
  """Examples of rows of a folder."""
  folder = shards.Folder(output)
  rows = folder.read(numbers)
  folder.close()
  isolated = cfg.data.isolate_samples
  return [packing.to_example(row, isolated) for row in rows]


def num_heads(row, bos_id):
  """How many documents begin in a packed row."""
  return int(
    ((row['tokens'] == bos_id) & (row['tokens_segment_ids'] > 0)).sum()
  )


def contents(output):
  """Name -> bytes of every file of a folder but its lock."""
  paths = pathlib.Path(output).iterdir()
  return {x.name: x.read_bytes() for x in paths if x.name != '.lock'}


@pytest.mark.parametrize('isolated', [False, True])
def test_prepared_rows_are_those_of_the_stream(source, tmp_path, isolated):
  """In any order, every array and dtype, for any number of threads."""
  cfg = make(source, data__isolate_samples=isolated)
  summary = run(cfg, tmp_path / 'one')
  want = stream(cfg, ROWS)
  for number in (0, 49, 16, 15, 31, 7):
    (got,) = prepared(cfg, tmp_path / 'one', [number])
    assert got.keys() == want[number].keys()
    for name, x in want[number].items():
      np.testing.assert_array_equal(got[name], x)
      assert got[name].dtype == x.dtype
  run(cfg, tmp_path / 'three', num_workers=3)
  files = contents(tmp_path / 'one')
  assert files == contents(tmp_path / 'three')
  assert sorted(files) == [
    'prepared.json',
    'report.json',
    *(shards.name(i) for i in range(4)),
    'shards.jsonl',
    'tokenizer.json',
  ]
  tokens = sum((row['segments_BT'] > 0).sum() for row in want)
  assert tokens <= summary['tokens'] <= tokens + ROWS  # T + 1 a row
  assert summary['rows'] == summary['written_rows'] == ROWS
  (counts,) = summary['sources'].values()
  assert counts['tokens'] == summary['tokens']
  folder = shards.Folder(tmp_path / 'one')
  bos = tokenizer.Tokenizer.from_file(cfg.data.tokenizer).bos_id
  begun = sum(num_heads(row, bos) for row in folder.read(range(ROWS)))
  folder.close()
  assert counts['documents'] == begun > 5
  documents = len(corpus.open_corpus(cfg.data).train)
  assert counts['epochs'] == begun / documents
  assert summary['shards'] == 4


class Killed(Exception):
  """As if the process ended here."""


@pytest.mark.parametrize('stop', [0, 1, 15, 16, 17, 33, 49])
def test_a_killed_start_goes_on_with_the_same_bytes(
  source, tmp_path, monkeypatch, stop
):
  cfg = make(source)
  run(cfg, tmp_path / 'calm')
  encode, done = shards.encode_row, []

  def broken(number, row):
    if len(done) == stop:
      raise Killed
    done.append(number)
    return encode(number, row)

  with monkeypatch.context() as patch:
    patch.setattr(shards, 'encode_row', broken)
    with pytest.raises(Killed):
      run(cfg, tmp_path / 'rough')
  index = tmp_path / 'rough' / shards.INDEX
  index.write_text(index.read_text() + '{"rows": 16, "num')  # half a line
  summary = run(cfg, tmp_path / 'rough')
  assert contents(tmp_path / 'rough') == contents(tmp_path / 'calm')
  assert summary['written_rows'] == ROWS - stop // 16 * 16
  assert run(cfg, tmp_path / 'rough')['written_rows'] == 0


SCRIPT = """
import pathlib
from dsv3_jax.data import prepare
from tests.data import test_prepare as prepared
source, output = map(pathlib.Path, {paths!r})
prepare.prepare(prepared.make(source), output, rows=600, rows_per_shard=40)
"""


@pytest.mark.nightly
def test_killed_processes_leave_what_another_goes_on_with(source, tmp_path):
  """`kill -9` as soon as there is another shard, again and again."""
  cfg, rough = make(source), tmp_path / 'rough'
  run(cfg, tmp_path / 'calm', rows=600, rows_per_shard=40)
  script = SCRIPT.format(paths=(str(source), str(rough)))
  count = lambda: len(list(rough.glob('rows-*')))
  for _ in range(3):
    before = count()
    child = subprocess.Popen([sys.executable, '-c', script])
    while count() == before and child.poll() is None:
      time.sleep(0.01)
    child.kill()
    child.wait()
    assert before < count() < 15
  summary = run(cfg, rough, rows=600, rows_per_shard=40)
  assert 0 < summary['written_rows'] < 600
  assert contents(rough) == contents(tmp_path / 'calm')


def test_more_rows_are_added(source, tmp_path):
  """As if they had been asked for at once; fewer change nothing."""
  cfg = make(source)
  run(cfg, tmp_path / 'once')
  for rows in (5, 20, 7, 32, ROWS):
    run(cfg, tmp_path / 'bit by bit', rows=rows)
  assert contents(tmp_path / 'bit by bit') == contents(tmp_path / 'once')


def test_what_is_damaged_is_written_again(source, tmp_path):
  cfg, output = make(source), tmp_path / 'a'
  run(cfg, output)
  want = contents(output)
  first, second, third, last = (output / shards.name(i) for i in range(4))
  first.write_bytes(b'x' + first.read_bytes()[1:])
  second.unlink()
  last.write_bytes(last.read_bytes()[:-1])
  assert run(cfg, output)['written_rows'] == 16 + 2
  assert contents(output) == want | {first.name: first.read_bytes()}
  assert run(cfg, output, verify=True)['written_rows'] == 16
  assert contents(output) == want

  # A shard that does not come out as it was is not put beside the others.
  index = output / shards.INDEX
  index.write_text(index.read_text().replace('sha256": "', 'sha256": "0'))
  third.unlink()
  with pytest.raises(errors.InputError, match='does not come out as it was'):
    run(cfg, output)
  assert not third.exists()


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'seed': 4}, 'seed=3, but here it is 4'),
    ({'data__seq_len': 10}, 'seq_len=12, but here it is 10'),
    ({'data__fim_rate': 0.0}, 'fim_rate=0.3, but here it is 0.0'),
    ({'data__packing_bins': 5}, 'packing_bins=4'),
    ({'data__shuffle_window': 9}, 'shuffle_window=32'),
    ({'data__isolate_samples': True}, 'isolate_samples=False'),
    ({'data__valid_fraction': 0.3}, 'valid_fraction=0.2'),
  ],
)
def test_rows_of_other_settings_are_refused(
  source, tmp_path, changes, expected
):
  run(make(source), tmp_path / 'a', rows=1)
  with pytest.raises(errors.InputError, match=f'was prepared with {expected}'):
    run(make(source, **changes), tmp_path / 'a', rows=1)


def test_rows_of_another_corpus_or_tokenizer_are_refused(source, tmp_path):
  cfg = make(source)
  run(cfg, tmp_path / 'a', rows=1)
  (tmp_path / 'b.jsonl').write_text((source / 'a.jsonl').read_text() + ' ')
  tokenizer.train(_TEXTS, 279).save(tmp_path / 'tokenizer.json')
  for name, path in (('corpus', 'b.jsonl'), ('tokenizer', 'tokenizer.json')):
    field = 'source' if name == 'corpus' else name
    data = dataclasses.replace(cfg.data, **{field: str(tmp_path / path)})
    with pytest.raises(errors.InputError, match=f'was prepared with {name}='):
      run(dataclasses.replace(cfg, data=data), tmp_path / 'a', rows=1)


def test_a_folder_with_other_files_or_in_use_is_refused(source, tmp_path):
  cfg = make(source)
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(errors.InputError, match=r"other files, 'thesis.tex' am"):
    run(cfg, tmp_path)
  assert sorted(x.name for x in tmp_path.iterdir()) == ['.lock', 'thesis.tex']
  with pytest.raises(errors.InputError, match='cannot be written'):
    run(cfg, tmp_path / 'thesis.tex')


def test_a_full_disk_is_its_own_error(source, tmp_path, monkeypatch):
  """Whatever the library calls it; what is finished is safe."""
  cfg, output = make(source), tmp_path / 'a'
  run(cfg, output, rows=16)
  want = contents(output)
  (output / f'.{shards.name(1)}').symlink_to('/dev/full')
  with pytest.raises(OSError, match='No space left') as caught:
    run(cfg, output)
  assert caught.value.errno == errno.ENOSPC
  (output / f'.{shards.name(1)}').unlink()
  assert contents(output) == want


def selecting(source, **changes):
  """With two rules, of which each drops something."""
  rules = {'data__filters__min_chars': 30, 'data__dedup__exact': True}
  text = (source / 'a.jsonl').read_text()
  copies = '\n'.join(text.splitlines()[5:9])
  (source / 'b.jsonl').write_text(f'{text}\n{copies}', encoding='utf-8')
  path = {'data__source': str(source / 'b.jsonl')}
  return make(source, **(path | rules | changes))


def test_rows_are_of_the_documents_that_are_kept(source, tmp_path):
  """The stream of these alone, and a restart does not judge again."""
  cfg, output = selecting(source), tmp_path / 'a'
  summary = run(cfg, output, rows=20)
  opened = corpus.open_corpus(cfg.data)
  chosen = selection.select(cfg.data, opened, say=print)
  dropped = {
    rule: x['documents'] for rule, x in chosen.report['dropped'].items()
  }
  assert dropped.keys() >= {'min_chars', 'exact_duplicate'}
  assert summary['selection'] == chosen.report
  report = json.loads((output / prepare.REPORT).read_text())
  assert report.items() <= summary.items()

  texts = {opened.train[i]['text'] for i in chosen.kept.tolist()}
  kept = [x for x in opened.train if x['text'] in texts]
  bpe = corpus.load_tokenizer(cfg.data, opened)
  documents = [opened.train[i] for i in chosen.kept.tolist()]
  batches = loader.Loader(documents, bpe, cfg.data, seed=cfg.seed, rows=1)
  want = list(itertools.islice(batches, ROWS))
  batches.close()
  assert len(documents) < len(kept) < len(opened.train)

  def never(*args, **options):
    pytest.fail('judged again')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(selection, 'select', never)
    run(cfg, output)
  for number, got in enumerate(prepared(cfg, output, range(ROWS))):
    for name, x in want[number].items():
      np.testing.assert_array_equal(got[name], x[0])
  (output / output_folder.KEPT).write_bytes(b'\0' * 8)
  with pytest.raises(errors.InputError, match='kept-documents is damaged: it'):
    run(cfg, output)


def test_other_rules_are_other_rows(source, tmp_path):
  cfg = selecting(source)
  run(cfg, tmp_path / 'a', rows=1)
  other = selecting(source, data__filters__min_chars=31)
  with pytest.raises(
    errors.InputError, match=r'with filters\.min_chars=30, but'
  ):
    run(other, tmp_path / 'a', rows=1)
  with pytest.raises(errors.InputError, match='leave no document: loosen them'):
    run(selecting(source, data__filters__min_chars=10**6), tmp_path / 'b')
  assert contents(tmp_path / 'b') == {}


def test_progress_has_rows_rate_share_and_time_left(
  source, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(prepare.scan, 'QUIET_SECONDS', 0.0)
  run(make(source), tmp_path / 'a')
  lines = capsys.readouterr().err.splitlines()
  assert re.fullmatch(
    r'prepare: 50 rows of 12 tokens need up to 0\.00 GB; [\d.]+ GB are free',
    lines[0],
  )
  assert re.fullmatch(
    r'prepare: 25 of 50 rows \(50%\), [\d,]+ tokens/s, \d+ min left', lines[25]
  )
