"""In which form a training state holds the model's parameters.

Without a pipeline the form is the model's own (`IdentityLayout`). A pipeline
holds layers by rank, chunk and slot (`PipelineLayout`): the model's two stacks,
dense and MoE, become [P, c, n, ...]. Each of P ranks has the masters of c
stages, and each stage has n slots, as many as the fullest stage needs. Slots
beyond a stage's own layers are zeros and never read. Embedding, head, final
norm and MTP modules stay as they are. Conversions are exact both ways.

P counts ranks, c chunks (stages) of a rank, n slots (layers) of a chunk, L
layers of a stack.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.distributed import processes, sharding

Tree = Any
Spec = sharding.Spec
AXIS = 'pipe'
STACKS = {'dense': 'dense_layers', 'moe': 'moe_layers'}


@runtime_checkable
class ParamLayout(Protocol):
  """Converts parameters, and what is shaped like them, to a state's form.

  Router biases are `{'moe': [L, E], 'mtp': [depth, E]}` in the model's form.
  """

  def from_model(self, params: Tree) -> Tree:
    """The model's parameters in the state's form."""

  def to_model(self, params: Tree) -> Tree:
    """The inverse of `from_model`."""

  def router_biases_from_model(self, router_biases: Tree) -> Tree:
    """The model's router biases in the state's form."""

  def router_biases_to_model(self, router_biases: Tree) -> Tree:
    """The inverse of `router_biases_from_model`."""

  def router_biases_specs(self, router_biases: Tree) -> Tree:
    """Partitions of the biases in the state's form."""

  def all_loads(self, load: jax.Array) -> jax.Array:
    """Expert loads of all MoE layers, [L, E], in a shard_map'ed function."""

  def compile(self, convert: Callable[..., Tree], shardings: Tree) -> Callable:
    """A conversion by these methods, with arrays placed by `shardings`."""


@dataclasses.dataclass(frozen=True)
class IdentityLayout:
  """The model's own form: every conversion returns its argument."""

  def from_model(self, params: Tree) -> Tree:
    return params

  def to_model(self, params: Tree) -> Tree:
    return params

  def router_biases_from_model(self, router_biases: Tree) -> Tree:
    return router_biases

  def router_biases_to_model(self, router_biases: Tree) -> Tree:
    return router_biases

  def router_biases_specs(self, router_biases: Tree) -> Tree:
    return {name: Spec() for name in router_biases}

  def all_loads(self, load: jax.Array) -> jax.Array:
    return load

  def compile(self, convert: Callable[..., Tree], shardings: Tree) -> Callable:
    """Nothing to compile: arrays pass as they are."""
    del convert, shardings
    return lambda tree: tree


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
  """Layers by rank, chunk and slot.

  Attributes:
    stages: in the order of the forward pass.
    held: for each rank the stages whose masters it has. All ranks have the same
      number of stages, and every stage occurs once.
    scanned: the model's stacks are arrays [L, ...] (`model.scan_layers`).
  """

  stages: tuple[StageLayers, ...]
  held: tuple[tuple[int, ...], ...]
  scanned: bool

  def slots(self, stack: str) -> int:
    """Slots of a chunk: as many as the fullest stage has layers."""
    return max(stage.count(stack) for stage in self.stages)

  def layers_Pcn(self, stack: str) -> np.ndarray:
    """Number of the layer in each slot, -1 in slots beyond the stage's."""
    layers_Pcn = np.full(
      (len(self.held), len(self.held[0]), self.slots(stack)), -1
    )
    for rank, chunks in enumerate(self.held):
      for chunk, stage in enumerate(chunks):
        of_stage = np.arange(*getattr(self.stages[stage], stack))
        layers_Pcn[rank, chunk, : len(of_stage)] = of_stage
    return layers_Pcn

  def from_model(self, params: Tree) -> Tree:
    """The model's parameters (or anything shaped like them), by slots."""
    tree = {k: v for k, v in params.items() if k not in STACKS.values()}
    for stack, name in STACKS.items():
      if name in params:
        put = lambda x, stack=stack: self.to_slots(stack, x)
        tree[stack] = jax.tree.map(put, self._stacked(params[name]))
    return tree

  def to_model(self, slots: Tree) -> Tree:
    """The inverse of `from_model`."""
    tree = {k: v for k, v in slots.items() if k not in STACKS}
    for stack, name in STACKS.items():
      if stack in slots:
        take = lambda x, stack=stack: self.from_slots(stack, x)
        tree[name] = self._unstacked(jax.tree.map(take, slots[stack]))
    return tree

  def router_biases_from_model(self, router_biases: Tree) -> Tree:
    if 'moe' in router_biases:
      router_biases = router_biases | {
        'moe': self.to_slots('moe', router_biases['moe'])
      }
    return router_biases

  def router_biases_to_model(self, router_biases: Tree) -> Tree:
    if 'moe' in router_biases:
      router_biases = router_biases | {
        'moe': self.from_slots('moe', router_biases['moe'])
      }
    return router_biases

  def router_biases_specs(self, router_biases: Tree) -> Tree:
    """Biases of MoE layers are on the rank of their layers."""
    return {k: Spec(AXIS) if k == 'moe' else Spec() for k in router_biases}

  def all_loads(self, load: jax.Array) -> jax.Array:
    load = jax.lax.all_gather(load, AXIS, axis=0, tiled=True)
    return self.from_slots('moe', load)

  def compile(self, convert: Callable[..., Tree], shardings: Tree) -> Callable:
    return processes.compile_then_barrier(
      jax.jit(convert, out_shardings=shardings)
    )

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
  layer_ranges: Sequence[tuple[int, int]],
  held: Sequence[Sequence[int]],
) -> PipelineLayout:
  """A layout of all layers.

  Args:
    layer_ranges: of each stage, its first layer and the one after its last.
    held: of each rank, the stages whose masters it has.
  """
  dense = cfg.num_dense_layers
  stages = tuple(
    StageLayers(
      dense=(min(first, dense), min(end, dense)),
      moe=(max(first - dense, 0), max(end - dense, 0)),
    )
    for first, end in layer_ranges
  )
  return PipelineLayout(
    stages=stages, held=tuple(map(tuple, held)), scanned=cfg.scan_layers
  )


def _module(x) -> Any:
  """NumPy for host arrays, which are to stay on the host; else jnp."""
  return np if isinstance(x, np.ndarray) else jnp
