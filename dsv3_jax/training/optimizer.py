"""AdamW with decoupled weight decay (TR 3.3.3, 4.2).

  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
  w -= lr (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + decay w)

Moments are stored in BF16 and computed in f32 (TR 3.3.3); the master weights
are f32. Weight decay leaves norm weights alone. The learning rate enters each
update as an array: nothing recompiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config

Tree = Any  # a nested dict of arrays


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

  The last key decides, as stacked layers give every weight one more dim.
  """
  return not path[-1].key.endswith('norm')
