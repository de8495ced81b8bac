"""Documents in .jsonl, .txt and .parquet files, read by index.

A document is a .txt file, a line of a .jsonl file or a row of a .parquet file.
Only offsets of lines and counts of rows are in memory; text is read on demand.
"""

import bisect
import functools
import glob
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

from dsv3_jax import errors


def open_glob(pattern: str, text_key: str) -> 'FileRecords':
  """Opens all files that match, in order of their names.

  Raises:
    InputError: nothing matches, or a file has another suffix.
  """
  paths = [pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise errors.InputError(
      f"data.source={pattern!r} matches no file: name 'stdlib', 'tfds:NAME' "
      'or a glob of .jsonl, .txt or .parquet files'
    )
  kinds = {'.jsonl': _Jsonl, '.txt': _Text, '.parquet': _Parquet}
  for path in paths:
    if path.suffix not in kinds:
      raise errors.InputError(f'{path} must end in one of: {", ".join(kinds)}')
  # Names, which decide what is held out, do not change if the folder moves.
  fixed = re.split(r'[*?[]', pattern)[0]
  root = pathlib.Path(fixed if fixed == pattern else fixed + 'x').parent
  parts = [kinds[path.suffix](path, text_key) for path in paths]
  return FileRecords(parts, root)


class FileRecords(Sequence):
  """The records of several files as one sequence."""

  def __init__(self, parts: list[Any], root: pathlib.Path):
    self._parts, self._root = parts, root
    self._ends = list(itertools.accumulate(len(part) for part in parts))

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, i: int) -> tuple[Any, int]:
    if not 0 <= i < len(self):
      raise IndexError(i)
    at = bisect.bisect_right(self._ends, i)
    return self._parts[at], i - (self._ends[at - 1] if at else 0)

  def name(self, i: int) -> str:
    """`path#row`, the path relative to the glob's fixed folder."""
    part, row = self._find(i)
    return f'{part.path.relative_to(self._root).as_posix()}#{row}'

  def fingerprint(self) -> str:
    """A digest of the files' names and sizes [bytes]."""
    sizes = [
      (part.path.relative_to(self._root).as_posix(), part.path.stat().st_size)
      for part in self._parts
    ]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()

  def __getitem__(self, i: int) -> dict[str, Any]:
    part, row = self._find(i)
    return {'name': self.name(i), **part.read(row)}


class _Text:
  """One document."""

  def __init__(self, path: pathlib.Path, text_key: str):
    self.path = path

  def __len__(self) -> int:
    return 1

  def read(self, row: int) -> dict[str, str]:
    try:
      return {'text': self.path.read_text(encoding='utf-8')}
    except UnicodeDecodeError as error:
      raise errors.InputError(
        f'{self.path} is not UTF-8: {error.reason}'
      ) from error


class _Jsonl:
  """One JSON object a line: a text, or a conversation in 'messages'."""

  def __init__(self, path: pathlib.Path, text_key: str):
    self.path, self._key = path, text_key
    self._spans = []  # (line number, offset, length)
    offset = 0
    with open(path, 'rb') as lines:
      for number, line in enumerate(lines, start=1):
        if line.strip():
          self._spans.append((number, offset, len(line)))
        offset += len(line)

  def __len__(self) -> int:
    return len(self._spans)

  def read(self, row: int) -> dict[str, Any]:
    number, offset, length = self._spans[row]
    with open(self.path, 'rb') as file:
      file.seek(offset)
      data = file.read(length)
    where = f'{self.path}:{number}'
    try:
      record = json.loads(data.decode())
    except UnicodeDecodeError as error:
      raise errors.InputError(
        f'{where} is not UTF-8: {error.reason}'
      ) from error
    except json.JSONDecodeError as error:
      raise errors.InputError(f'{where} is not JSON: {error.msg}') from error
    if not isinstance(record, dict):
      raise errors.InputError(f'{where} must be a JSON object')
    if 'messages' in record:
      return {'messages': _messages(record['messages'], where)}
    return {'text': _field(record, self._key, where)}


class _Parquet:
  """One column of strings."""

  def __init__(self, path: pathlib.Path, text_key: str):
    self.path, self._key = path, text_key
    try:
      self._file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
      why = str(error).splitlines()[0]
      raise errors.InputError(f'{path} is no Parquet file: {why}') from error
    names = self._file.schema_arrow.names
    if text_key not in names:
      raise errors.InputError(
        f'{path} has no column {text_key!r}; it has: {", ".join(names)}'
      )
    meta = self._file.metadata
    counts = (meta.row_group(g).num_rows for g in range(meta.num_row_groups))
    self._ends = list(itertools.accumulate(counts))
    # Random access visits the same row group many times: a few are cached.
    self._group = functools.lru_cache(maxsize=4)(self._read_group)

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def _read_group(self, group: int) -> Any:
    return self._file.read_row_group(group, columns=[self._key])[self._key]

  def read(self, row: int) -> dict[str, str]:
    group = bisect.bisect_right(self._ends, row)
    start = self._ends[group - 1] if group else 0
    value = self._group(group)[row - start].as_py()
    return {'text': _field({self._key: value}, self._key, f'{self.path}#{row}')}


def _messages(turns: Any, where: str) -> list[dict[str, str]]:
  """A conversation's turns, checked.

  Raises:
    InputError: not a list of turns with role and content; names the place.
  """
  roles = ('system', 'user', 'assistant')
  if not isinstance(turns, list) or not turns:
    raise errors.InputError(f'{where}: messages must be a list of turns')
  for i, turn in enumerate(turns):
    whole = isinstance(turn, dict) and isinstance(turn.get('content'), str)
    if not whole or turn.get('role') not in roles:
      raise errors.InputError(
        f"{where}: messages[{i}] must have a 'role' ({', '.join(roles)}) and "
        "a string in 'content'"
      )
  return turns


def _field(record: dict[str, Any], key: str, where: str) -> str:
  """The string at `key`.

  Raises:
    InputError: it is missing or not a string; names the place.
  """
  value = record.get(key)
  if not isinstance(value, str):
    known = ', '.join(map(str, record))
    raise errors.InputError(
      f'{where} must have a string in data.text_key={key!r}; it has: {known}'
    )
  return value
