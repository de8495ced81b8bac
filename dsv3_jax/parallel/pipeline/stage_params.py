"""The stages of a rank: from masters to compute weights, and gradients back.

Under DualPipe rank r runs stages r and R - 1 - r and holds the master of one:
weights of the other come from the mirrored rank, where its gradients go back.
Every other schedule's rank holds the masters of all its stages.

Letters: R ranks, c chunks (stages) of a rank, n slots of a chunk.
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
AXIS = 'pipe'


class Weights(NamedTuple):
  """What a stage multiplies: f32 weights by name, and their FP8 forms."""

  weights: Tree
  quantized: Tree


class Chunk(NamedTuple):
  """One stage's layers `dense_0, ..., moe_0, ...` and biases of its gates."""

  layers: Weights
  bias_nE: jax.Array


@dataclasses.dataclass(frozen=True)
class Chunks:
  """How the stages of a rank come from its masters."""

  cfg: config.Config
  layout: param_layout.Layout
  schedule: actions.Schedule

  @property
  def mirrored(self) -> bool:
    return len(self.schedule.homes) > 1

  def from_masters(self, params: Tree, router: Tree) -> list[Chunk]:
    """A `Chunk` for each stage of this rank, lowest first.

    Args:
      params, router: 'dense' and 'moe' of either are [1, c, n, ...].
    """
    stacks = {k: params[k] for k in param_layout.STACKS if k in params}
    if 'moe' in stacks:
      stacks['bias'] = router['moe']
    count = len(self.layout.held[0])
    take = lambda c: jax.tree.map(lambda x: x[0, c], stacks)
    each = [take(c) for c in range(count)]
    if self.mirrored:
      each = self._lower_first(each[0], jax.tree.map(self._mirror, each[0]))
    return [self._chunk(dict(stack)) for stack in each]

  def _chunk(self, stacks: dict) -> Chunk:
    none = jnp.zeros((0, self.cfg.model.moe.num_experts), jnp.float32)
    bias_nE = stacks.pop('bias', none)
    named = {}
    for stack, tree in stacks.items():
      for n in range(self.layout.slots(stack)):
        named[f'{stack}_{n}'] = jax.tree.map(lambda x, n=n: x[n], tree)
    return Chunk(self.weights(named), bias_nE)

  def weights(self, named: Tree) -> Weights:
    """With the FP8 forms, if the precision has such."""
    policy = precision.POLICIES[self.cfg.precision]
    made = model.quantize(policy, named)
    return Weights(named, made.get('quantized', {}))

  def to_masters(self, chunks: list[Tree]) -> Tree:
    """Sums for masters, from one tree like `Chunk.layers.weights` a chunk."""
    each = []
    for named in chunks:
      stacks = {}
      for stack in param_layout.STACKS:
        slots = range(self.layout.slots(stack))
        trees = [named[f'{stack}_{n}'] for n in slots]
        if trees:
          stacks[stack] = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
      each.append(stacks)
    return self.sums(each)

  def sums(self, each: list[Tree]) -> Tree:
    """[n, ...] a chunk -> [1, c, n, ...] of the masters' stages."""
    if self.mirrored:
      own, other = self._lower_first(*each)
      add = lambda a, b: a + self._mirror(b)
      each = [jax.tree.map(add, own, other)]
    return jax.tree.map(lambda *xs: jnp.stack(xs)[None], *each)

  def _lower_first(self, a: Tree, b: Tree) -> list[Tree]:
    """(own, mirrored) -> (lower, upper stage), or the reverse: its inverse."""
    lower = jax.lax.axis_index(AXIS) < self.schedule.ranks // 2
    pick = lambda x, y: jax.tree.map(lambda x, y: jnp.where(lower, x, y), x, y)
    return [pick(a, b), pick(b, a)]

  def _mirror(self, x: jax.Array) -> jax.Array:
    """What the mirrored rank has."""
    ranks = self.schedule.ranks
    pairs = [(rank, ranks - 1 - rank) for rank in range(ranks)]
    return jax.lax.ppermute(x, AXIS, pairs)
