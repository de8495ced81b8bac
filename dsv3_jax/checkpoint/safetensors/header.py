"""The header of one safetensors file, read strictly.

A file has 8 bytes of header length, a JSON header, then the tensors without
gaps. The header's claims are checked against the file's size before anything is
allocated. Every deviation from the format is refused, naming file and tensor,
also where the `safetensors` package is lenient. Nothing is unpickled.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import reprlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dsv3_jax import errors

DTYPES: dict[str, np.dtype] = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
DTYPE_NAMES: dict[np.dtype, str] = {
  dtype: name for name, dtype in DTYPES.items()
}

METADATA = '__metadata__'  # a name that no tensor can have

MOST_JSON = 100_000_000  # bytes; also the limit of the safetensors package
_MOST_DIMS = 8
_FIELDS = {'dtype', 'shape', 'data_offsets'}


class _Object(dict):
  """A JSON object; `twice` is a key that it has twice."""

  twice: str | None = None


# Bounds what a hostile file can put into a message; keeps it on one line.
_short = reprlib.Repr()
_short.maxstring, _short.maxlist, _short.maxlevel = 200, 10, 2
_short.repr__Object = _short.repr_dict
show = _short.repr


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """Location of a tensor; `offset` is from the file's start [bytes]."""

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
  """Size of a tensor [bytes]."""
  return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
  """The tensors of one file by name, in the header's order.

  Raises:
    InputError: the file cannot be read or deviates from the format; names the
      file and, if possible, the tensor.
  """
  path = pathlib.Path(path)
  raw, start, size = _read_raw(path)
  body = as_object(parse(raw, str(path)), str(path), 'the header')
  if METADATA in body:
    where = f'{path}: {METADATA}'
    pairs = as_object(body.pop(METADATA), where, 'it')
    for key, value in pairs.items():
      if not _is_text(key) or not _is_text(value):
        raise errors.InputError(
          f'{where}: {show(key)} must be a string of text, as must its value'
        )
  entries = {
    name: _entry(path, name, value, start, size) for name, value in body.items()
  }
  _check_contiguous(path, entries, start, size)
  return entries


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file for reading; an OSError becomes an InputError."""
  try:
    # Checked before opening, which would block on a pipe.
    if not stat.S_ISREG(path.stat().st_mode):
      raise errors.InputError(f'{path} is not a file')
    with open(path, 'rb') as file:
      yield file
  except OSError as error:
    raise unreadable(path, error) from error


def unreadable(path: pathlib.Path, error: OSError) -> errors.InputError:
  """An OSError as an InputError."""
  return errors.InputError(f'{path} cannot be read ({error.strerror})')


def _read_raw(path: pathlib.Path) -> tuple[bytes, int, int]:
  """The header's bytes, the offset of the data, the file's size."""
  with opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
      raise errors.InputError(f'{path} is cut: {size} bytes, fewer than 8')
    length = int.from_bytes(file.read(8), 'little')
    if not 0 < length <= min(MOST_JSON, size - 8):
      raise errors.InputError(
        f'{path}: the header claims {length} bytes, which must be 1 to '
        f'{MOST_JSON} and no more than the {size - 8} that follow'
      )
    raw = file.read(length)
  if len(raw) < length:
    raise errors.InputError(f'{path} was cut while it was read')
  return raw, 8 + length, size


def parse(raw: bytes, where: str) -> Any:
  """Parses JSON as strictly as serde, the parser of the safetensors package.

  Raises:
    InputError: it is not UTF-8, not JSON, or no object.
  """
  if raw[:1] != b'{':
    raise errors.InputError(f"{where}: the JSON must start with '{{'")
  try:
    return json.loads(
      raw.decode('utf-8'),
      object_pairs_hook=_pairs,
      parse_int=_integer,
      parse_constant=_constant,
    )
  except UnicodeDecodeError as error:
    raise errors.InputError(f'{where} is not UTF-8: {error.reason}') from error
  except ValueError as error:
    raise errors.InputError(f'{where} is not JSON: {error}') from error
  except RecursionError as error:
    raise errors.InputError(f'{where} is nested too deeply') from error


def _pairs(pairs: list[tuple[str, Any]]) -> _Object:
  body = _Object(pairs)
  if len(body) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    body.twice = next(key for key, count in counts.items() if count > 1)
  return body


def _integer(text: str) -> int | float:
  """Integers beyond 64 bits become floats, which later checks refuse."""
  return float(text) if text == '-0' or len(text) > 20 else int(text)


def _constant(text: str) -> float:
  """Refuses NaN and Infinity, which Python accepts and JSON lacks."""
  raise ValueError(f'{text} is no value')


def as_object(value: Any, where: str, what: str) -> dict[str, Any]:
  """Returns `value`, a result of `parse`, as an object without double keys.

  Raises:
    InputError: it is no JSON object, or has a key twice.
  """
  if not isinstance(value, _Object):
    raise errors.InputError(f'{where}: {what} must be a JSON object')
  if value.twice is not None:
    raise errors.InputError(f'{where}: {what} has {show(value.twice)} twice')
  return value


def _is_text(value: Any) -> bool:
  """True for a string without half of a surrogate pair."""
  try:
    return isinstance(value, str) and value.encode() is not None
  except UnicodeEncodeError:
    return False


def _entry(
  path: pathlib.Path, name: str, value: Any, start: int, size: int
) -> Entry:
  """One tensor of a header, with its fields checked."""
  where = f'{path}: tensor {show(name)}'
  if not name or not _is_text(name):
    raise errors.InputError(f'{where}: a name must be text and not empty')
  body = as_object(value, where, 'its entry')
  if body.keys() != _FIELDS:
    raise errors.InputError(
      f'{where} must have dtype, shape and data_offsets only; it has '
      f'{show(sorted(body))}'
    )
  dtype, shape, span = body['dtype'], body['shape'], body['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise errors.InputError(
      f'{where}: dtype {show(dtype)} must be one of: {", ".join(DTYPES)}'
    )
  if not _is_sizes(shape) or len(shape) > _MOST_DIMS:
    raise errors.InputError(
      f'{where}: shape {show(shape)} must be at most {_MOST_DIMS} integers >= 0'
    )
  # NumPy's limit, which also applies to the other dims of an empty tensor.
  if num_bytes(dtype, tuple(n or 1 for n in shape)) >= 2**63:
    raise errors.InputError(f'{where}: shape {show(shape)} is too large')
  if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
    raise errors.InputError(
      f'{where}: data_offsets {show(span)} must be two integers, 0 <= start '
      '<= end'
    )
  if span[1] > size - start:
    raise errors.InputError(
      f'{where}: data_offsets {show(span)} go beyond the {size - start} bytes '
      'of data'
    )
  nbytes = num_bytes(dtype, tuple(shape))
  if span[1] - span[0] != nbytes:
    raise errors.InputError(
      f'{where}: data_offsets {show(span)} hold {span[1] - span[0]} bytes, '
      f'but {dtype}{show(shape)} has {nbytes}'
    )
  return Entry(path, dtype, tuple(shape), start + span[0], nbytes)


def _is_sizes(value: Any) -> bool:
  """True for a list of integers >= 0; a bool is none."""
  return isinstance(value, list) and all(
    type(n) is int and n >= 0 for n in value
  )


def _check_contiguous(
  path: pathlib.Path, entries: dict[str, Entry], start: int, size: int
) -> None:
  """Checks that the tensors fill the data without gaps or overlaps."""
  end, last = start, 'the header'
  order = sorted(entries.items(), key=lambda e: (e[1].offset, e[1].nbytes))
  for name, entry in order:
    if entry.offset != end:
      gap = entry.offset - end
      defect = 'overlaps' if gap < 0 else 'leaves a hole after'
      raise errors.InputError(
        f'{path}: tensor {show(name)} {defect} {last}: {abs(gap)} bytes'
      )
    end, last = end + entry.nbytes, f'tensor {show(name)}'
  if end != size:
    raise errors.InputError(
      f'{path}: {size - end} bytes after {last} belong to no tensor'
    )
