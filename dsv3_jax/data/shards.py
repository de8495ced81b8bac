"""Prepared rows: packed once by `prepare`, read by index.

A folder has

  prepared.json   format, and all that the rows depend on
  tokenizer.json
  shards.jsonl    a line for each finished shard, in order
  rows-NNNNNN     shards: ArrayRecord files of as many rows each

Row i is row i of the stream that `loader.Loader` reads with the same settings.
A record is one row, little-endian:

  uint64   number of the row
  uint32   CRC-32 of all that follows
  uint32   number of segments, n
  uint32   length of each segment [n]
  bits     1 where a token is learned [tokens], the first is the highest
  uint32   tokens

Padding is not stored. Only NumPy and JSON read a folder: nothing is unpickled.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from dsv3_jax import errors

FORMAT = 1
HEAD, INDEX, TOKENIZER = 'prepared.json', 'shards.jsonl', 'tokenizer.json'
# A record is a group, as rows are read one by one; the level of the library.
WRITER_OPTIONS = 'group_size:1,zstd'
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
MOST_OPEN = 4  # shards
_HEADER = struct.Struct('<QII')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """A finished shard, as `shards.jsonl` has it.

  rows: how many. num_bytes, sha256: of the file. state: position of the stream
  after its last row. counts: name of a source -> tokens, and documents that
  begin, in these rows.
  """

  rows: int
  num_bytes: int
  sha256: str
  state: dict[str, Any]
  counts: dict[str, list[int]]


def name(index: int) -> str:
  """File name of a shard."""
  return f'rows-{index:06d}'


def most_bytes(length: int) -> int:
  """Upper bound of a record of `length` tokens, not compressed."""
  return _HEADER.size + 4 * length + -(-length // 8) + 4 * length


def encode_row(number: int, row: dict[str, np.ndarray]) -> bytes:
  """The record of a packed row.

  Args:
    row: `tokens`, `learned` and `tokens_segment_ids`, as the packer yields it.
  """
  segments = row['tokens_segment_ids']
  lengths = np.bincount(segments, minlength=1)[1:]
  total = int(lengths.sum())
  assert np.all(np.diff(segments[:total]) >= 0) and np.all(lengths > 0)
  body = b''.join(
    (
      lengths.astype('<u4').tobytes(),
      np.packbits(row['learned'][:total].astype(bool)).tobytes(),
      row['tokens'][:total].astype('<u4').tobytes(),
    )
  )
  count = struct.pack('<I', len(lengths))
  crc = zlib.crc32(body, zlib.crc32(count))
  return _HEADER.pack(number, crc, len(lengths)) + body


def decode_row(
  record: bytes, number: int, length: int
) -> dict[str, np.ndarray]:
  """The packed row of a record, for `packing.to_example`.

  Args:
    number: that the row must have.
    length: of the row with its padding, T + 1.

  Raises:
    ValueError: the record is damaged, or of another row.
  """
  if len(record) < _HEADER.size:
    raise ValueError('too short')
  found_number, crc, count = _HEADER.unpack_from(record)
  if zlib.crc32(record[_HEADER.size - 4 :]) != crc:
    raise ValueError('another CRC')
  if found_number != number:
    raise ValueError(f'it is row {found_number}')
  lengths = np.frombuffer(record, '<u4', count, _HEADER.size).astype(np.int64)
  total, at = int(lengths.sum()), _HEADER.size + 4 * count
  size = -(-total // 8)
  if total > length or len(record) != at + size + 4 * total:
    raise ValueError('another length')
  bits = np.frombuffer(record, np.uint8, size, at)
  ends = np.cumsum(lengths)
  starts = np.repeat(ends - lengths, lengths)
  pad = lambda x: np.pad(x, (0, length - total)).astype(np.int32)
  return {
    'tokens': pad(np.frombuffer(record, '<u4', total, at + size)),
    'learned': pad(np.unpackbits(bits, count=total)),
    'tokens_segment_ids': pad(np.repeat(np.arange(count) + 1, lengths)),
    'tokens_positions': pad(np.arange(total) - starts),
  }


class Folder:
  """The finished shards of a folder, and their rows by number.

  Thread-safe. `num_read` counts the rows that were read.
  """

  def __init__(self, path: pathlib.Path):
    """Reads head and index, no shard.

    Raises:
      InputError: there is no such folder, or one of the two is damaged.
    """
    self.path = path
    self.head, self.shards = read_head(path), read_index(path)
    try:
      self.settings: dict[str, Any] = self.head['settings']
      self.rows_per_shard = int(self.head['rows_per_shard'])
      self._length = int(self.settings['seq_len']) + 1
    except (KeyError, TypeError, ValueError) as error:
      raise damaged(path / HEAD, f'no {error}') from error
    self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock, self.num_read = threading.Lock(), 0

  def __len__(self) -> int:
    """Number of rows."""
    return sum(shard.rows for shard in self.shards)

  @property
  def digest(self) -> str:
    """Of settings and shards."""
    marks = [self.head, [shard.sha256 for shard in self.shards]]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()

  def check_sizes(self, start: int, stop: int) -> None:
    """Checks that the shards of rows [start, stop) are there, as large as then.

    Raises:
      InputError: one is not.
    """
    try:
      sizes = {x.name: x.stat().st_size for x in os.scandir(self.path)}
    except OSError as error:
      raise damaged(self.path, error.strerror) from error
    first = start // self.rows_per_shard
    last = min(-(-stop // self.rows_per_shard), len(self.shards))
    for index in range(first, last):
      size, wanted = sizes.get(name(index)), self.shards[index].num_bytes
      if size is None:
        raise damaged(self.path / name(index), 'it is missing')
      if size != wanted:
        why = f'it has {size:,} bytes, not {wanted:,}'
        raise damaged(self.path / name(index), why)

  def read(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Packed rows, in the order of `numbers`.

    Raises:
      InputError: a shard is missing or damaged.
    """
    rows = []
    for number in numbers:
      shard, at = divmod(number, self.rows_per_shard)
      path = self.path / name(shard)
      try:
        with self._lock:
          (record,) = self._reader(shard).read([at])
        rows.append(decode_row(record, number, self._length))
      except (OSError, ValueError, RuntimeError, IndexError) as error:
        why = (str(error).splitlines() or ['unreadable'])[0]
        raise damaged(path, f'row {number}: {why}') from error
      self.num_read += 1
    return rows

  def close(self) -> None:
    """Closes all shards."""
    with self._lock:
      while self._open:
        self._close_oldest()

  def _reader(self, shard: int) -> Any:
    """Of a shard; the last few stay open."""
    if shard not in self._open:
      path = self.path / name(shard)
      path.stat()  # the library's own message of a missing file is long
      self._open[shard] = array_record_module.ArrayRecordReader(
        str(path), options=_READER_OPTIONS
      )
      if len(self._open) > MOST_OPEN:
        self._close_oldest()
    self._open.move_to_end(shard)
    return self._open[shard]

  def _close_oldest(self) -> None:
    _, reader = self._open.popitem(last=False)
    with contextlib.suppress(RuntimeError):  # a damage that `read` has named
      reader.close()


