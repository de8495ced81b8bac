"""Documents in .jsonl, .txt and .parquet files, read by index.

A document is a .txt file, a line of a .jsonl file or a row of a .parquet file.
The first two may be compressed (.gz, .zst) and start with a byte order mark.
All are checked when they are opened (`scan`). Only places of records are in
memory; text is read on demand.
"""

import bisect
import functools
import glob
import hashlib
import itertools
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

from dsv3_jax import errors
from dsv3_jax.data import chat, records, scan

_CODECS = {'.gz': 'gzip', '.zst': 'zstd'}
_CHUNK = 1 << 20  # bytes
LARGE_GROUP = 64 << 20  # bytes of the column, of a Parquet row group


def open_glob(
  pattern: str, text_key: str, cache: pathlib.Path
) -> 'FileRecords':
  """Opens and checks all files that match, in order of their names.

  Args:
    cache: a folder that remembers checked files.

  Raises:
    InputError: nothing matches; a file has another suffix, cannot be read, or
      is Parquet without the column. Bad records raise nothing: see `faults`.
  """
  paths = [pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
  paths = [path for path in paths if not path.is_dir()]
  if not paths:
    raise errors.InputError(
      f"data.source={pattern!r} matches no file: name 'stdlib', 'tfds:NAME' "
      'or a glob of .jsonl, .txt or .parquet files'
    )
  for path in paths:
    if not path.is_file():
      raise errors.InputError(
        f'{scan.show(path)} is not a file: a broken link, perhaps'
      )
  kinds = [_kind(path) for path in paths]
  memory = scan.Memory(cache, text_key)
  scans = [
    _remembered(memory, path, codec)
    for path, (_, codec) in zip(paths, kinds, strict=True)
  ]
  total = sum(
    scan.size(path)
    for path, known in zip(paths, scans, strict=True)
    if known is None
  )
  progress, parts = scan.Progress(total), []
  for path, (kind, codec), known in zip(paths, kinds, scans, strict=True):
    if known is None:
      check = functools.partial(kind.check, text_key=text_key)
      known = memory.scan(path, codec, check, progress)
    content = memory.content_path(known) if codec else path
    parts.append(kind(path, content, known, text_key))
  # Names, which decide what is held out, do not change if the folder moves.
  fixed = re.split(r'[*?[]', pattern)[0]
  root = pathlib.Path(fixed if fixed == pattern else fixed + 'x').parent
  return FileRecords(parts, root)


def _remembered(
  memory: scan.Memory, path: pathlib.Path, codec: str | None
) -> scan.FileScan | None:
  """A file's scan, if it is unchanged and its unpacked copy is there."""
  known = memory.load(path)
  if known is None or codec is None or not known.spans.size:
    return known
  content = memory.content_path(known)
  same = content.is_file() and content.stat().st_size == known.num_bytes
  return known if same else None


def _kind(path: pathlib.Path) -> tuple[Any, str | None]:
  """Class and codec, by suffix."""
  kinds = {'.jsonl': _Jsonl, '.txt': _Text, '.parquet': _Parquet}
  codec = _CODECS.get(path.suffix)
  suffix = path.with_suffix('').suffix if codec else path.suffix
  if suffix not in kinds or (codec and suffix == '.parquet'):
    packed = ', '.join(f'{a}{b}' for a in ('.jsonl', '.txt') for b in _CODECS)
    raise errors.InputError(
      f'{scan.show(path)} must end in one of: {", ".join(kinds)}, {packed}'
    )
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise errors.InputError(
      f'{scan.show(path)}: the name of the file is not UTF-8: rename it'
    ) from error
  return kinds[suffix], codec


class FileRecords(Sequence):
  """The good records of several files as one sequence."""

  def __init__(self, parts: list[Any], root: pathlib.Path):
    self._parts = parts
    self._ends = list(itertools.accumulate(len(part) for part in parts))
    self._names = [_file_name(part, root) for part in parts]

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, i: int) -> tuple[int, int]:
    """Which part, and which of its good records."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    at = bisect.bisect_right(self._ends, i)
    return at, i - (self._ends[at - 1] if at else 0)

  def name(self, i: int) -> str:
    """`path#row`. Bad rows count, so that a repair changes no other's name."""
    at, i = self._find(i)
    return f'{self._names[at]}#{self._parts[at].scan.spans[0, i]}'

  def place(self, i: int) -> str:
    """`path:line`, `path#row`, or the path of a text."""
    at, i = self._find(i)
    return scan.show(self._parts[at].path) + self._parts[at].place(i)

  def fingerprint(self) -> str:
    """A digest of the files' names and contents, and of which rows are good."""
    rows = lambda x: hashlib.sha256(x.spans[0].tobytes()).hexdigest()
    marks = [
      (name, p.scan.digest, p.scan.num_bad and rows(p.scan))
      for name, p in zip(self._names, self._parts, strict=True)
    ]
    return 'content:' + hashlib.sha256(repr(marks).encode()).hexdigest()

  def size_fingerprint(self) -> str:
    """That of release 0.2, of names and sizes; '' if that read other text."""
    for part in self._parts:
      is_bom_new = isinstance(part, _Text) and part.scan.has_bom
      if part.scan.num_bad or is_bom_new or part.path != part.content:
        return ''
    sizes = [
      (name, scan.size(part.path))
      for name, part in zip(self._names, self._parts, strict=True)
    ]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()

  @property
  def num_bad(self) -> int:
    """How many records were left out."""
    return sum(part.scan.num_bad for part in self._parts)

  def faults(self) -> list[str]:
    """`path:line: reason` of these, for at most 10,000 of a file."""
    return [
      f'{scan.show(part.path)}{place}: {reason}'
      for part in self._parts
      for place, reason in part.scan.faults
    ]

  def tool_turns(self) -> str:
    """The first place with a turn of a tool; '' if there is none."""
    places = (scan.show(p.path) + p.scan.tools for p in self._parts
              if p.scan.tools)  # fmt: skip
    return next(places, '')

  def __getitem__(self, i: int) -> dict[str, Any]:
    at, row = self._find(i)
    return {'name': self.name(i), **self._parts[at].read(row)}


