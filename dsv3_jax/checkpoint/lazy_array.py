"""Arrays on disk that are read and written chunk by chunk.

A parameter of the full model may not fit into memory: the routed experts' w_up
of 671B has 436 GB. A checkpoint stores it in chunks of one layer and expert, of
at most 64 MB each. A `LazyArray` represents it and is read slice by slice.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

Slices = tuple[slice, ...]
Part = TypeVar('Part')

CHUNK_BYTES = 64 << 20
_ALIGN = 64
_STACKED_EXPERTS = ('w_gate', 'w_up', 'w_down')  # below 'moe'


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """An array with shape and dtype whose slices are read or computed on demand.

  read: slices -> NumPy array.
  chunk: shape of a slice that is efficient to read at once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Slices], np.ndarray]
  chunk: tuple[int, ...]

  def astype(self, dtype: Any) -> 'LazyArray':
    """The same array, cast when it is read."""
    dtype = np.dtype(dtype)
    if dtype == self.dtype:
      return self
    read = lambda at: self.read(at).astype(dtype)
    return LazyArray(self.shape, dtype, read, self.chunk)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def __getitem__(self, slices: Any) -> np.ndarray:
    """Reads slices or indices of the leading dims, as NumPy does."""
    slices = slices if isinstance(slices, tuple) else (slices,)
    spans, drop = [], []
    for i, part in enumerate(slices):
      drop.append(0 if isinstance(part, int) else slice(None))
      part = slice(part, part + 1) if isinstance(part, int) else part
      spans.append(slice(*part.indices(self.shape[i])[:2]))
    spans += [slice(0, n) for n in self.shape[len(slices) :]]
    return self.read(tuple(spans))[tuple(drop)]


def open_arrays(folder: pathlib.Path, names: list[str]) -> dict[str, LazyArray]:
  """Arrays of an Orbax checkpoint by dotted name; reads only metadata."""
  base = {'driver': 'file', 'path': f'{folder}/'}
  arrays = {}
  for name in names:
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
    spec = {'driver': 'zarr', 'kvstore': kvstore}
    array = tensorstore.open(spec, read=True).result()

    def read(slices: Slices, array=array) -> np.ndarray:
      return array[slices].read().result()

    dtype = np.dtype(array.dtype.numpy_dtype)
    chunk = array.chunk_layout.read_chunk.shape or array.shape
    arrays[name] = LazyArray(tuple(array.shape), dtype, read, tuple(chunk))
  return arrays


def save_args(tree: Any) -> Any:
  """Orbax's chunks of each leaf: by layer and expert, then by bytes."""

  def args(path: tuple, leaf: Any) -> ocp.SaveArgs:
    if math.prod(np.shape(leaf)) * leaf.dtype.itemsize <= CHUNK_BYTES:
      return ocp.SaveArgs()
    keys = [getattr(k, 'key', getattr(k, 'name', None)) for k in path]
    experts = keys[-1] in _STACKED_EXPERTS and keys[-2] == 'moe'
    axes = tuple(range(('layers' in keys) + experts))
    return ocp.SaveArgs(shard_axes=axes, chunk_byte_size=CHUNK_BYTES)

  return jax.tree_util.tree_map_with_path(args, tree)


