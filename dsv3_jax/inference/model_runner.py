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

import jax
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.inference import (
  block_pool,
  forward,
  redundant_experts,
  sampling,
  token_cache,
)
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.nn import latent_cache, model
from pallas_kernels.mla_decode import api as mla_decode


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
    first = forward.Forward(naive, absorbed, num_speculative_tokens)
    later = forward.Forward(absorbed, absorbed, num_speculative_tokens)
    self._prefill = self._compile(first.chunk, specs)
    self._extend = self._compile(later.chunk, specs)
    self._score = self._compile(later.score, specs)
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
    step_input: forward.StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[forward.StepOutput, model.Caches]:
    """One new token of each row; donates `caches`."""
    return self._run(self._prefill, step_input, caches, arrays)

  def extend(
    self,
    step_input: forward.StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[forward.StepOutput, model.Caches]:
    """As `prefill`, for rows that have tokens in the cache."""
    return self._run(self._extend, step_input, caches, arrays)

  def score(
    self,
    step_input: forward.StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[forward.StepOutput, model.Caches]:
    """As `extend`, with the log-probabilities of the prompt's own tokens."""
    return self._run(self._score, step_input, caches, arrays)

  def decode(
    self,
    step_input: forward.StepInput,
    caches: model.Caches,
    arrays: sampling.SamplingArrays,
  ) -> tuple[forward.StepOutput, model.Caches]:
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

  def _compile(self, function, specs):
    """A jitted step; see `_step_and_count` for its arguments."""
    rows, caches = inference_mesh.ROWS, inference_mesh.BLOCKS
    in_specs = (specs, inference_mesh.REPLICATED, rows, caches, rows, rows)
    return self._mesh.jit(
      functools.partial(_step_and_count, function),
      in_specs,
      (rows, caches, rows),
      donate_argnums=3,
    )

  def _run(
    self, run, step_input, caches, arrays
  ) -> tuple[forward.StepOutput, model.Caches]:
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
    token_cache.empty(num_blocks, block_size),
  )


def _step_and_count(
  function, variables, router_biases, step_input, caches, arrays, load_PLE
):
  """A step on one rank; adds its expert load to that of earlier steps."""
  args = (router_biases, step_input, caches, arrays)
  output, caches, load_LE = function(variables, *args)
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