def _file_name(part: Any, root: pathlib.Path) -> str:
  """The path relative to the glob's fixed folder, as if not compressed."""
  name = part.path.relative_to(root).as_posix()
  return name if part.path == part.content else name.rpartition('.')[0]


class _Part:
  """The good records of one file; `content` is the file itself or unpacked."""

  def __init__(
    self,
    path: pathlib.Path,
    content: pathlib.Path,
    file_scan: scan.FileScan,
    text_key: str,
  ):
    self.path, self.content, self.scan = path, content, file_scan
    self.key = text_key

  def __len__(self) -> int:
    return self.scan.spans.shape[1]

  def place(self, i: int) -> str:
    """`:line` of JSONL, `#row` of Parquet, '' of a text."""
    row, *line = self.scan.spans[:2, i].tolist()
    return f':{line[0]}' if line else f'#{row}'

  def changed(self, place: str, why: Any) -> errors.InputError:
    """The error of a record that was good when it was checked."""
    return errors.InputError(
      f'{scan.show(self.path)}{place}: {why}: the file changed after it was '
      'checked'
    )


class _Text(_Part):
  """One document."""

  @staticmethod
  def check(path: pathlib.Path, out: scan.Builder, text_key: str) -> None:
    data = path.read_bytes()
    out.content(data)
    out.has_bom = data.startswith(scan.BOM)
    try:
      records.from_text(data)
      out.good(0)
    except errors.InputError as error:
      out.bad('', str(error))

  def place(self, i: int) -> str:
    return ''

  def read(self, i: int) -> dict[str, Any]:
    try:
      data = self.content.read_bytes()
      return records.from_text(data.removeprefix(scan.BOM))
    except (OSError, errors.InputError) as error:
      raise self.changed('', error) from error


class _Jsonl(_Part):
  """One JSON object a line: a text, or a conversation in 'messages'."""

  @staticmethod
  def check(path: pathlib.Path, out: scan.Builder, text_key: str) -> None:
    offset = row = 0
    with open(path, 'rb') as lines:
      for number, line in enumerate(lines, start=1):
        out.content(line)
        body = line.removeprefix(scan.BOM) if number == 1 else line
        start, offset = offset + len(line) - len(body), offset + len(line)
        if not body or body.isspace():
          continue
        try:
          record = records.from_json(body, text_key)
        except errors.InputError as error:
          out.bad(f':{number}', str(error))
        else:
          out.good(row, number, start, len(body))
          _note_tools(out, f':{number}', record)
        row += 1

  def read(self, i: int) -> dict[str, Any]:
    _, number, offset, length = self.scan.spans[:, i].tolist()
    try:
      with open(self.content, 'rb') as file:
        file.seek(offset)
        return records.from_json(file.read(length), self.key)
    except (OSError, errors.InputError) as error:
      raise self.changed(f':{number}', error) from error


