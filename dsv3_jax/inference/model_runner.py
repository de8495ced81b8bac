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
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax import config, errors
from dsv3_jax.inference import block_pool, redundant_experts, sampling
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.nn import latent_cache, model
from pallas_kernels.mla_decode import api as mla_decode


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


class StepOutput(NamedTuple):
  """New tokens of each row, the first `count_B` of `tokens_Bt`, and drafts."""

  tokens_Bt: Int[Array, 'B t']
  count_B: Int[Array, 'B']
  drafts_Bk: Int[Array, 'B k']


class ModelRunner:
  """Parameters and router biases on their devices, and what runs with them.

  num_ranks: of a mesh, devices or groups of them with rows of their own. Arrays
  of rows hold equally many of each rank, one rank after the other, and block
  tables count the pages of the row's rank.
  """

  num_ranks = 1
  balancer: redundant_experts.ExpertRebalancer | None = None

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router: model.Router,
    num_drafts: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    plan: redundant_experts.RedundancyConfig | None = None,
    *,
    fp8_cache: bool = False,
  ):
    """Args:
      num_drafts: tokens that the first MTP module drafts in a step.
      fp8_cache: latents are kept in e4m3, 128 values under one scale.
      mesh: None is the device that the parameters are on.
      plan: of copies of experts; None: there are none.

    Raises:
      InputError: as `check_drafts`, `layout.Layout` and `balancer.check`.
    """
    check_drafts(cfg.model, num_drafts)
    self.cfg, self.num_drafts, self.fp8_cache = cfg, num_drafts, fp8_cache
    self.dtype = model.compute_dtype(cfg)
    kept = lambda path: model.is_f32(path[-1].key)
    cast = lambda path, x: x if kept(path) else x.astype(self.dtype)
    params = jax.tree_util.tree_map_with_path(cast, params)
    home = jax.tree.leaves(params)[0].sharding
    self.layout = inference_mesh.InferenceMesh(cfg, mesh, home)
    self.num_ranks = self.layout.num_ranks
    params = self.layout.place(params, self.layout.params)
    self.router = self.layout.place(router, inference_mesh.WHOLE)
    self._plain = {'params': params}
    specs = {'params': self.layout.params}
    if plan is not None:
      self.balancer = redundant_experts.ExpertRebalancer(
        cfg, self.layout, plan, params
      )
      self._plain, specs['redundant_slots'] = {}, inference_mesh.WHOLE
    naive, absorbed = model.build(cfg), model.build(cfg, absorbed=True)
    first = _Forward(naive, absorbed, num_drafts)
    later = _Forward(absorbed, absorbed, num_drafts)
    rows, cached = inference_mesh.ROWS, inference_mesh.PAGES

    def compiled(forward):
      run = functools.partial(_counted, forward)
      taken = (specs, inference_mesh.WHOLE, rows, cached, rows, rows)
      given = (rows, cached, rows)
      return self.layout.jit(run, taken, given, donate_argnums=3)

    self._prefill = compiled(first.follow)
    self._extend = compiled(later.follow)
    self._decode = compiled(later.verify)
    self._copy = self.layout.jit(
      _copy, (rows, rows, cached), cached, donate_argnums=2
    )

  @property
  def variables(self) -> dict:
    """What the model takes: parameters and, with a balancer, copies."""
    return self._plain if self.balancer is None else self.balancer.variables

  @property
  def params(self) -> dict:
    return self.variables['params']

  def empty_caches(self, count: int, size: int) -> model.Caches:
    """`count` pages of `size` tokens, for each rank."""
    args = (self.cfg.model, count * self.num_ranks, size, self.dtype)
    how = {'drafting': self.num_drafts > 0, 'fp8': self.fp8_cache}
    make = functools.partial(empty_caches, *args, **how)
    return self.layout.zeros(make, inference_mesh.PAGES)

  def prefill(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[StepOutput, model.Caches]:
    """One new token of each row; the caches given are used up."""
    return self._run(self._prefill, rows, caches, draws)

  def extend(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[StepOutput, model.Caches]:
    """Likewise, of rows with a beginning in the cache."""
    return self._run(self._extend, rows, caches, draws)

  def decode(
    self, rows: Rows, caches: model.Caches, draws: sampling.Draws
  ) -> tuple[StepOutput, model.Caches]:
    """Up to 1 + num_drafts new tokens a row.

    Args:
      rows: of each the last token, then drafts, and -1 in `index_BT` where a
        row has fewer. `last_B` and `after_B` are not read.
    """
    return self._run(self._decode, rows, caches, draws)

  def copy(
    self, copies: list[block_pool.Copy], caches: model.Caches
  ) -> model.Caches:
    """Copies whole pages, one after the other.

    Args:
      copies: pages counted over all ranks; each within its rank.
    """
    count = caches.moe.c_LpsC.shape[1] // self.num_ranks
    ranks = [[] for _ in range(self.num_ranks)]
    for source, target in copies:
      ranks[source // count].append((source % count, target % count))
    # Where a rank has none left, a page goes onto itself.
    for pairs in itertools.zip_longest(*ranks, fillvalue=(0, 0)):
      source_R, target_R = np.array(pairs, np.int32).T
      caches = self._copy(source_R, target_R, caches)
    return caches

  def _run(self, run, rows, caches, draws) -> tuple[StepOutput, model.Caches]:
    """A compiled step; the balancer hears of the load."""
    load_RLE = None if self.balancer is None else self.balancer.load_RLE
    args = (self.variables, self.router, rows, caches, draws, load_RLE)
    made, caches, load_RLE = run(*args)
    if self.balancer is not None:
      self.balancer.took_step(load_RLE)
    return made, caches


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
  cfg: config.ModelConfig,
  count: int,
  size: int,
  dtype,
  *,
  drafting: bool,
  fp8: bool,
) -> model.Caches:
  """Caches of all stacks: `count` pages of `size` tokens."""
  make = functools.partial(latent_cache.empty_cache, cfg, fp8=fp8)
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

  def follow(self, variables, router, rows, caches, draws):
    """One pass over a chunk, and the token behind the last."""
    last_B1 = rows.last_B[:, None]
    logits_B1V, previous_BTD, caches, load_LE = self.net.apply(
      variables,
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
    drafts_Bk, caches = self._draft(
      variables, router, rows, behind, caches, draws
    )
    made = StepOutput(token_B[:, None], jnp.ones_like(token_B), drafts_Bk)
    return made, caches, load_LE

  def verify(self, variables, router, rows, caches, draws):
    """One pass over last tokens and drafts, and what follows each of them."""
    batch, width = rows.tokens_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
    logits_BTV, previous_BTD, caches, load_LE = self.net.apply(
      variables,
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
    drafts_Bk, caches = self._draft(
      variables, router, rows, behind, caches, draws
    )
    return StepOutput(token_BT, kept_B1[:, 0] + 1, drafts_Bk), caches, load_LE

  def _draft(self, variables, router, rows, behind, caches, draws):
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
        variables,
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


def _counted(forward, variables, router, rows, caches, draws, load_RLE):
  """A step on one rank of a mesh; adds its load to that of earlier ones."""
  made, caches, load_LE = forward(variables, router, rows, caches, draws)
  if load_RLE is not None:
    load_RLE += load_LE
  return made, caches, load_RLE


def _copy(source_R, target_R, caches):
  """On one rank of a mesh, whose page is all there is in `source_R`."""

  def move(x):
    bits = mla_decode.bits(x)
    page = jax.lax.dynamic_index_in_dim(bits, source_R[0], axis=1)
    args = (bits, page, target_R[0])
    moved = jax.lax.dynamic_update_slice_in_dim(*args, axis=1)
    return mla_decode.from_bits(moved, x.dtype)

  return jax.tree.map(move, caches)
