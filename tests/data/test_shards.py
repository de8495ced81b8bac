"""Records, shards and the index of prepared rows."""

import json

import hypothesis
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import strategies as st

from dsv3_jax import errors
from dsv3_jax.data import shards

_LENGTH = 13


def packed(lengths, seed=0):
  """A row as the packer yields it, of segments of such lengths."""
  rng, total = np.random.default_rng(seed), sum(lengths)
  pad = lambda x: np.pad(x, (0, _LENGTH - total)).astype(np.int32)
  return {
    'tokens': pad(rng.integers(0, 2**31, total)),
    'learned': pad(rng.integers(0, 2, total)),
    'tokens_segment_ids': pad(np.repeat(np.arange(len(lengths)) + 1, lengths)),
    'tokens_positions': pad(np.concatenate([np.arange(n) for n in lengths])),
  }


@st.composite
def segments(draw):
  """Lengths of segments that a row has room for."""
  lengths = draw(st.lists(st.integers(1, _LENGTH), min_size=1, max_size=6))
  while sum(lengths) > _LENGTH:
    lengths.pop()
  return lengths or [1]


@hypothesis.given(lengths=segments(), number=st.integers(0, 2**40))
def test_a_record_is_the_row(lengths, number):
  row = packed(lengths, seed=number)
  record = shards.encode_row(number, row)
  assert len(record) <= shards.most_bytes(_LENGTH)
  decoded = shards.decode_row(record, number, _LENGTH)
  assert decoded.keys() == row.keys()
  for name, x in row.items():
    np.testing.assert_array_equal(decoded[name], x)
    assert decoded[name].dtype == np.int32


def test_the_layout_is_as_documented():
  """By hand: number, CRC, segments, their lengths, bits, tokens."""
  row = {
    'tokens': np.array([7, 8, 300, 0]),
    'learned': np.array([1, 0, 1, 0]),
    'tokens_segment_ids': np.array([1, 1, 2, 0]),
  }
  record = shards.encode_row(5, row)
  assert record[:8] == b'\5\0\0\0\0\0\0\0'
  body = b'\2\0\0\0' + b'\2\0\0\0\1\0\0\0' + b'\xa0'
  assert record[12:] == body + b'\7\0\0\0\x08\0\0\0\x2c\1\0\0'


def test_a_damaged_record_is_refused():
  """Any byte of it, its end, or another row's."""
  record = shards.encode_row(3, packed([4, 6]))
  for at in range(len(record)):
    damaged = bytearray(record)
    damaged[at] ^= 1
    with pytest.raises(ValueError, match=r'CRC|it is row'):
      shards.decode_row(bytes(damaged), 3, _LENGTH)
  for end in (0, 5, len(record) - 1):
    with pytest.raises(ValueError, match=r'CRC|too short'):
      shards.decode_row(record[:end], 3, _LENGTH)
  with pytest.raises(ValueError, match='it is row 3'):
    shards.decode_row(record, 4, _LENGTH)
  with pytest.raises(ValueError, match='another length'):
    shards.decode_row(record, 3, 9)


def write_folder(path, counts=(3, 3, 2)):
  """Shards of three rows; the tokens of row i are seeded with i."""
  path.mkdir()
  lines = []
  for i, count in enumerate(counts):
    file = path / shards.name(i)
    writer = array_record_module.ArrayRecordWriter(
      str(file), shards.WRITER_OPTIONS
    )
    for number in range(3 * i, 3 * i + count):
      writer.write(shards.encode_row(number, packed([5, 8], seed=number)))
    writer.close()
    shard = {'rows': count, 'num_bytes': file.stat().st_size, 'state': {}}
    shard |= {'sha256': shards.file_digest(file), 'counts': {}}
    lines.append(json.dumps(shard) + '\n')
  (path / shards.INDEX).write_text(''.join(lines))
  head = {'format': 1, 'rows_per_shard': 3, 'settings': {'seq_len': 12}}
  (path / shards.HEAD).write_text(json.dumps(head))
  return path


def test_rows_are_found_by_number(tmp_path):
  folder = shards.Folder(write_folder(tmp_path / 'a'))
  assert len(folder) == 8
  numbers = [7, 0, 3, 2, 3]
  for number, row in zip(numbers, folder.read(numbers), strict=True):
    want = packed([5, 8], seed=number)
    np.testing.assert_array_equal(row['tokens'], want['tokens'])
  assert folder.num_read == 5
  folder.check_sizes(0, 8)
  folder.close()


