"""What is remembered of checked files, and what changes meanwhile."""

import gzip
import os
import pathlib
import re
import types
import uuid

import pyarrow
import pytest
from pyarrow import parquet

from dsv3_jax import errors
from dsv3_jax.data import corpus, files, records, scan
from tests.data import test_files


@pytest.fixture
def checks(monkeypatch):
  """Lines that were parsed."""
  parsed, parse = [], records.from_json

  def from_json(line, text_key):
    parsed.append(line)
    return parse(line, text_key)

  monkeypatch.setattr(records, 'from_json', from_json)
  return parsed


@pytest.mark.parametrize('kind', ['', '.gz'])
def test_an_unchanged_file_is_checked_once(tmp_path, checks, kind):
  """By path, size and time of change, and `data.text_key`."""
  body = [*test_files.lines(5), b'{']
  paths = [tmp_path / f'{name}.jsonl{kind}' for name in 'ab']
  for path in paths:
    path.write_bytes(test_files.packed(kind, b'\n'.join(body)))
  first = test_files.open_files(tmp_path, '*.jsonl*')
  assert len(checks) == 12
  again = test_files.open_files(tmp_path, '*.jsonl*')
  assert len(checks) == 12
  assert again.faults() == first.faults() and again.num_bad == 2
  assert again.fingerprint() == first.fingerprint()
  assert list(again) == list(first)
  checks.clear()
  # Another time: that file is checked again, and is the same.
  os.utime(paths[0], ns=(1, 1))
  assert (
    test_files.open_files(tmp_path, '*').fingerprint() == first.fingerprint()
  )
  assert len(checks) == 6
  # Another content of the same size; and with the old time it is not seen.
  before = paths[1].stat()
  other = test_files.packed(
    kind, b'\n'.join(body).replace(b'text 1', b'text 9')
  )
  paths[1].write_bytes(other.ljust(before.st_size)[: before.st_size])
  os.utime(paths[1], ns=(2, before.st_mtime_ns))
  assert (
    test_files.open_files(tmp_path, '*').fingerprint() == first.fingerprint()
  )
  os.utime(paths[1], ns=(3, 3))
  assert (
    test_files.open_files(tmp_path, '*').fingerprint() != first.fingerprint()
  )
  checks.clear()
  files.open_glob(str(tmp_path / '*'), 'body', tmp_path / 'cache')
  assert len(checks) >= 6


def test_a_damaged_memory_is_checked_anew(tmp_path, checks):
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(test_files.lines(5)))
  first = test_files.open_files(tmp_path, '*.jsonl')
  (place,) = (tmp_path / 'cache' / 'scans').iterdir()
  whole = place.read_bytes()
  for damage in (b'', b'{}', b'[]\n', whole[:-1], whole[:-1] + b'x', b'\n'):
    place.write_bytes(damage)
    checks.clear()
    assert list(test_files.open_files(tmp_path, '*.jsonl')) == list(first)
    assert len(checks) == 5 + 10
    assert place.read_bytes() == whole


def test_an_unpacked_copy_that_is_gone_is_made_anew(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(test_files.packed('.gz', b'\n'.join(test_files.lines(5))))
  opened = test_files.open_files(tmp_path, '*.gz')
  (copy,) = (tmp_path / 'cache' / 'unpacked').iterdir()
  copy.unlink()
  with pytest.raises(
    errors.InputError, match=r'a\.jsonl\.gz:1: .*after it was'
  ):
    opened[0]
  assert len(list(test_files.open_files(tmp_path, '*.gz'))) == 5


def test_a_file_that_changes_is_named(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join(test_files.lines(5)))
  opened = test_files.open_files(tmp_path, '*.jsonl')
  path.write_bytes(b'{"text": 3}' * 9)
  expected = r'a\.jsonl:2: not JSON.*: the file changed after it was checked'
  with pytest.raises(errors.InputError, match=expected):
    opened[1]
  parse = records.from_json

  def grows(line, text_key):
    with open(path, 'ab') as file:
      file.write(b'\n')
    return parse(line, text_key)

  monkeypatch.setattr(records, 'from_json', grows)
  with pytest.raises(
    errors.InputError, match=r'a\.jsonl: changed while it was'
  ):
    test_files.open_files(tmp_path, '*.jsonl')


def test_without_a_cache(tmp_path, capsys):
  """Plain files are checked at each start; others cannot be unpacked."""
  (tmp_path / 'cache').write_text('a file')
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(test_files.lines()))
  (tmp_path / 'b.jsonl').write_bytes(b'\n'.join(test_files.lines()))
  opened = corpus.open_corpus(test_files.data_config(tmp_path, '*.jsonl'))
  assert len(opened.train) + len(opened.valid) == 80
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'data.cache_dir: {tmp_path}/cache cannot be written')
  (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(b'{}'))
  expected = r'^data\.cache_dir: .*cache cannot be .* unpacked: name another$'
  with pytest.raises(errors.InputError, match=expected):
    corpus.open_corpus(test_files.data_config(tmp_path, '*.jsonl.gz'))


