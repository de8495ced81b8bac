"""The stages of a rank: from masters to compute weights, and gradients back.

Under DualPipe rank r of P runs stages r and P - 1 - r but holds the masters of
stage r only. Weights of the other stage come from the mirrored rank P - 1 - r,
and their gradients go back to it. Under every other schedule a rank holds the
masters of all its stages.

c counts chunks (stages) of a rank, n slots (layers) of a chunk.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.nn import model
from dsv3_jax.parallel.pipeline import param_layout
from dsv3_jax.parallel.schedules import actions

Tree = Any
AXIS = param_layout.AXIS


class StageWeights(NamedTuple):
  """Weights of a stage: f32 by name, and their FP8 forms."""

  weights: Tree
  quantized: Tree


class ChunkParams(NamedTuple):
  """One stage's layers `dense_0, ..., moe_0, ...` and its router biases."""

  layers: StageWeights
  bias_nE: jax.Array


@dataclasses.dataclass(frozen=True)
class MasterConverter:
  """Converts a rank's masters to weights of its stages, and sums back."""

  cfg: config.Config
  layout: param_layout.PipelineLayout
  schedule: actions.Schedule

  @property
  def mirrored(self) -> bool:
    return len(self.schedule.homes) > 1

  def from_masters(
    self, params: Tree, router_biases: Tree
  ) -> list[ChunkParams]:
    """A `ChunkParams` for each stage of this rank, lowest first.

    Args:
      params, router_biases: 'dense' and 'moe' of either are [1, c, n, ...].
    """
    stacks = {k: params[k] for k in param_layout.STACKS if k in params}
    if 'moe' in stacks:
      stacks['bias'] = router_biases['moe']
    count = len(self.layout.held[0])
    take = lambda c: jax.tree.map(lambda x: x[0, c], stacks)
    chunks = [take(c) for c in range(count)]
    if self.mirrored:
      other = jax.tree.map(self._mirror, chunks[0])
      chunks = self._lower_first(chunks[0], other)
    return [self._chunk(dict(stacks)) for stacks in chunks]

  def _chunk(self, stacks: dict) -> ChunkParams:
    none = jnp.zeros((0, self.cfg.model.moe.num_experts), jnp.float32)
    bias_nE = stacks.pop('bias', none)
    named = {}
    for stack, tree in stacks.items():
      for n in range(self.layout.slots(stack)):
        named[f'{stack}_{n}'] = jax.tree.map(lambda x, n=n: x[n], tree)
    return ChunkParams(self.weights(named), bias_nE)

  def weights(self, named: Tree) -> StageWeights:
    """Weights with their FP8 forms, which exist in FP8 training only."""
    policy = precision.POLICIES[self.cfg.precision]
    forms = model.quantize(policy, named)
    return StageWeights(named, forms.get('quantized', {}))

  def to_masters(self, chunks: list[Tree]) -> Tree:
    """Sums of the masters, from sums like `layers.weights` of each chunk."""
    stacks_by_chunk = []
    for named in chunks:
      stacks = {}
      for stack in param_layout.STACKS:
        slots = range(self.layout.slots(stack))
        trees = [named[f'{stack}_{n}'] for n in slots]
        if trees:
          stacks[stack] = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
      stacks_by_chunk.append(stacks)
    return self.sums(stacks_by_chunk)

  def sums(self, chunks: list[Tree]) -> Tree:
    """[n, ...] for each chunk -> [1, c, n, ...] for the masters' stages."""
    if self.mirrored:
      own, other = self._lower_first(*chunks)
      add = lambda a, b: a + self._mirror(b)
      chunks = [jax.tree.map(add, own, other)]
    return jax.tree.map(lambda *xs: jnp.stack(xs)[None], *chunks)

  def _lower_first(self, a: Tree, b: Tree) -> list[Tree]:
    """(own, mirrored) -> (lower, upper stage); it is its own inverse."""
    lower = jax.lax.axis_index(AXIS) < self.schedule.ranks // 2
    pick = lambda x, y: jax.tree.map(lambda x, y: jnp.where(lower, x, y), x, y)
    return [pick(a, b), pick(b, a)]

  def _mirror(self, x: jax.Array) -> jax.Array:
    """The mirrored rank's array."""
    ranks = self.schedule.ranks
    pairs = [(rank, ranks - 1 - rank) for rank in range(ranks)]
    return jax.lax.ppermute(x, AXIS, pairs)
