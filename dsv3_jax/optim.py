"""AdamW, the schedules keyed on tokens, and the average of weights (TR 4.2).

  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
  w -= lr (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + decay w)

Moments are stored in BF16 and computed in f32 (TR 3.3.3); the master weights
are f32. Weight decay is decoupled and leaves norm weights alone. Schedules run
on the host in Python numbers: 14.8e12 tokens fit neither int32 nor the mantissa
of f32. The learning rate enters each update as an array: nothing recompiles.
"""

import math
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config

Tree = Any  # a nested dict of arrays
Parts = dict[tuple, Any]  # of one array, by where they begin and end


def lr_at(cfg: config.LrConfig, step: int, tokens: int) -> float:
  """Learning rate of the step after `step` steps and `tokens` tokens (TR 4.2).

  Five pieces: linear in steps, 0 at step 0 and `peak` at `warmup_steps`; `peak`
  until `constant_tokens`; a half cosine to `decay_lr`; `decay_lr`; `final_lr`.
  """
  if step < cfg.warmup_steps:
    return cfg.peak * step / cfg.warmup_steps
  into = tokens - cfg.constant_tokens  # the cosine
  if into < 0:
    return cfg.peak
  if into < cfg.decay_tokens:
    cosine = 0.5 * (1.0 + math.cos(math.pi * into / cfg.decay_tokens))
    return cfg.decay_lr + (cfg.peak - cfg.decay_lr) * cosine
  if into < cfg.decay_tokens + cfg.hold_tokens:
    return cfg.decay_lr
  return cfg.final_lr


def value_at(schedule: config.StepSchedule, tokens: int) -> float:
  """Value of a two-piece schedule after `tokens` tokens."""
  early = tokens < schedule.first_tokens
  return schedule.first if early else schedule.then


def batch_size_at(cfg: config.TrainConfig, tokens: int) -> int:
  """Sequences of the step after `tokens` tokens (TR 4.2).

  Grows linearly in tokens, by whole `train.batch_size_step`s, rounded down.
  """
  if tokens >= cfg.batch_ramp_tokens:
    return cfg.batch_size
  # Whole numbers: a float would miss a multiple of the step by an ulp.
  grown = (cfg.batch_size - cfg.batch_size_start) * tokens
  wanted = cfg.batch_size_start + grown // cfg.batch_ramp_tokens
  return wanted // cfg.batch_size_step * cfg.batch_size_step


class AdamState(NamedTuple):
  """Moments like the parameters, in `optim.moments_dtype`; updates done."""

  mean: Tree
  square: Tree
  count: Int[Array, '']


class AdamW(NamedTuple):
  """Two pure functions, as in optax, but the rate is an argument.

  init: params -> state.
  update: (grads, state, params, lr) -> (params, state).
  """

  init: Callable[[Tree], AdamState]
  update: Callable[
    [Tree, AdamState, Tree, Float[Array, '']], tuple[Tree, AdamState]
  ]


def adamw(cfg: config.OptimConfig) -> AdamW:
  """The optimizer of the report (TR 3.3.3, 4.2); clipping is the caller's."""
  dtype = jnp.dtype(cfg.moments_dtype)

  def init(params: Tree) -> AdamState:
    zeros = lambda: jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params)
    return AdamState(zeros(), zeros(), jnp.zeros((), jnp.int32))

  def update(
    grads: Tree, state: AdamState, params: Tree, lr: Float[Array, '']
  ) -> tuple[Tree, AdamState]:
    count = state.count + 1
    unbias1 = 1.0 / (1.0 - cfg.beta1 ** count.astype(jnp.float32))
    unbias2 = 1.0 / (1.0 - cfg.beta2 ** count.astype(jnp.float32))

    def leaf(path, w, g, m, v):
      g, m, v = (x.astype(jnp.float32) for x in (g, m, v))
      m = cfg.beta1 * m + (1.0 - cfg.beta1) * g
      v = cfg.beta2 * v + (1.0 - cfg.beta2) * jnp.square(g)
      # The weights see this step's moments before they are rounded.
      step = m * unbias1 / (jnp.sqrt(v * unbias2) + cfg.eps)
      if is_decayed(path):
        step += cfg.weight_decay * w
      return w - lr * step, m.astype(dtype), v.astype(dtype)

    trees = (params, grads, state.mean, state.square)
    new = jax.tree_util.tree_map_with_path(leaf, *trees)
    outer = jax.tree.structure(params)
    inner = jax.tree.structure((0, 0, 0))
    params, mean, square = jax.tree.transpose(outer, inner, new)
    return params, AdamState(mean, square, count)

  return AdamW(init, update)


def is_decayed(path: tuple[Any, ...]) -> bool:
  """True for matrices, False for norm weights.

  Told by the last key, as stacked layers give every weight one dim more.
  """
  return not path[-1].key.endswith('norm')


class HostEma:
  """Average of the parameters in host memory, made beside training (TR 3.2.3).

    average = decay * average + (1 - decay) * params

  in f32, one update a step, in order, by one thread: the result is the same to
  the bit in every run. Each process holds the parts that its devices do, once.
  `decay` 0 switches it off: `tree()` is then empty.

  Args:
    params: where the average begins; arrays on devices.
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
    """Takes in one step's parameters, which may be donated afterwards.

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
    """The average now, f32, where the parameters are; `{}` if switched off."""
    self.flush()
    leaves, form = jax.tree.flatten(self._like)
    made = [
      jax.make_array_from_callback(
        like.shape,
        like.sharding,
        lambda at, parts=parts: np.copy(parts[_key(at)]),
      )
      for like, parts in zip(leaves, self._average, strict=True)
    ]
    return jax.tree.unflatten(form, made)

  def close(self) -> None:
    """Finishes what waits and ends the thread."""
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
  """What this process has of an array, by its place; each part once."""
  return {_key(shard.index): shard.data for shard in w.addressable_shards}


def _key(at: tuple[slice, ...]) -> tuple:
  return tuple((part.start, part.stop) for part in at)