class LazyHandler(ocp.type_handlers.NumpyHandler):
  """Saves `LazyArray`s with Orbax, chunk by chunk and one array at a time."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)
    self._one = asyncio.Lock()
    self._error: Exception | None = None

  async def _background_serialize(self, *args, **kwargs) -> None:
    self._error = None
    await super()._background_serialize(*args, **kwargs)
    if self._error is not None:
      raise self._error

  async def _open_and_write(
    self, value: LazyArray, tspec: dict[str, Any], ts_context: Any
  ) -> None:
    try:
      await self._write(value, tspec, ts_context)
    except (OSError, ValueError) as error:
      # Raised above, after all arrays. Raised here, it would make Orbax close
      # the event loop that other arrays still use.
      self._error = error

  async def _write(
    self, value: LazyArray, tspec: dict[str, Any], ts_context: Any
  ) -> None:
    spec = tensorstore.Spec(tspec)
    array = await tensorstore.open(
      spec, create=True, open=True, context=ts_context
    )
    async with self._one:
      if self._error is not None:
        return
      chunk = array.chunk_layout.write_chunk.shape
      pieces = read_ahead(value.read, grid(value.shape, chunk))
      writing = None
      while (item := await asyncio.to_thread(next, pieces, None)) is not None:
        if writing is not None:
          await writing
        slices, piece = item
        writing = array[slices].write(piece)
      await writing


def grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Slices]:
  """Slices of the chunks of `shape`, the last dim fastest."""
  starts = [range(0, n, c) for n, c in zip(shape, chunk, strict=True)]
  for corner in itertools.product(*starts):
    yield tuple(
      slice(at, min(at + c, n))
      for at, c, n in zip(corner, chunk, shape, strict=True)
    )


def read_ahead(
  read: Callable[[Part], np.ndarray], parts: Iterable[Part]
) -> Iterator[tuple[Part, np.ndarray]]:
  """Reads parts on all cores, in order, with a bounded number in memory."""
  workers = os.cpu_count() or 1
  waiting: collections.deque = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for part in parts:
      waiting.append((part, pool.submit(read, part)))
      if len(waiting) > workers:  # bounds the memory
        first, job = waiting.popleft()
        yield first, job.result()
    while waiting:
      first, job = waiting.popleft()
      yield first, job.result()


def to_device(array: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Reads an array onto its devices; the host holds a few chunks at a time.

  A shard that several devices hold is read once.
  """
  index = sharding.addressable_devices_indices_map(array.shape)
  holders: dict[tuple, list] = {}
  for device, slices in index.items():
    ends = zip(slices, array.shape, strict=True)
    holders.setdefault(tuple(s.indices(n)[:2] for s, n in ends), []).append(
      device
    )
  parts = []
  for spans, devices in holders.items():
    parts += _to_holders(array, spans, devices)
  return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _to_holders(
  array: LazyArray, spans: tuple[tuple[int, int], ...], devices: list
) -> list[jax.Array]:
  """Reads one shard of an array onto all devices that hold it."""
  sizes = tuple(stop - start for start, stop in spans)
  # XLA:CPU copies elements below 32 bits one by one, unless they are integers.
  bits = array.dtype if array.dtype.itemsize > 2 else _bits_of(array.dtype)
  parts = [jnp.zeros(sizes, bits, device=device) for device in devices]
  moved = (
    tuple(
      slice(start + s.start, start + s.stop)
      for (start, _), s in zip(spans, at, strict=True)
    )
    for at in grid(sizes, array.chunk)
  )
  for at, piece in read_ahead(array.read, moved):
    if piece.ctypes.data % _ALIGN:
      copied = empty(piece.shape, piece.dtype)
      copied.view(bits)[...] = piece.view(bits)
      piece = copied
    corner = [s.start - start for s, (start, _) in zip(at, spans, strict=True)]
    parts = [_put(part, piece.view(bits), corner) for part in parts]
    jax.block_until_ready(parts)  # bounds the memory of queued pieces
  return [_typed(part, array.dtype) for part in parts]


def _bits_of(dtype: np.dtype) -> np.dtype:
  """The unsigned integer dtype of the same size."""
  return np.dtype(f'u{dtype.itemsize}')


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """np.empty with an alignment that XLA:CPU can use without a copy."""
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + _ALIGN, np.uint8)
  start = -room.ctypes.data % _ALIGN
  return room[start : start + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, piece: jax.Array, at: list) -> jax.Array:
  """Writes `piece` into the donated buffer of `whole`."""
  return jax.lax.dynamic_update_slice(whole, piece, at)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _typed(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  """The same bits, in the same buffer."""
  return jax.lax.bitcast_convert_type(bits, dtype)


def registry() -> Any:
  """Orbax's array handlers and ours."""
  return ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    (jax.Array, ocp.type_handlers.ArrayHandler()),
    (LazyArray, LazyHandler()),
  )
