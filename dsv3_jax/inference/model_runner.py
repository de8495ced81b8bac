"""The compiled steps of inference: weights and the latent cache in, tokens out.

`prefill` takes the first tokens of rows, in the naive form. `extend` takes a
chunk of rows that already have tokens in the cache, in the absorbed form. Both
sample the token that follows. `decode` takes the last token of rows and
speculative tokens behind it, and samples the token that follows each of them. A
speculative token is accepted if it equals the token sampled in its place. So
speculative tokens change how many tokens a step gives, and never which ones
(TR 5.4.3).

All of them write latents into the blocks of a row's block table. The shapes of
the arrays decide what is compiled; the caller keeps their number small.
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


class StepInput(NamedTuple):
  """Tokens to compute.

  index_BT: int32, position of each token in its row, -1 for padding.
  last_B: which of a row's tokens is the last. after_B: the token behind it, -1
  if it is to be sampled. table_Bb: block table of each row.
  """

  tokens_BT: np.ndarray
  index_BT: np.ndarray
  last_B: np.ndarray
  after_B: np.ndarray
  table_Bb: np.ndarray


class StepOutput(NamedTuple):
  """New tokens of each row, and speculative tokens that may follow them.

  The first `count_B` of `tokens_Bt` are new.
  """

  tokens_Bt: Int[Array, 'B t']
  count_B: Int[Array, 'B']
  speculative_Bk: Int[Array, 'B k']


class ModelRunner:
  """Parameters and router biases on their devices, and the compiled steps.

  num_ranks: devices of a mesh, or groups of them, that have rows of their own.
  Arrays hold equally many rows of each rank, one rank after the other. A block
  table numbers the blocks of the row's rank.
  """

  num_ranks = 1
  rebalancer: redundant_experts.ExpertRebalancer | None = None

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router_biases: model.RouterBiases,
    num_speculative_tokens: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    redundancy: redundant_experts.RedundancyConfig | None = None,
    *,
    fp8_cache: bool = False,
  ):
    """Args:
      num_speculative_tokens: that the first MTP module drafts in a step.
      fp8_cache: latents are stored in e4m3, 128 values under one scale.
      mesh: None is the device that the parameters are on.
      redundancy: redundant experts; None: there are none.

    Raises:
      InputError: as `check_num_speculative_tokens`, `mesh.InferenceMesh` and
        `redundant_experts.check`.
    """
    check_num_speculative_tokens(cfg.model, num_speculative_tokens)
    self.cfg, self.num_speculative_tokens = cfg, num_speculative_tokens
    self.fp8_cache = fp8_cache
    self.dtype = model.compute_dtype(cfg)
    is_f32 = lambda path: model.is_f32(path[-1].key)
    cast = lambda path, x: x if is_f32(path) else x.astype(self.dtype)
    params = jax.tree_util.tree_map_with_path(cast, params)
    device = jax.tree.leaves(params)[0].sharding
    self._mesh = inference_mesh.InferenceMesh(cfg, mesh, device)
    self.num_ranks = self._mesh.num_ranks
    params = self._mesh.place(params, self._mesh.params)
    replicated = inference_mesh.REPLICATED
    self.router_biases = self._mesh.place(router_biases, replicated)
    self._plain_variables = {'params': params}
    specs = {'params': self._mesh.params}
    if redundancy is not None:
      self.rebalancer = redundant_experts.ExpertRebalancer(
        cfg, self._mesh, redundancy, params
      )
      self._plain_variables, specs['redundant_slots'] = {}, replicated
    naive, absorbed = model.build(cfg), model.build(cfg, absorbed=True)
    first = _Forward(naive, absorbed, num_speculative_tokens)
    later = _Forward(absorbed, absorbed, num_speculative_tokens)
    self._prefill = self._compile(first.chunk, specs)
    self._extend = self._compile(later.chunk, specs)
    self._decode = self._compile(later.verify, specs)
    rows, caches = inference_mesh.ROWS, inference_mesh.BLOCKS
    self._copy = self._mesh.jit(
      _copy, (rows, rows, caches), caches, donate_argnums=2
    )

  @property
  def variables(self) -> dict:
    """Variables of the model: parameters and slots of redundant experts."""
    return (
      self._plain_variables
      if self.rebalancer is None
      else self.rebalancer.variables
    )

  @property
  def params(self) -> dict:
    return self.variables['params']

  def empty_caches(self, num_blocks: int, block_size: int) -> model.Caches:
    """`num_blocks` blocks of `block_size` tokens, for each rank."""
    make = functools.partial(
      empty_caches,
      self.cfg.model,
      num_blocks * self.num_ranks,
      block_size,
      self.dtype,
      drafting=self.num_speculative_tokens > 0,
      fp8=self.fp8_cache,
    )
    return self._mesh.zeros(make, inference_mesh.BLOCKS)

  def prefill(
    self,
    step_input: StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[StepOutput, model.Caches]:
    """One new token of each row; donates `caches`."""
    return self._run(self._prefill, step_input, caches, arrays)

  def extend(
    self,
    step_input: StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[StepOutput, model.Caches]:
    """As `prefill`, for rows that have tokens in the cache."""
    return self._run(self._extend, step_input, caches, arrays)

  def decode(
    self,
    step_input: StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[StepOutput, model.Caches]:
    """Up to 1 + num_speculative_tokens new tokens a row; donates `caches`.

    Args:
      step_input: the last token of each row, then its speculative tokens; -1 in
        `index_BT` where a row has fewer. Ignores `last_B` and `after_B`.
    """
    return self._run(self._decode, step_input, caches, arrays)

  def copy_blocks(
    self, copies: list[block_pool.BlockCopy], caches: model.Caches
  ) -> model.Caches:
    """Copies whole blocks, one after the other.

    Args:
      copies: numbers count the blocks of all ranks; source and target are on
        the same rank.
    """
    per_rank = caches.moe.c_LpsC.shape[1] // self.num_ranks
    ranks = [[] for _ in range(self.num_ranks)]
    for source, target in copies:
      ranks[source // per_rank].append((source % per_rank, target % per_rank))
    # A rank that has no copies left copies a block onto itself.
    for pairs in itertools.zip_longest(*ranks, fillvalue=(0, 0)):
      source_P, target_P = np.array(pairs, np.int32).T
      caches = self._copy(source_P, target_P, caches)
    return caches

  def _compile(self, forward, specs):
    """A jitted step; see `_step_and_count` for its arguments."""
    rows, caches = inference_mesh.ROWS, inference_mesh.BLOCKS
    in_specs = (specs, inference_mesh.REPLICATED, rows, caches, rows, rows)
    return self._mesh.jit(
      functools.partial(_step_and_count, forward),
      in_specs,
      (rows, caches, rows),
      donate_argnums=3,
    )

  def _run(
    self, run, step_input, caches, arrays
  ) -> tuple[StepOutput, model.Caches]:
    """Runs a compiled step; the rebalancer gets the load of the experts."""
    load_PLE = None if self.rebalancer is None else self.rebalancer.load_PLE
    weights, args = (self.variables, self.router_biases), (caches, arrays)
    output, caches, load_PLE = run(*weights, step_input, *args, load_PLE)
    if self.rebalancer is not None:
      self.rebalancer.record_step(load_PLE)
    return output, caches


def check_num_speculative_tokens(
  cfg: config.ModelConfig, num_speculative_tokens: int
) -> None:
  """Checks that a model can draft so many tokens a step.

  Raises:
    InputError: the number is negative, or there is no MTP module.
  """
  if num_speculative_tokens < 0:
    raise errors.InputError(
      f'num_speculative_tokens={num_speculative_tokens} must be >= 0'
    )
  if num_speculative_tokens and not cfg.mtp.depth:
    raise errors.InputError(
      f'num_speculative_tokens={num_speculative_tokens} needs a model with an '
      'MTP module; this one has model.mtp.depth=0'
    )


def empty_caches(
  cfg: config.ModelConfig,
  num_blocks: int,
  block_size: int,
  dtype,
  *,
  drafting: bool,
  fp8: bool,
) -> model.Caches:
  """Caches of all stacks: `num_blocks` blocks of `block_size` tokens."""
  make = functools.partial(latent_cache.empty_cache, cfg, fp8=fp8)
  return model.Caches(
    make(cfg.num_dense_layers, num_blocks, block_size, dtype),
    make(cfg.num_moe_layers, num_blocks, block_size, dtype),
    make(1, num_blocks, block_size, dtype) if drafting else None,
  )


class _DraftInput(NamedTuple):
  """What the MTP module drafts from.

  previous_BTD: hidden states of the step's tokens. next_BT: the token behind
  each of them. at_B1: index of each row's last accepted token.
  """

  previous_BTD: Array
  next_BT: Array
  at_B1: Array


class _Forward(NamedTuple):
  """The functions that steps compile.

  net: the model in the form that takes the step's tokens; absorbed: the form
  that takes rows with tokens in the cache.
  """

  net: model.Model
  absorbed: model.Model
  num_speculative_tokens: int

  def chunk(self, variables, router_biases, step_input, caches, arrays):
    """One pass over a chunk, and the token behind its last one."""
    tokens_BT, last_B1 = step_input.tokens_BT, step_input.last_B[:, None]
    logits_B1V, previous_BTD, caches, load_LE = self.net.apply(
      variables,
      tokens_BT,
      step_input.index_BT,
      last_B1,
      step_input.table_Bb,
      router_biases,
      caches,
      method='forward_cached',
    )
    # A sample depends on its position in the row only, not on the chunks.
    place_B1 = jnp.take_along_axis(step_input.index_BT, last_B1, axis=1)
    token_B = sampling.sample(logits_B1V[:, 0], arrays, place_B1[:, 0])
    after_B = step_input.after_B
    follows_B = jnp.where(after_B < 0, token_B, after_B)
    is_last_BT = jnp.arange(tokens_BT.shape[1]) == last_B1
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    next_BT = jnp.where(is_last_BT, follows_B[:, None], next_BT)
    draft_input = _DraftInput(previous_BTD, next_BT, last_B1)
    speculative_Bk, caches = self._draft(
      variables, router_biases, step_input, draft_input, caches, arrays
    )
    token_B1 = token_B[:, None]
    output = StepOutput(token_B1, jnp.ones_like(token_B), speculative_Bk)
    return output, caches, load_LE

  def verify(self, variables, router_biases, step_input, caches, arrays):
    """One pass over last and speculative tokens; samples behind each."""
    batch, width = step_input.tokens_BT.shape
    index_BT = step_input.index_BT
    at_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
    logits_BTV, previous_BTD, caches, load_LE = self.net.apply(
      variables,
      step_input.tokens_BT,
      index_BT,
      at_BT,
      step_input.table_Bb,
      router_biases,
      caches,
      method='forward_cached',
    )
    arrays_M = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), arrays)
    logits_MV = logits_BTV.reshape(batch * width, -1)
    token_M = sampling.sample(logits_MV, arrays_M, index_BT.ravel())
    token_BT = token_M.reshape(batch, width)
    agrees_Bk = token_BT[:, :-1] == step_input.tokens_BT[:, 1:]
    agrees_Bk &= index_BT[:, 1:] >= 0
    accepted_B1 = jnp.sum(jnp.cumprod(agrees_Bk, axis=1), axis=1, keepdims=True)
    draft_input = _DraftInput(previous_BTD, token_BT, accepted_B1)
    speculative_Bk, caches = self._draft(
      variables, router_biases, step_input, draft_input, caches, arrays
    )
    output = StepOutput(token_BT, accepted_B1[:, 0] + 1, speculative_Bk)
    return output, caches, load_LE

  def _draft(
    self, variables, router_biases, step_input, draft_input, caches, arrays
  ):
    """Drafts, by the MTP module, the speculative tokens of the next step.

    The first comes from one pass over all tokens of the step, which also fills
    the module's cache. Each further one comes from the module's own hidden
    state; the latents that it writes are overwritten when the tokens are known.
    Tokens are drafted with the random numbers that the main model will sample
    with: those of the same position.
    """
    previous_BTD, next_BT, at_B1 = draft_input
    index_BT, net, speculative = step_input.index_BT, self.net, []
    place_B1 = jnp.take_along_axis(index_BT, at_B1, axis=1)
    for _ in range(self.num_speculative_tokens):
      logits_B1V, previous_BTD, caches = net.apply(
        variables,
        previous_BTD,
        next_BT,
        index_BT,
        at_B1,
        step_input.table_Bb,
        router_biases,
        caches,
        method='draft',
      )
      place_B1 = jnp.where(place_B1 < 0, place_B1, place_B1 + 1)
      token_B = sampling.sample(logits_B1V[:, 0], arrays, place_B1[:, 0])
      speculative.append(token_B)
      net, next_BT, index_BT = self.absorbed, token_B[:, None], place_B1
      at_B1 = jnp.zeros_like(at_B1)
    if not speculative:
      return jnp.zeros((len(at_B1), 0), jnp.int32), caches
    return jnp.stack(speculative, axis=1), caches


def _step_and_count(
  forward, variables, router_biases, step_input, caches, arrays, load_PLE
):
  """A step on one rank; adds its expert load to that of earlier steps."""
  args = (router_biases, step_input, caches, arrays)
  output, caches, load_LE = forward(variables, *args)
  if load_PLE is not None:
    load_PLE += load_LE
  return output, caches, load_PLE


def _copy(source_P, target_P, caches):
  """Copies one block on one rank, which has one entry of `source_P`."""

  def move(x):
    bits = mla_decode.bits(x)
    block = jax.lax.dynamic_index_in_dim(bits, source_P[0], axis=1)
    args = (bits, block, target_P[0])
    moved = jax.lax.dynamic_update_slice_in_dim(*args, axis=1)
    return mla_decode.from_bits(moved, x.dtype)

  return jax.tree.map(move, caches)