def damaged(path: pathlib.Path, why: Any) -> errors.InputError:
  """The error of a file that is not what `prepare` wrote."""
  return errors.InputError(
    f'data.prepared: {path} is damaged: {why}: run dsv3 prepare again, which '
    'writes what is missing'
  )


def read_head(path: pathlib.Path) -> dict[str, Any]:
  """The object in `prepared.json`.

  Raises:
    InputError: it is missing, damaged or of another format.
  """
  try:
    head = json.loads((path / HEAD).read_text(encoding='utf-8'))
  except OSError as error:
    raise errors.InputError(
      f'data.prepared={str(path)!r}: {HEAD} cannot be read ({error.strerror}): '
      'name a folder that dsv3 prepare wrote'
    ) from error
  except ValueError as error:
    raise damaged(path / HEAD, error) from error
  if not isinstance(head, dict) or head.get('format') != FORMAT:
    raise damaged(path / HEAD, f'its format must be {FORMAT}')
  return head


def read_index(path: pathlib.Path) -> list[Shard]:
  """The finished shards. A last line without its end was never finished.

  Raises:
    InputError: a line is damaged.
  """
  try:
    text = (path / INDEX).read_text(encoding='utf-8')
  except FileNotFoundError:
    return []
  except (OSError, ValueError) as error:
    raise damaged(path / INDEX, error) from error
  shards = []
  for number, line in enumerate(text.split('\n')[:-1], start=1):
    try:
      shard = Shard(**json.loads(line))
      if not (shard.rows > 0 and shard.num_bytes > 0):
        raise ValueError('rows and num_bytes must be > 0')
    except (ValueError, TypeError) as error:
      raise damaged(path / INDEX, f'line {number}: {error}') from error
    shards.append(shard)
  return shards


def file_digest(path: pathlib.Path) -> str:
  """SHA-256 of a file."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
