"""An exponential moving average of the parameters in host memory (TR 3.2.3)."""

import queue
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

# Shards of one array, by where they begin and end.
Parts = dict[tuple, Any]


class HostEma:
  """The average, updated by a thread while training goes on.

    average = decay * average + (1 - decay) * params

  in f32. One thread makes one update a step, in order, so that the result is
  the same to the bit in every run. Each process holds the shards of its devices
  once. `decay` 0 switches it off: `tree()` is then empty.

  Args:
    params: the first average; arrays on devices.
  """

  def __init__(self, decay: float, params: Tree):
    self._decay = np.float32(decay)
    params = params if decay else {}
    self._like = jax.tree.map(_like, params)
    self._average = [
      {at: np.array(part, np.float32) for at, part in _parts(w).items()}
      for w in jax.tree.leaves(params)
    ]
    # Two waiting copies at most: a host that cannot keep up slows training
    # down instead of filling its memory.
    self._queue: queue.Queue[Tree | None] = queue.Queue(maxsize=2)
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._run, daemon=True, name='ema')
    self._thread.start()

  def update(self, params: Tree) -> None:
    """Adds one step's parameters, which may be donated afterwards.

    Raises:
      RuntimeError: an earlier update failed.
    """
    self._check()
    if not self._average:
      return
    # A copy on the device is ordered before the next step's donation, and
    # costs no wait; the thread then moves the copy to the host.
    self._queue.put(_device_copy(params))

  def flush(self) -> None:
    """Waits until every update so far is in the average."""
    self._queue.join()
    self._check()

  def tree(self) -> Tree:
    """The average, f32, sharded as the parameters; `{}` if switched off."""
    self.flush()
    leaves, form = jax.tree.flatten(self._like)
    arrays = [
      jax.make_array_from_callback(
        like.shape,
        like.sharding,
        lambda at, parts=parts: np.copy(parts[_key(at)]),
      )
      for like, parts in zip(leaves, self._average, strict=True)
    ]
    return jax.tree.unflatten(form, arrays)

  def close(self) -> None:
    """Finishes all updates and ends the thread."""
    if self._thread.is_alive():
      self._queue.put(None)
      self._thread.join()
    self._check()

  def _check(self) -> None:
    if self._error is not None:
      raise RuntimeError('the EMA thread failed') from self._error

  def _run(self) -> None:
    while (params := self._queue.get()) is not None:
      try:
        if self._error is None:
          leaves = jax.tree.leaves(params)
          for pair in zip(self._average, leaves, strict=True):
            self._blend(*pair)
      except BaseException as error:  # noqa: BLE001 - raised again by _check
        self._error = error
      finally:
        self._queue.task_done()
    self._queue.task_done()

  def _blend(self, average: Parts, w: jax.Array) -> None:
    parts = _parts(w)
    for at, part in average.items():
      part *= self._decay
      part += (np.float32(1.0) - self._decay) * np.asarray(
        parts[at], np.float32
      )


@jax.jit
def _device_copy(params: Tree) -> Tree:
  """New buffers with the same values and placement."""
  return jax.tree.map(jnp.copy, params)


def _like(w: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=w.sharding)


def _parts(w: jax.Array) -> Parts:
  """The shards of an array in this process, each once."""
  return {_key(shard.index): shard.data for shard in w.addressable_shards}


def _key(at: tuple[slice, ...]) -> tuple:
  return tuple((part.start, part.stop) for part in at)
