"""Parameters as a pipeline holds them: by rank, chunk and slot.

The model has its layers in two stacks, dense and MoE, of any length. A pipeline
holds them as [P, c, n, ...]: P ranks, of each the c stages whose masters it
has, of each stage n slots, as many as the fullest stage needs; slots beyond a
stage's own layers are zeros and nothing ever reads them. Everything that is no
layer stays as it is. Both ways are exact.

Letters: P ranks, c chunks of a rank, n slots of a chunk; L layers of a stack.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config

Tree = Any
STACKS = {'dense': 'dense_layers', 'moe': 'moe_layers'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLayers:
  """The layers of one stage: first and one after the last of each stack."""

  dense: tuple[int, int]
  moe: tuple[int, int]

  def count(self, stack: str) -> int:
    first, end = getattr(self, stack)
    return end - first


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineLayout:
  """Which layer is in which slot.

  stages: in the order of the forward pass. held: of each rank the stages whose
  masters it has; every rank has as many, and every stage is once there.
  scanned: the model's stacks are arrays [L, ...] (`model.scan_layers`).
  """

  stages: tuple[StageLayers, ...]
  held: tuple[tuple[int, ...], ...]
  scanned: bool

  def slots(self, stack: str) -> int:
    """Of a chunk: layers of the fullest stage."""
    return max(stage.count(stack) for stage in self.stages)

  def layers_Pcn(self, stack: str) -> np.ndarray:
    """Number of the layer in each slot, -1 in slots beyond the stage's."""
    found = np.full((len(self.held), len(self.held[0]), self.slots(stack)), -1)
    for rank, chunks in enumerate(self.held):
      for chunk, stage in enumerate(chunks):
        layers = np.arange(*getattr(self.stages[stage], stack))
        found[rank, chunk, : len(layers)] = layers
    return found

  def from_model(self, params: Tree) -> Tree:
    """The model's parameters (or anything shaped like them), by slots."""
    found = {k: v for k, v in params.items() if k not in STACKS.values()}
    for stack, name in STACKS.items():
      if name in params:
        put = lambda x, stack=stack: self.to_slots(stack, x)
        found[stack] = jax.tree.map(put, self._stacked(params[name]))
    return found

  def to_model(self, slots: Tree) -> Tree:
    """The inverse of `from_model`."""
    found = {k: v for k, v in slots.items() if k not in STACKS}
    for stack, name in STACKS.items():
      if stack in slots:
        take = lambda x, stack=stack: self.from_slots(stack, x)
        found[name] = self._unstacked(jax.tree.map(take, slots[stack]))
    return found

  def to_slots(self, stack: str, x_L):
    """[L, ...] -> [P, c, n, ...]."""
    at_Pcn = self.layers_Pcn(stack)
    used = (at_Pcn >= 0).reshape(*at_Pcn.shape, *[1] * (x_L.ndim - 1))
    x = x_L[np.maximum(at_Pcn, 0)]
    return _module(x).where(used, x, _module(x).zeros((), x.dtype))

  def from_slots(self, stack: str, x_Pcn):
    """[P, c, n, ...] -> [L, ...]."""
    at = self.layers_Pcn(stack).reshape(-1)
    order = np.argsort(at)[np.sum(at < 0) :]  # slots of layers 0, 1, ...
    return x_Pcn.reshape(-1, *x_Pcn.shape[3:])[order]

  def _stacked(self, stack: Tree) -> Tree:
    if self.scanned:
      return stack['layers']
    layers = [stack[f'layer_{i}'] for i in range(len(stack))]
    return jax.tree.map(lambda *xs: _module(xs[0]).stack(xs), *layers)

  def _unstacked(self, layers: Tree) -> Tree:
    if self.scanned:
      return {'layers': layers}
    count = len(jax.tree.leaves(layers)[0])
    take = lambda i: jax.tree.map(lambda x: x[i], layers)
    return {f'layer_{i}': take(i) for i in range(count)}


def make(
  cfg: config.ModelConfig,
  cuts: Sequence[tuple[int, int]],
  held: Sequence[Sequence[int]],
) -> PipelineLayout:
  """A layout of all layers.

  Args:
    cuts: of each stage, its first layer and the one after its last.
    held: of each rank, the stages whose masters it has.
  """
  dense = cfg.num_dense_layers
  stages = tuple(
    StageLayers(
      dense=(min(first, dense), min(end, dense)),
      moe=(max(first - dense, 0), max(end - dense, 0)),
    )
    for first, end in cuts
  )
  return PipelineLayout(
    stages=stages, held=tuple(map(tuple, held)), scanned=cfg.scan_layers
  )


def _module(x) -> Any:
  """NumPy for host arrays: they are not to go to a device."""
  return np if isinstance(x, np.ndarray) else jnp
