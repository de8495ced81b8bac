"""Checks of whole files: what is in them, remembered from start to start.

A file is read once, before training. The result (a digest of its content, where
its records are, which are bad) is kept in `data.cache_dir`, and holds as long
as the file's path, size and time of change do. A compressed file is unpacked
into the same folder, as its records are read in any order.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow

from dsv3_jax import errors

BOM = b'\xef\xbb\xbf'
_RULES = 1  # of records: another number, and every file is checked anew
_MOST_FAULTS = 10_000  # of a file, that are described
_CHUNK = 1 << 20  # bytes
QUIET_SECONDS = 10.0  # between two lines of progress
_STALE_SECONDS = 86_400.0  # since the last write of a process that is gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileScan:
  """What a file holds.

  digest: SHA-256 of the content, unpacked. num_bytes: of the same. num_bad: how
  many records are bad. faults: (place, reason) of the first of these; a place
  is ':line', '#row', or '' for the whole file. tools: place of the first
  turn of a tool. has_bom: it starts with a byte order mark. spans: int64
  [1 or 4, records], each good record's row (bad ones count), and in JSONL its
  line, offset and length [bytes].
  """

  digest: str
  num_bytes: int
  num_bad: int
  faults: tuple[tuple[str, str], ...]
  tools: str
  has_bom: bool
  spans: np.ndarray


class Builder:
  """Collects a `FileScan`."""

  def __init__(self, progress: Callable[[int], None]):
    self._progress, self._hash = progress, hashlib.sha256()
    self._num_bytes, self._num_bad, self._faults = 0, 0, []
    self._spans, self._width = array.array('q'), 1
    self.tools, self.has_bom = '', False

  def content(self, data: bytes) -> None:
    """Adds the next bytes of the content."""
    self._hash.update(data)
    self._num_bytes += len(data)
    self._progress(len(data))

  def good(self, *span: int) -> None:
    """Adds a record: its row, or row, line, offset and length."""
    self._spans.extend(span)
    self._width = len(span)

  def bad(self, place: str, reason: str, num_records: int = 1) -> None:
    """Adds one or more bad records."""
    self._num_bad += num_records
    if len(self._faults) < _MOST_FAULTS:
      self._faults.append((place, reason))

  def build(self) -> FileScan:
    """The scan of what was added."""
    flat = np.array(self._spans, np.int64)
    return FileScan(
      digest=self._hash.hexdigest(),
      num_bytes=self._num_bytes,
      num_bad=self._num_bad,
      faults=tuple(self._faults),
      tools=self.tools,
      has_bom=self.has_bom,
      spans=flat.reshape(-1, self._width).T.copy(),
    )


class Progress:
  """Now and then a line on stderr: how much is checked, what is left."""

  def __init__(self, total: int):
    """Args: total: of the files to check [bytes]."""
    self._total, self._done = total, 0
    self._start = self._last = time.monotonic()

  def add(self, num_bytes: int) -> None:
    """Counts bytes that have been read."""
    self._done += num_bytes
    now = time.monotonic()
    if now - self._last < QUIET_SECONDS:
      return
    self._last = now
    rate = self._done / max(now - self._start, 1e-9)
    left = max(0, self._total - self._done) / max(rate, 1e-9)
    print(
      f'checking data.source: {self._done / 1e9:.1f} of '
      f'{self._total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, '
      f'{left / 60:.0f} min left',
      file=sys.stderr,
      flush=True,
    )


class Memory:
  """The scans and unpacked files of a cache folder, for one `data.text_key`."""

  def __init__(self, folder: pathlib.Path, text_key: str):
    self._scans, self._unpacked = folder / 'scans', folder / 'unpacked'
    self._folder, self._text_key, self._warned = folder, text_key, False

  def content_path(self, scan: FileScan) -> pathlib.Path:
    """Where the unpacked content of a compressed file is."""
    return self._unpacked / scan.digest

  def load(self, path: pathlib.Path) -> FileScan | None:
    """The scan of an unchanged file; None if none is there or it is damaged."""
    try:
      head, _, body = self._place(path).read_bytes().partition(b'\n')
      fields = json.loads(head)
      if fields.pop('body') != hashlib.sha256(body).hexdigest():
        return None
      if fields.pop('stamp') != _stamp(path.stat()):
        return None
      spans = np.frombuffer(body, np.int64).reshape(fields.pop('shape'))
      faults = tuple((place, reason) for place, reason in fields.pop('faults'))
      return FileScan(spans=spans, faults=faults, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return None

  def save(self, path: pathlib.Path, stamp: list[int], scan: FileScan) -> None:
    """Keeps a scan; if that fails, says so once and goes on."""
    body, fields = scan.spans.tobytes(), dict(vars(scan))
    del fields['spans']
    fields |= {'stamp': stamp, 'shape': scan.spans.shape}
    fields['body'] = hashlib.sha256(body).hexdigest()
    try:
      self._scans.mkdir(parents=True, exist_ok=True)
      with _scratch(self._scans) as scratch:
        scratch.write_bytes(json.dumps(fields).encode() + b'\n' + body)
        scratch.replace(self._place(path))
    except OSError as error:
      if not self._warned:
        print(
          f'data.cache_dir: {self._folder} cannot be written '
          f'({error.strerror}): the next start checks all files again',
          file=sys.stderr,
          flush=True,
        )
      self._warned = True

  def _place(self, path: pathlib.Path) -> pathlib.Path:
    key = (_RULES, str(path.absolute()), self._text_key)
    return self._scans / hashlib.sha256(repr(key).encode()).hexdigest()[:32]

  def scan(
    self,
    path: pathlib.Path,
    codec: str | None,
    read: Callable[[pathlib.Path, Builder], None],
    progress: Progress,
  ) -> FileScan:
    """Checks a file, and keeps the result.

    Args:
      codec: 'gzip' or 'zstd' of a compressed file.
      read: adds the records of a path to a builder.

    Raises:
      InputError: the file cannot be read or changes meanwhile; or it is
        compressed and the cache cannot be written.
    """
    try:
      stamp = _stamp(path.stat())
      if codec is None:
        builder = Builder(progress.add)
        read(path, builder)
        scan = builder.build()
      else:
        scan = self._scan_packed(path, codec, read, progress)
      same = _stamp(path.stat()) == stamp
    except OSError as error:
      raise _unreadable(path, error) from error
    if not same:
      raise errors.InputError(
        f'{show(path)}: changed while it was checked: start again when it is '
        'complete'
      )
    self.save(path, stamp, scan)
    return scan

  def _scan_packed(self, path, codec, read, progress) -> FileScan:
    # What is counted is the bytes of `path`, while they are unpacked.
    builder = Builder(lambda num_bytes: progress.add(0))
    with _scratch(self._unpacked) as scratch:
      try:
        self._unpack(path, codec, scratch, progress)
      except pyarrow.ArrowException as error:
        with path.open('rb') as packed:
          while data := packed.read(_CHUNK):
            builder.content(data)
        builder.bad('', f'cannot be unpacked: {first_line(error)}')
        return builder.build()
      read(scratch, builder)
      scan = builder.build()
      scratch.replace(self.content_path(scan))
      return scan

  def _unpack(self, path, codec, scratch, progress) -> None:
    try:
      scratch.parent.mkdir(parents=True, exist_ok=True)
      _remove_stale(scratch.parent)
      with scratch.open('wb') as target:
        for chunk in _chunks(path, codec, progress):
          target.write(chunk)
    except OSError as error:
      raise errors.InputError(
        f'data.cache_dir: {self._folder} cannot be written ({error.strerror}), '
        'where compressed files are unpacked: name another'
      ) from error


@contextlib.contextmanager
def _scratch(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name that no other process uses, on any machine; removed at the end."""
  path = folder / f'.{uuid.uuid4().hex}'
  try:
    yield path
  finally:
    with contextlib.suppress(OSError):
      path.unlink()