def test_a_full_disk_and_a_file_that_may_not_be_read(tmp_path, monkeypatch):
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(b'{}'))
  (tmp_path / 'cache' / 'unpacked').mkdir(parents=True)
  monkeypatch.setattr(uuid, 'uuid4', lambda: types.SimpleNamespace(hex='x'))
  scratch = tmp_path / 'cache' / 'unpacked' / '.x'
  scratch.symlink_to('/dev/full')
  expected = r'^data\.cache_dir: .*written \(No space left on device\), where'
  with pytest.raises(errors.InputError, match=expected):
    test_files.open_files(tmp_path, '*.gz')
  assert not scratch.is_symlink()

  def read_bytes(path):
    raise PermissionError(13, 'Permission denied')

  (tmp_path / 'a.txt').write_bytes(b'x')
  monkeypatch.setattr(pathlib.Path, 'read_bytes', read_bytes)
  with pytest.raises(errors.InputError, match=r'a\.txt: cannot be read: Perm'):
    test_files.open_files(tmp_path, '*.txt')
  monkeypatch.setattr(pyarrow, 'OSFile', read_bytes)
  with pytest.raises(errors.InputError, match=r'a\.jsonl\.gz: cannot be read'):
    test_files.open_files(tmp_path, '*.gz')


def test_two_that_unpack_at_once_do_not_meet(tmp_path, monkeypatch):
  """Processes of one cache on two machines may have the same number."""
  for name in 'ab':
    body = b'\n'.join(test_files.lines(5)).replace(
      b'text ', b'%s ' % name.encode()
    )
    (tmp_path / f'{name}.jsonl.gz').write_bytes(gzip.compress(body))
  parse, other = records.from_json, []

  def meanwhile(line, text_key):
    if not other:
      other.append(None)
      other[0] = test_files.open_files(tmp_path, 'b*')
    return parse(line, text_key)

  monkeypatch.setattr(os, 'getpid', lambda: 7)
  monkeypatch.setattr(records, 'from_json', meanwhile)
  first = test_files.open_files(tmp_path, 'a*')
  for opened, name in ((first, 'a'), (other[0], 'b')):
    want = [f'{name} {i}' for i in range(5)]
    assert [record['text'] for record in opened] == want


def test_what_a_killed_process_left_is_removed(tmp_path):
  """Of a day ago: another process may still write what is newer."""
  folder = tmp_path / 'cache' / 'unpacked'
  folder.mkdir(parents=True)
  for name in ('.old', '.new'):
    (folder / name).write_bytes(b'x')
  os.utime(folder / '.old', (1, 1))
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'x'))
  opened = test_files.open_files(tmp_path, '*.gz')
  assert opened[0]['text'] == 'x'
  left = [path.name for path in folder.iterdir()]
  assert '.new' in left and '.old' not in left and len(left) == 2


def test_a_scan_that_cannot_be_kept_leaves_nothing(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / 'a.txt').write_bytes(b'x')
  monkeypatch.setattr(uuid, 'uuid4', lambda: types.SimpleNamespace(hex='x'))
  folder = tmp_path / 'cache' / 'scans'
  folder.mkdir(parents=True)
  (folder / '.x').symlink_to('/dev/full')
  assert len(test_files.open_files(tmp_path, '*.txt')) == 1
  assert 'cannot be written (No space left' in capsys.readouterr().err
  assert not list(folder.iterdir())


def test_a_long_check_says_how_far_it_is(tmp_path, capsys, monkeypatch):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'x' * 3_000_000)
  test_files.open_files(tmp_path, '*.txt')
  assert capsys.readouterr().err == ''
  monkeypatch.setattr(scan, 'QUIET_SECONDS', 0.0)
  os.utime(path, ns=(1, 1))
  test_files.open_files(tmp_path, '*.txt')
  (line,) = capsys.readouterr().err.splitlines()
  pattern = r'checking data\.source: 0\.0 of 0\.0 GB, \d+ MB/s, 0 min left'
  assert re.fullmatch(pattern, line)


@pytest.mark.parametrize('kind', ['.jsonl.gz', '.parquet'])
def test_reading_of_records_shows_progress_too(
  tmp_path, capsys, monkeypatch, kind
):
  """Which takes longer than unpacking and hashing."""
  path = tmp_path / f'a{kind}'
  if kind == '.parquet':
    table = pyarrow.table({'text': ['x'] * 60})
    parquet.write_table(table, path, row_group_size=10)
  else:
    path.write_bytes(gzip.compress(b'\n'.join(test_files.lines(60))))
  monkeypatch.setattr(scan, 'QUIET_SECONDS', 0.0)
  test_files.open_files(tmp_path, f'*{kind}')
  output = capsys.readouterr().err.splitlines()
  assert len(output) >= 1 + (6 if kind == '.parquet' else 60)
  assert ' 0.0 of 0.0 GB, ' in output[-1]
