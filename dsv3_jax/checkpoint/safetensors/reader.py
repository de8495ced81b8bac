"""Folders of safetensors files, read strictly.

Index, headers and files must agree on every tensor. A tensor, or some of its
rows, is read on demand. Nothing is unpickled.

  DIR/model.safetensors.index.json  model-00001-of-00002.safetensors ...
  DIR/model.safetensors

`verify` checks the files against SHA256SUMS, which is in the format of the
sha256sum command.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import threading
from typing import Any

import numpy as np

from dsv3_jax import errors
from dsv3_jax.checkpoint.safetensors import header as shard_header

DTYPES, DTYPE_NAMES = shard_header.DTYPES, shard_header.DTYPE_NAMES
Entry, read_header = shard_header.Entry, shard_header.read_header
_show = shard_header.show

SUFFIX = '.safetensors'
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SUMS = 'SHA256SUMS'
_HASH_PIECE = 4 << 20
_HASH_THREADS = 4
_SUM = re.compile(r'([0-9a-fA-F]{64}) [ *](.{1,1000})')


class Folder:
  """The tensors of a folder; `entries` has them by name. Thread-safe.

  If there is an index, its shards are read and other files ignored. If not,
  the folder's model.safetensors or only .safetensors file is read.

  Raises:
    InputError: a file is missing, unsafe or damaged, or index and headers do
      not agree; names file and tensor.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(directory)
    self._handles: dict[pathlib.Path, int] = {}
    self._lock, self._closed = threading.Lock(), False
    if not os.path.isdir(self.directory):
      raise errors.InputError(f'{self.directory} is not a folder')
    self.entries: dict[str, Entry]
    if os.path.lexists(self.directory / INDEX):
      self.entries = _open_index(self.directory)
    else:
      self.entries = read_header(_only_file(self.directory))

  def __enter__(self) -> 'Folder':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files."""
    with self._lock:
      self._closed = True
      while self._handles:
        os.close(self._handles.popitem()[1])

  def read(self, name: str, rows: slice | None = None) -> np.ndarray:
    """Reads a tensor, or some rows of its first dim, into a new array.

    Args:
      rows: a slice with a step of 1; only its bytes are read.

    Raises:
      InputError: the file was cut or changed since it was opened, or a BOOL
        is neither 0 nor 1.
    """
    entry = self.entries[name]
    shape, offset = entry.shape, entry.offset
    if rows is not None:
      start, stop, step = rows.indices(shape[0])
      assert step == 1, rows
      offset += start * shard_header.num_bytes(entry.dtype, shape[1:])
      shape = (max(stop - start, 0), *shape[1:])
    out = np.empty(shape, DTYPES[entry.dtype])
    if out.size:
      raw = out.reshape(-1).view(np.uint8)
      self._fill(memoryview(raw), entry.path, name, offset)
      if entry.dtype == 'BOOL' and raw.max() > 1:  # undefined for NumPy
        raise errors.InputError(
          f'{entry.path}: tensor {_show(name)} is BOOL, but has a byte '
          f'of {raw.max()}'
        )
    return out

  def _fill(
    self, room: memoryview, path: pathlib.Path, name: str, offset: int
  ) -> None:
    done = 0
    try:
      handle = self._handle(path)
      while done < len(room):
        count = os.preadv(handle, [room[done:]], offset + done)
        if not count:
          raise errors.InputError(
            f'{path}: tensor {_show(name)} is cut: the file became '
            'shorter after it was opened'
          )
        done += count
    except OSError as error:
      raise shard_header.unreadable(path, error) from error

  def _handle(self, path: pathlib.Path) -> int:
    with self._lock:
      assert not self._closed, f'{self.directory} is closed'
      if path not in self._handles:
        self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
      return self._handles[path]

  def verify(self) -> bool:
    """Hashes all files that SHA256SUMS lists; True if there is such a list.

    Raises:
      InputError: a listed file is missing, outside the folder or has another
        digest, or a .safetensors file is not listed.
    """
    path = self.directory / SUMS
    if not os.path.lexists(path):
      return False
    wanted = _read_sums(path)
    for file in sorted(self.directory.glob(f'*{SUFFIX}')):
      if file.name not in wanted:
        raise errors.InputError(
          f'{self.directory}: {_show(file.name)} is not listed in {SUMS}'
        )
    pool = concurrent.futures.ThreadPoolExecutor(_HASH_THREADS, 'sha256')
    try:
      jobs = {
        name: pool.submit(digest, self.directory / name) for name in wanted
      }
      for name, job in jobs.items():
        if job.result() != wanted[name]:
          raise errors.InputError(
            f'{self.directory / name} does not match its sha256 in {SUMS}'
          )
    finally:
      pool.shutdown(cancel_futures=True)
    return True


def _only_file(directory: pathlib.Path) -> pathlib.Path:
  """The only .safetensors file of a folder without an index."""
  if os.path.lexists(directory / SINGLE):
    return directory / SINGLE
  names = sorted(path.name for path in directory.glob(f'*{SUFFIX}'))
  if len(names) != 1:
    raise errors.InputError(
      f'{directory} has {len(names)} {SUFFIX} files: it must hold {INDEX}, or '
      f'{SINGLE}, or one file of any name'
    )
  if not _is_shard(names[0]):
    raise errors.InputError(f'{directory}: {_show(names[0])} is no plain name')
  return directory / names[0]


def _open_index(directory: pathlib.Path) -> dict[str, Entry]:
  """All tensors of all shards; checks that index and headers agree."""
  where = directory / INDEX
  shard_of = _read_map(where)
  if os.path.lexists(directory / SINGLE) and SINGLE not in shard_of.values():
    raise errors.InputError(
      f'{directory} has {INDEX} and {SINGLE}: remove one of them'
    )
  entries: dict[str, Entry] = {}
  for shard in sorted(set(shard_of.values())):
    path = directory / shard
    for name, entry in read_header(path).items():
      listed = shard_of.get(name)
      if listed != shard:
        why = (
          'not in the index' if listed is None else f'in {listed} by the index'
        )
        raise errors.InputError(f'{path}: tensor {_show(name)} is {why}')
      entries[name] = entry
  for name, shard in shard_of.items():
    if name not in entries:
      raise errors.InputError(
        f'{where}: tensor {_show(name)} is not in {shard}'
      )
  return entries


def _read_map(path: pathlib.Path) -> dict[str, str]:
  """The index's weight_map: tensor -> name of its file, checked."""
  body = read_json(path)
  if body.get('metadata') is not None:
    shard_header.as_object(body['metadata'], str(path), 'metadata')
  shard_of = shard_header.as_object(
    body.get('weight_map'), str(path), 'weight_map'
  )
  for name, shard in shard_of.items():
    if not _is_shard(shard):
      raise errors.InputError(
        f'{path}: tensor {_show(name)} is in {_show(shard)}, which must be '
        f'the plain name of a {SUFFIX} file'
      )
  return shard_of


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file, as strictly as a header.

  The caller checks nested objects with `shard_header.as_object`.

  Raises:
    InputError: it cannot be read, is too large, or is no object.
  """
  body = shard_header.parse(read_bytes(path), str(path))
  return shard_header.as_object(body, str(path), 'it')


def _is_shard(name: Any) -> bool:
  """True for the name of a shard that cannot be outside the folder."""
  return (
    isinstance(name, str)
    and name.endswith(SUFFIX)
    and len(name) < 256  # the limit of file systems
    and name.isprintable()
    and not any(part in name for part in ('/', '\\', '..'))
  )


def read_bytes(path: pathlib.Path) -> bytes:
  """Reads a file of bounded size.

  Raises:
    InputError: it cannot be read, or is too large.
  """
  with shard_header.opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > shard_header.MOST_JSON:
      raise errors.InputError(
        f'{path} has {size} bytes, more than {shard_header.MOST_JSON}'
      )
    return file.read(size)


def _read_sums(path: pathlib.Path) -> dict[str, str]:
  """File -> digest, from lines in the format of sha256sum."""
  try:
    lines = read_bytes(path).decode('utf-8').removesuffix('\n').split('\n')
  except UnicodeDecodeError as error:
    raise errors.InputError(f'{path} is not UTF-8: {error.reason}') from error
  wanted: dict[str, str] = {}
  for number, line in enumerate(lines, start=1):
    match = _SUM.fullmatch(line)
    if match is None or not line.isprintable():
      raise errors.InputError(
        f"{path}:{number} must be a sha256, two spaces and a file's name"
      )
    file = pathlib.PurePosixPath(match[2])
    if file.is_absolute() or '..' in file.parts or str(file) in wanted:
      raise errors.InputError(
        f'{path}:{number}: {_show(match[2])} is outside the folder or there '
        'twice'
      )
    wanted[str(file)] = match[1].lower()
  return wanted


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file, streamed.

  Raises:
    InputError: it cannot be read.
  """
  total, room = hashlib.sha256(), memoryview(bytearray(_HASH_PIECE))
  with shard_header.opened(pathlib.Path(path)) as file:
    while count := file.readinto(room):
      total.update(room[:count])
  return total.hexdigest()
