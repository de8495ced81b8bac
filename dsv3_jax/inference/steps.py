"""The compiled steps of inference: weights in, latents kept, tokens out.

Prefill takes the first tokens of rows, in the naive form; `extend` takes more
tokens of rows that the cache has a beginning of, in the absorbed form: one of
each row (decode), or a chunk of a prompt. Both write latents into pages, of
which a row's block table tells, and draw one token a row. Shapes decide what is
compiled; who calls keeps them few.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.inference import pages, sampling
from dsv3_jax.nn import attention, model


class Rows(NamedTuple):
  """Tokens to compute.

  index_BT: int32, place of each in its row, -1 if it is none. last_B: which of
  the tokens the next one follows. table_Bb: pages of each row.
  """

  tokens_BT: np.ndarray
  index_BT: np.ndarray
  last_B: np.ndarray
  table_Bb: np.ndarray


class Steps:
  """Parameters and router biases on one device, and what runs with them."""

  def __init__(self, cfg: config.Config, params: dict, router: model.Router):
    self.cfg = cfg
    self.dtype = model.compute_dtype(cfg)
    kept = lambda path: model.is_f32(path[-1].key)
    cast = lambda path, x: x if kept(path) else x.astype(self.dtype)
    self.params = jax.tree_util.tree_map_with_path(cast, params)
    self.router = router
    how = {'donate_argnames': ('caches',)}
    forward = lambda net: jax.jit(functools.partial(_forward, net), **how)
    self._prefill = forward(model.build(cfg))
    self._extend = forward(model.build(cfg, absorbed=True))
    self._copy = jax.jit(_copy, **how)

  def empty_caches(self, count: int, size: int) -> model.Caches:
    """`count` pages of `size` tokens."""
    return empty_caches(self.cfg.model, count, size, self.dtype)

  def prefill(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[jax.Array, model.Caches]:
    """The next token of each row, [B]; the caches given are used up."""
    args = (self.params, self.router, rows)
    return self._prefill(*args, caches=caches, draws=draws)

  def extend(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[jax.Array, model.Caches]:
    """Likewise, of rows with a beginning in the cache."""
    args = (self.params, self.router, rows)
    return self._extend(*args, caches=caches, draws=draws)

  def copy(
    self, copies: list[pages.Copy], caches: model.Caches
  ) -> model.Caches:
    """Copies whole pages, one after the other."""
    for source, target in copies:
      caches = self._copy(source, target, caches=caches)
    return caches


def empty_caches(
  cfg: config.ModelConfig, count: int, size: int, dtype
) -> model.Caches:
  """Caches of both stacks: `count` pages of `size` tokens."""
  make = functools.partial(attention.empty_cache, cfg)
  return model.Caches(
    make(cfg.num_dense_layers, count, size, dtype),
    make(cfg.num_moe_layers, count, size, dtype),
  )


def _forward(net, params, router, rows, caches, draws):
  """One pass through the caches and one token a row."""
  logits_BV, caches = net.apply(
    {'params': params}, *rows, router, caches, method='cached'
  )
  # A draw depends on the place in the row only, not on how it was reached.
  place_B = jnp.take_along_axis(rows.index_BT, rows.last_B[:, None], axis=1)
  return sampling.sample(logits_BV, draws, place_B[:, 0]), caches


def _copy(source, target, caches):
  def move(x):
    page = jax.lax.dynamic_index_in_dim(x, source, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, page, target, axis=1)

  return jax.tree.map(move, caches)