def _remove_stale(folder: pathlib.Path) -> None:
  """Removes what processes that were killed left."""
  for path in folder.glob('.*'):
    with contextlib.suppress(OSError):
      if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
        path.unlink()


def show(path: pathlib.Path) -> str:
  """A path in one line."""
  text = str(path)
  return text if text.isprintable() else ascii(text)


def size(path: pathlib.Path) -> int:
  """Of a file [bytes].

  Raises:
    InputError: it cannot be read.
  """
  try:
    return path.stat().st_size
  except OSError as error:
    raise _unreadable(path, error) from error


def first_line(error: Exception) -> str:
  """The first line of an error, without control characters."""
  line = (str(error).splitlines() or [type(error).__name__])[0]
  return line if line.isprintable() else ascii(line)


def damage(error: Exception) -> str:
  """What Arrow says of a damaged file.

  Raises:
    OSError: the same, if the operating system could not read the file: it may
      be able to at the next start.
  """
  if isinstance(error, OSError) and error.errno:
    raise error
  return first_line(error)


def _stamp(stat: os.stat_result) -> list[int]:
  """What tells a file from a changed one, without reading it."""
  return [stat.st_size, stat.st_mtime_ns]


def _chunks(
  path: pathlib.Path, codec: str, progress: Progress
) -> Iterator[bytes]:
  """The content of a compressed file, piece by piece.

  Raises:
    ArrowException: it is damaged.
    InputError: it cannot be read.
  """
  try:
    packed = pyarrow.OSFile(str(path))
  except OSError as error:
    raise _unreadable(path, error) from error
  with packed:
    source, done = pyarrow.CompressedInputStream(packed, codec), 0
    while True:
      try:
        chunk = source.read(_CHUNK)
      except OSError as error:
        if error.errno:
          raise _unreadable(path, error) from error
        raise pyarrow.ArrowException(str(error)) from error
      progress.add(packed.tell() - done)
      done = packed.tell()
      if not chunk:
        return
      yield chunk


def _unreadable(path: pathlib.Path, error: OSError) -> errors.InputError:
  why = error.strerror or error
  return errors.InputError(f'{show(path)}: cannot be read: {why}')