def test_few_shards_stay_open(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'MOST_OPEN', 1)
  folder = shards.Folder(write_folder(tmp_path / 'a'))
  closed = []
  reader = array_record_module.ArrayRecordReader

  class Counted:
    def __init__(self, *args, **options):
      self._reader = reader(*args, **options)

    def read(self, rows):
      return self._reader.read(rows)

    def close(self):
      closed.append(self)
      self._reader.close()

  monkeypatch.setattr(array_record_module, 'ArrayRecordReader', Counted)
  folder.read([0, 1, 4, 7, 0])
  assert len(closed) == 3
  folder.close()
  assert len(closed) == 4


def test_a_flipped_bit_of_a_shard_is_one_line(tmp_path):
  """Wherever it is: the row is refused, or unharmed."""
  path = write_folder(tmp_path / 'a', counts=(3,))
  file = path / shards.name(0)
  whole = file.read_bytes()
  want = shards.Folder(path).read([1])[0]['tokens']
  messages = []
  for at in range(0, len(whole), 331):
    damaged = bytearray(whole)
    damaged[at] ^= 16
    file.write_bytes(damaged)
    folder = shards.Folder(path)
    try:
      np.testing.assert_array_equal(folder.read([1])[0]['tokens'], want)
    except errors.InputError as error:
      messages.append(str(error))
    folder.close()
  assert len(messages) > 2
  for message in messages:
    assert message.startswith(f'data.prepared: {file} is damaged: row 1: ')
    assert '\n' not in message


def test_a_shard_in_the_place_of_another_is_refused(tmp_path):
  path = write_folder(tmp_path / 'a', counts=(3, 3))
  (path / shards.name(1)).replace(path / shards.name(0))
  with pytest.raises(errors.InputError, match='row 1: it is row 4'):
    shards.Folder(path).read([1])
  with pytest.raises(errors.InputError, match='rows-000001 is damaged: row 4'):
    shards.Folder(path).read([4])


def test_sizes_are_checked_where_a_run_reads(tmp_path):
  path = write_folder(tmp_path / 'a')
  file = path / shards.name(1)
  file.write_bytes(file.read_bytes()[:-1])
  (path / shards.name(2)).unlink()
  folder = shards.Folder(path)
  folder.check_sizes(0, 3)
  with pytest.raises(errors.InputError, match='rows-000001 is damaged: it has'):
    folder.check_sizes(0, 4)
  with pytest.raises(errors.InputError, match='rows-000001 is damaged: it has'):
    folder.check_sizes(5, 6)
  with pytest.raises(errors.InputError, match=r'rows-000002 .* it is missing'):
    folder.check_sizes(6, 8)


@pytest.mark.parametrize(
  ('name', 'text', 'expected'),
  [
    ('prepared.json', None, 'cannot be read .*name a folder that dsv3 prepare'),
    ('prepared.json', '{"format": 1', 'prepared.json is damaged: '),
    ('prepared.json', '[]', 'its format must be 1'),
    ('prepared.json', '{"format": 2}', 'its format must be 1'),
    ('prepared.json', '{"format": 1}', "no 'settings'"),
    ('shards.jsonl', '{}\n', 'shards.jsonl is damaged: line 1: '),
    ('shards.jsonl', '\n', 'shards.jsonl is damaged: line 1: '),
    ('shards.jsonl', '[1]\n', 'shards.jsonl is damaged: line 1: '),
  ],
)
def test_a_damaged_head_or_index_is_one_line(tmp_path, name, text, expected):
  path = write_folder(tmp_path / 'a')
  (path / name).unlink()
  if text is not None:
    (path / name).write_text(text)
  with pytest.raises(errors.InputError, match=expected) as caught:
    shards.Folder(path)
  assert '\n' not in str(caught.value)


def test_a_line_without_its_end_was_never_finished(tmp_path):
  path = write_folder(tmp_path / 'a')
  file = path / shards.INDEX
  file.write_text(file.read_text()[:-2])
  assert len(shards.Folder(path)) == 6
