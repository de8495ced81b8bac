"""Writes safetensors files, planned from shapes alone and filled in place.

A file has its full size from the start. Blocks of rows are written in any order
and from any thread, so that no tensor has to be in memory as a whole.
"""

import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Iterable

import numpy as np

from dsv3_jax import errors
from dsv3_jax.checkpoint.safetensors import header as shard_header
from dsv3_jax.checkpoint.safetensors import reader as shards

_ALIGN = 8  # bytes; of the widest dtype


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """A tensor to write; `dtype` is a key of `shards.DTYPES`."""

  name: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Size [bytes]."""
    return shard_header.num_bytes(self.dtype, self.shape)

  @property
  def num_rows(self) -> int:
    """Size of the first dim; a scalar is one row."""
    return self.shape[0] if self.shape else 1

  @property
  def row_bytes(self) -> int:
    """Size of one row [bytes]."""
    return shard_header.num_bytes(self.dtype, self.shape[1:])


def plan_shards(
  specs: Iterable[TensorSpec], shard_bytes: int
) -> list[list[TensorSpec]]:
  """Assigns tensors to files, in order; a tensor is never split.

  Args:
    shard_bytes: maximum bytes of tensors in a file, unless one tensor has more.

  Raises:
    InputError: shard_bytes is not > 0.
  """
  if shard_bytes <= 0:
    raise errors.InputError(f'shard_bytes={shard_bytes} must be > 0')
  planned: list[list[TensorSpec]] = []
  room = -1
  for spec in specs:
    if not planned or spec.nbytes > room:
      planned.append([])
      room = shard_bytes
    planned[-1].append(spec)
    room -= spec.nbytes
  return planned


def shard_names(count: int) -> list[str]:
  """Names of `count` files, as in the published checkpoint."""
  if count == 1:
    return [shards.SINGLE]
  return [
    f'model-{i:05d}-of-{count:05d}{shards.SUFFIX}' for i in range(1, count + 1)
  ]


class ShardWriter:
  """Writes one file, block by block; replaces a file of that name.

  Tensors are ordered from the widest dtype to the narrowest, as by the
  safetensors package, which aligns each tensor to its dtype.

  Raises:
    OSError: the file cannot be written.
  """

  def __init__(self, path: str | os.PathLike, specs: Iterable[TensorSpec]):
    self.path = pathlib.Path(path)
    specs = sorted(specs, key=lambda s: -shards.DTYPES[s.dtype].itemsize)
    self._specs = {spec.name: spec for spec in specs}
    assert len(self._specs) == len(specs), 'a tensor is there twice'
    assert shard_header.METADATA not in self._specs and '' not in self._specs
    header, self._offsets, size = _layout(specs)
    # Spans of rows that were written, by tensor.
    self._spans = {spec.name: [] for spec in specs}
    self._lock = threading.Lock()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    self._handle: int | None = os.open(self.path, flags, 0o666)
    try:
      self._put(memoryview(header), 0)
      os.truncate(self._handle, size)
    except BaseException:
      self._release()
      raise

  def __enter__(self) -> 'ShardWriter':
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.close()
    else:  # the file is incomplete: show the error that caused it
      self._release()

  def write(self, name: str, start_row: int, array: np.ndarray) -> None:
    """Writes rows of a tensor, from `start_row`; every row once.

    Args:
      array: C-contiguous, of the tensor's dtype and row shape.

    Raises:
      OSError: for example if the disk is full.
    """
    spec = self._specs[name]
    rows = array.shape[0] if array.shape else 1
    assert array.dtype == shards.DTYPES[spec.dtype], (name, array.dtype)
    assert array.ndim == len(spec.shape), (name, array.shape)
    assert array.shape[1:] == spec.shape[1:], (name, array.shape)
    assert 0 <= start_row <= spec.num_rows - rows, (name, start_row, rows)
    assert array.flags.c_contiguous, name
    if array.size:
      raw = memoryview(array.reshape(-1).view(np.uint8))
      self._put(raw, self._offsets[name] + start_row * spec.row_bytes)
    with self._lock:
      self._spans[name].append((start_row, start_row + rows))

  def close(self) -> None:
    """Checks that every row was written exactly once; closes the file."""
    if self._handle is None:
      return
    try:
      for name, spans in self._spans.items():
        _check_whole(self._specs[name], spans)
    finally:
      self._release()

  def _put(self, raw: memoryview, offset: int) -> None:
    assert self._handle is not None, f'{self.path} is closed'
    while raw:  # one call writes at most 2 GB
      count = os.pwrite(self._handle, raw, offset)
      raw, offset = raw[count:], offset + count

  def _release(self) -> None:
    handle, self._handle = self._handle, None
    if handle is not None:
      os.close(handle)


def _layout(specs: list[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
  """The header with its length, tensor offsets, and the file's size."""
  body: dict = {shard_header.METADATA: {'format': 'pt'}}
  starts, end = {}, 0
  for spec in specs:
    starts[spec.name] = end
    end += spec.nbytes
    body[spec.name] = {
      'dtype': spec.dtype,
      'shape': list(spec.shape),
      'data_offsets': [starts[spec.name], end],
    }
  text = json.dumps(body, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % _ALIGN)
  assert len(text) <= shard_header.MOST_JSON, 'the header is too large'
  header = len(text).to_bytes(8, 'little') + text
  offsets = {name: len(header) + start for name, start in starts.items()}
  return header, offsets, len(header) + end


def _check_whole(spec: TensorSpec, spans: list[tuple[int, int]]) -> None:
  """Checks that every row was written exactly once."""
  if not spec.nbytes:
    return
  done = 0
  for start, stop in sorted(span for span in spans if span[0] < span[1]):
    assert start == done, f'{spec.name}: rows {start} and {done} do not meet'
    done = stop
  assert done == spec.num_rows, f'{spec.name}: {done} of {spec.num_rows} rows'


def flush(path: str | os.PathLike) -> None:
  """Forces a file to the disk."""
  handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write_index(
  directory: str | os.PathLike, planned: list[list[TensorSpec]]
) -> None:
  """Writes the index of several files; a single file needs none."""
  if len(planned) < 2:
    return
  names = shard_names(len(planned))
  shard_of = {
    spec.name: name
    for name, specs in zip(names, planned, strict=True)
    for spec in specs
  }
  total = sum(spec.nbytes for specs in planned for spec in specs)
  index = {'metadata': {'total_size': total}, 'weight_map': shard_of}
  text = json.dumps(index, indent=2, sort_keys=True) + '\n'
  _replace(pathlib.Path(directory) / shards.INDEX, text)


def write_sums(directory: str | os.PathLike, digests: dict[str, str]) -> None:
  """Writes SHA256SUMS from file -> digest, for `sha256sum -c` and `verify`."""
  lines = [f'{digests[name]}  {name}\n' for name in sorted(digests)]
  _replace(pathlib.Path(directory) / shards.SUMS, ''.join(lines))


def _replace(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically."""
  scratch = path.with_name(f'.{path.name}.tmp')
  with open(scratch, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  scratch.replace(path)
