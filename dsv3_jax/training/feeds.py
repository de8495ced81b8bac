"""The rows of each step, as arrays on the mesh.

Row r of the run is row r of the stream, and rows [first, first + count * B) are
the next step's, micro-batch by micro-batch. This does not depend on processes
or devices. A stream is read whole by every process; of prepared rows a process
reads those that its devices hold.
"""

import abc
import functools
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import numpy as np

from dsv3_jax.data import loader, packing, shards

Shape = tuple[int, int, int]
Example = dict[str, np.ndarray]


class Feed(abc.ABC):
  """What the loop reads.

  seed: of the stream. row: how many of its rows were taken. kept: digest of
  the documents that `prepare` kept; '' if that is all.
  """

  seed: int
  row: int
  kept = ''

  @abc.abstractmethod
  def take(
    self, count: int, shape: Shape, sharding: jax.sharding.Sharding
  ) -> dict[str, jax.Array]:
    """The arrays of the next step.

    Args:
      count: micro-batches with rows.
      shape: of the arrays, [micro-batches, B, T]; those from `count` on are 0.
      sharding: of the arrays.

    Raises:
      InputError: the data cannot be read.
    """

  @abc.abstractmethod
  def get_state(self) -> dict[str, Any]:
    """What a restart needs beside `row`, as JSON values."""

  @abc.abstractmethod
  def close(self) -> None:
    """Ends threads and closes files."""


class StreamFeed(Feed):
  """Rows that are encoded and packed now, in every process."""

  def __init__(self, stream: loader.Loader, row: int):
    self._stream, self.seed, self.row = stream, stream.seed, row

  def take(
    self, count: int, shape: Shape, sharding: jax.sharding.Sharding
  ) -> dict[str, jax.Array]:
    """See `Feed`."""
    batches = [next(self._stream) for _ in range(count)]
    self.row += count * shape[1]
    empty = jax.tree.map(np.zeros_like, batches[0])
    batches += [empty] * (shape[0] - count)
    arrays = {name: np.stack([b[name] for b in batches]) for name in empty}
    place = lambda x: jax.make_array_from_callback(
      shape, sharding, lambda at: x[at]
    )
    return {name: place(x) for name, x in arrays.items()}

  def get_state(self) -> dict[str, Any]:
    """The stream's position."""
    return self._stream.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Resumes from a position of `get_state`."""
    self._stream.set_state(state)

  def close(self) -> None:
    """See `Feed`."""
    self._stream.close()


class PreparedFeed(Feed):
  """Rows of a folder; a thread reads those of the next step ahead."""

  def __init__(
    self, folder: shards.Folder, isolated: bool, seed: int, row: int
  ):
    """Args:
    isolated: `data.isolate_samples`.
    row: the first to take.
    """
    self._folder, self.seed, self.row = folder, seed, row
    self.kept = folder.settings.get('kept', '')
    self._example = functools.partial(packing.to_example, isolated=isolated)
    self._pool = futures.ThreadPoolExecutor(1, 'prepared-rows')
    self._ahead: futures.Future = futures.Future()
    self._ahead.set_result({})

  def take(
    self, count: int, shape: Shape, sharding: jax.sharding.Sharding
  ) -> dict[str, jax.Array]:
    """See `Feed`."""
    first = self.row
    blocks = sharding.addressable_devices_indices_map(shape).values()
    examples = self.local_examples(count, shape, blocks)
    step = [examples.get(first + i) for i in range(count * shape[1])]
    return _place(step, shape, sharding)

  def local_examples(
    self, count: int, shape: Shape, blocks: Iterable[tuple[slice, ...]]
  ) -> dict[int, Example]:
    """The next step's rows that some devices hold, by number; no other is read.

    Args:
      count, shape: see `take`.
      blocks: slices of `shape`, for each device.
    """
    local = local_rows(blocks, count, shape)
    rows = [self.row + i for i in local]
    ahead = self._ahead.result()
    missing = self._read([row for row in rows if row not in ahead])
    self.row += count * shape[1]
    following = [self.row + i for i in local]
    following = [row for row in following if row < len(self._folder)]
    self._ahead = self._pool.submit(self._read, following)
    return {row: (missing if row in missing else ahead)[row] for row in rows}

  def _read(self, rows: list[int]) -> dict[int, Example]:
    examples = map(self._example, self._folder.read(rows))
    return dict(zip(rows, examples, strict=True))

  def get_state(self) -> dict[str, Any]:
    """Nothing: `row` says all."""
    return {}

  def close(self) -> None:
    """See `Feed`."""
    self._pool.shutdown()
    self._folder.close()


def local_rows(
  blocks: Iterable[tuple[slice, ...]], count: int, shape: Shape
) -> list[int]:
  """The rows of a step that devices hold, sorted; 0 is the step's first.

  Args:
    blocks: a tuple of slices of `shape` for each device.
    count: micro-batches with rows.
  """
  rows = set()
  for batches, sequences, _ in blocks:
    for n in range(*batches.indices(count)):
      first = n * shape[1]
      rows |= {first + b for b in range(*sequences.indices(shape[1]))}
  return sorted(rows)


def _place(
  step: list[Example | None], shape: Shape, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
  """Arrays whose local blocks have the examples of a step, then zeros."""
  spec = next(example for example in step if example is not None)
  place = lambda name: jax.make_array_from_callback(
    shape, sharding, _block_reader(step, shape, name, spec[name].dtype)
  )
  return {name: place(name) for name in spec}


def _block_reader(
  step: list[Example | None], shape: Shape, name: str, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
  """Makes the part of one array that a device holds."""

  def read(at: tuple[slice, ...]) -> np.ndarray:
    sequences = range(*at[1].indices(shape[1]))
    batches = range(*at[0].indices(shape[0]))
    block = np.zeros((len(batches), len(sequences), shape[2]), dtype)
    for i, n in enumerate(batches):
      for j, b in enumerate(sequences):
        if (row := n * shape[1] + b) < len(step):
          block[i, j] = step[row][name]
    return block[..., at[2]]

  return read