class _Parquet(_Part):
  """One column: strings, or conversations as lists of structs."""

  @staticmethod
  def check(path: pathlib.Path, out: scan.Builder, text_key: str) -> None:
    with open(path, 'rb') as file:
      while data := file.read(_CHUNK):
        out.content(data)
    try:
      file = parquet.ParquetFile(path)
      key = _column(file, path, text_key)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      out.bad('', f'not a Parquet file: {scan.damage(error)}')
      return
    start = largest = 0
    for group in range(file.num_row_groups):
      out.content(b'')  # shows progress
      size = file.metadata.row_group(group).num_rows
      try:
        column = file.read_row_group(group, columns=[key])[key]
      except (pyarrow.ArrowException, OSError) as error:
        rows = f'rows {start} to {start + size - 1}'
        why = f'{rows} cannot be read: {scan.damage(error)}'
        out.bad(f'#{start}', why, size)
      else:
        largest = max(largest, column.nbytes)
        _scan_column(column, start, (key, text_key), out)
      start += size
    _warn_of_large_group(path, largest)

  def read(self, i: int) -> dict[str, Any]:
    row = int(self.scan.spans[0, i])
    try:
      args = (self.path, self.scan.digest, self.key)
      _, key, ends = _parquet_groups(*args)
      group = bisect.bisect_right(ends, row)
      start = ends[group - 1] if group else 0
      value = _read_group(*args, group)[row - start].as_py()
      return records.from_value(value, key, self.key)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
      raise self.changed(f'#{row}', scan.first_line(error)) from error


# Random access comes back to files and row groups. A corpus may have thousands
# of files: none stays open, and few row groups of all of them are in memory.
@functools.lru_cache(maxsize=64)
def _parquet_groups(
  path: pathlib.Path, digest: str, text_key: str
) -> tuple[Any, str, list[int]]:
  """The metadata, the column, and where the row groups end.

  Args:
    digest: of the file, so that a later one of its name is another.
  """
  with parquet.ParquetFile(path) as file:
    meta, key = file.metadata, _column(file, path, text_key)
  counts = (meta.row_group(g).num_rows for g in range(meta.num_row_groups))
  return meta, key, list(itertools.accumulate(counts))


@functools.lru_cache(maxsize=4)
def _read_group(
  path: pathlib.Path, digest: str, text_key: str, group: int
) -> Any:
  meta, key, _ = _parquet_groups(path, digest, text_key)
  with parquet.ParquetFile(path, metadata=meta) as file:
    return file.read_row_group(group, columns=[key])[key]


def _column(file: Any, path: pathlib.Path, text_key: str) -> str:
  """`data.text_key`, or 'messages' where there is no such column."""
  names = file.schema_arrow.names
  for key in (text_key, 'messages'):
    if names.count(key) == 1:
      return key
  known = ', '.join(chat.short(name) for name in names)
  raise errors.InputError(
    f'{scan.show(path)} has no column {text_key!r}; it has: {known}'
  )


def _warn_of_large_group(path: pathlib.Path, size: int) -> None:
  """Says that shuffled reads will be slow, if a row group is large."""
  if size > LARGE_GROUP:
    print(
      f'{scan.show(path)}: to read a record, a row group of up to '
      f'{size / 1e6:.0f} MB is decoded: write the file with fewer rows a group '
      '(1,000 are fast)',
      file=sys.stderr,
      flush=True,
    )


def _scan_column(
  column: Any, start: int, keys: tuple[str, str], out: scan.Builder
) -> None:
  """Adds the rows of one row group, the first of which is `start`.

  `keys` are the column's name and `data.text_key`.
  """
  is_text = pyarrow.types.is_string(column.type)
  is_text |= pyarrow.types.is_large_string(column.type)
  if is_text and keys[0] == keys[1] and not column.null_count:
    try:
      column.validate(full=True)
    except pyarrow.ArrowException:
      pass  # some text is not UTF-8: row by row
    else:
      for row in range(start, start + len(column)):
        out.good(row)
      return
  for row, value in enumerate(column, start=start):
    try:
      record = records.from_value(value.as_py(), *keys)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
      not_unicode = isinstance(error, UnicodeDecodeError)
      out.bad(f'#{row}', 'not UTF-8' if not_unicode else scan.first_line(error))
    else:
      out.good(row)
      _note_tools(out, f'#{row}', record)


def _note_tools(out: scan.Builder, place: str, record: dict[str, Any]) -> None:
  turns = record.get('messages')
  if turns and not out.tools and chat.has_tools(turns):
    out.tools = place
