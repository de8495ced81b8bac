"""The compiled steps of inference: weights in, latents kept, tokens out.

Prefill takes the first tokens of rows, in the naive form; `extend` takes a
chunk more of rows that the cache has a beginning of, in the absorbed form. Both
draw the token that follows. `decode` takes the last token of rows and drafts of
the next ones, and draws what follows each: a draft is kept if it is what was
drawn in its place, so that drafts change how many tokens a step gives and never
which (TR 5.4.3).

All write latents into pages, of which a row's block table tells. Shapes decide
what is compiled; who calls keeps them few.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax import config, errors
from dsv3_jax.inference import pages, sampling
from dsv3_jax.nn import attention, model


class Rows(NamedTuple):
  """Tokens to compute.

  index_BT: int32, place of each in its row, -1 if it is none. last_B: which of
  them is the last. after_B: the token behind that, -1 if it is to be drawn.
  table_Bb: pages of each row.
  """

  tokens_BT: np.ndarray
  index_BT: np.ndarray
  last_B: np.ndarray
  after_B: np.ndarray
  table_Bb: np.ndarray


class Made(NamedTuple):
  """New tokens of each row, the first `count_B` of `tokens_Bt`, and drafts."""

  tokens_Bt: Int[Array, 'B t']
  count_B: Int[Array, 'B']
  drafts_Bk: Int[Array, 'B k']


class Steps:
  """Parameters and router biases on one device, and what runs with them."""

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router: model.Router,
    num_drafts: int = 0,
  ):
    """Args:
      num_drafts: tokens that the first MTP module drafts in a step.

    Raises:
      InputError: as `check_drafts`.
    """
    check_drafts(cfg.model, num_drafts)
    self.cfg, self.num_drafts = cfg, num_drafts
    self.dtype = model.compute_dtype(cfg)
    kept = lambda path: model.is_f32(path[-1].key)
    cast = lambda path, x: x if kept(path) else x.astype(self.dtype)
    self.params = jax.tree_util.tree_map_with_path(cast, params)
    self.router = router
    how = {'donate_argnames': ('caches',)}
    naive, absorbed = model.build(cfg), model.build(cfg, absorbed=True)

    first = _Forward(naive, absorbed, num_drafts)
    later = _Forward(absorbed, absorbed, num_drafts)
    self._prefill = jax.jit(first.follow, **how)
    self._extend = jax.jit(later.follow, **how)
    self._decode = jax.jit(later.verify, **how)
    self._copy = jax.jit(_copy, **how)

  def empty_caches(self, count: int, size: int) -> model.Caches:
    """`count` pages of `size` tokens."""
    how = {'drafting': self.num_drafts > 0}
    made = empty_caches(self.cfg.model, count, size, self.dtype, **how)
    # Bound to a device, as all later ones are: else the first step of each
    # shape would be compiled for caches that are not.
    return jax.device_put(made, jax.tree.leaves(self.params)[0].sharding)

  def prefill(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[Made, model.Caches]:
    """One new token of each row; the caches given are used up."""
    args = (self.params, self.router, rows)
    return self._prefill(*args, caches=caches, draws=draws)

  def extend(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[Made, model.Caches]:
    """Likewise, of rows with a beginning in the cache."""
    args = (self.params, self.router, rows)
    return self._extend(*args, caches=caches, draws=draws)

  def decode(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[Made, model.Caches]:
    """Up to 1 + num_drafts new tokens a row.

    Args:
      rows: of each the last token, then drafts, and -1 in `index_BT` where a
        row has fewer. `last_B` and `after_B` are not read.
    """
    args = (self.params, self.router, rows)
    return self._decode(*args, caches=caches, draws=draws)

  def copy(
    self, copies: list[pages.Copy], caches: model.Caches
  ) -> model.Caches:
    """Copies whole pages, one after the other."""
    for source, target in copies:
      caches = self._copy(source, target, caches=caches)
    return caches


def check_drafts(cfg: config.ModelConfig, num_drafts: int) -> None:
  """Whether a model can draft so many tokens a step.

  Raises:
    InputError: they are negative, or there is no MTP module.
  """
  if num_drafts < 0:
    raise errors.InputError(f'num_drafts={num_drafts} must be >= 0')
  if num_drafts and not cfg.mtp.depth:
    raise errors.InputError(
      f'num_drafts={num_drafts} needs a model with an MTP module; '
      'this one has model.mtp.depth=0'
    )


def empty_caches(
  cfg: config.ModelConfig, count: int, size: int, dtype, *, drafting: bool
) -> model.Caches:
  """Caches of all stacks: `count` pages of `size` tokens."""
  make = functools.partial(attention.empty_cache, cfg)
  return model.Caches(
    make(cfg.num_dense_layers, count, size, dtype),
    make(cfg.num_moe_layers, count, size, dtype),
    make(1, count, size, dtype) if drafting else None,
  )


class _Forward(NamedTuple):
  """What steps compute; `absorbed` takes rows that the cache has begun."""

  net: model.Model
  absorbed: model.Model
  num_drafts: int

  def follow(self, params, router, rows, caches, draws):
    """One pass over a chunk, and the token behind the last."""
    last_B1 = rows.last_B[:, None]
    logits_B1V, previous_BTD, caches = self.net.apply(
      {'params': params},
      *(rows.tokens_BT, rows.index_BT, last_B1, rows.table_Bb),
      *(router, caches),
      method='cached',
    )
    # A draw depends on the place in the row only, not on how it was reached.
    place_B1 = jnp.take_along_axis(rows.index_BT, last_B1, axis=1)
    token_B = sampling.sample(logits_B1V[:, 0], draws, place_B1[:, 0])
    follows_B = jnp.where(rows.after_B < 0, token_B, rows.after_B)
    is_last_BT = jnp.arange(rows.tokens_BT.shape[1]) == last_B1
    next_BT = jnp.roll(rows.tokens_BT, -1, axis=1)
    next_BT = jnp.where(is_last_BT, follows_B[:, None], next_BT)
    behind = (previous_BTD, next_BT, last_B1)
    drafts_Bk, caches = self._draft(params, router, rows, behind, caches, draws)
    return Made(token_B[:, None], jnp.ones_like(token_B), drafts_Bk), caches

  def verify(self, params, router, rows, caches, draws):
    """One pass over last tokens and drafts, and what follows each of them."""
    batch, width = rows.tokens_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
    logits_BTV, previous_BTD, caches = self.net.apply(
      {'params': params},
      *(rows.tokens_BT, rows.index_BT, at_BT, rows.table_Bb),
      *(router, caches),
      method='cached',
    )
    each = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), draws)
    flat = (logits_BTV.reshape(batch * width, -1), each, rows.index_BT.ravel())
    token_BT = sampling.sample(*flat).reshape(batch, width)
    agrees_Bk = token_BT[:, :-1] == rows.tokens_BT[:, 1:]
    agrees_Bk &= rows.index_BT[:, 1:] >= 0
    kept_B1 = jnp.sum(jnp.cumprod(agrees_Bk, axis=1), axis=1, keepdims=True)
    behind = (previous_BTD, token_BT, kept_B1)
    drafts_Bk, caches = self._draft(params, router, rows, behind, caches, draws)
    return Made(token_BT, kept_B1[:, 0] + 1, drafts_Bk), caches

  def _draft(self, params, router, rows, behind, caches, draws):
    """The tokens behind `next_BT[at_B1]`, as the MTP module would have them.

    The first comes with the latents of all tokens; further ones by the module's
    own hidden states, whose latents are made anew when the tokens are known.
    They are drawn as the main model will: with the noise of the same place.
    """
    previous_BTD, next_BT, at_B1 = behind
    index_BT, net, drafts = rows.index_BT, self.net, []
    place_B1 = jnp.take_along_axis(index_BT, at_B1, axis=1)
    for _ in range(self.num_drafts):
      logits_B1V, previous_BTD, caches = net.apply(
        {'params': params},
        *(previous_BTD, next_BT, index_BT, at_B1, rows.table_Bb),
        *(router, caches),
        method='drafted',
      )
      place_B1 = jnp.where(place_B1 < 0, place_B1, place_B1 + 1)
      draft_B = sampling.sample(logits_B1V[:, 0], draws, place_B1[:, 0])
      drafts.append(draft_B)
      net, next_BT, index_BT = self.absorbed, draft_B[:, None], place_B1
      at_B1 = jnp.zeros_like(at_B1)
    empty_B0 = jnp.zeros((len(at_B1), 0), jnp.int32)
    return jnp.stack(drafts, axis=1) if drafts else empty_B0, caches


def _copy(source, target, caches):
  def move(x):
    page = jax.lax.dynamic_index_in_dim(x, source, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, page, target, axis=1)

  return jax.tree.map(move, caches)
