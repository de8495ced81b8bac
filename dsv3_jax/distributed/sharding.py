"""The mesh, and the rules that map logical dim names to its axes.

Parameters and activations name their dims ('embed', 'batch', ...). A frozen
table, `ShardingRules`, maps these names to mesh axes. An unknown name, a wrong
number of names, or a mesh axis used by two dims is an error and never means
"replicated".

Training and evaluation are one `jax.shard_map` over all axes
(`shard_map_step`): the same model code runs on every device, on its sequences
of the batch and its experts, with explicit collectives (`collectives.py`).
"""

import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax import config, errors

AXES = ('pipe', 'data', 'context', 'node', 'expert', 'model')
BATCH_AXES = ('data', 'node', 'expert')
EXPERT_AXES = ('node', 'expert')
TOKEN_AXES = (*BATCH_AXES, 'context')  # every token is on one of these

Spec = jax.sharding.PartitionSpec
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """Mesh axes by logical name; None is replicated.

  fsdp: further axes that stored matrices are sharded over. A module
    all-gathers its matrices just before it multiplies them.
  """

  batch: MeshAxes = BATCH_AXES
  layers: MeshAxes = None
  vocab: MeshAxes = 'pipe'
  embed: MeshAxes = None
  heads: MeshAxes = None
  head_dim: MeshAxes = None
  q_latent: MeshAxes = None
  kv_latent: MeshAxes = None
  ffn: MeshAxes = None
  experts: MeshAxes = EXPERT_AXES
  fsdp: tuple[str, ...] = ()


RULES = ShardingRules()
# Tensor parallelism, of inference only: heads and FFN width over `model`. Its
# devices have the same tokens and all-reduce their partial outputs.
TENSOR_RULES = ShardingRules(heads='model', ffn='model')
_RULES = contextvars.ContextVar('rules', default=RULES)


class ShardedSpec(NamedTuple):
  """A partition in which `dim` is also sharded over `axes`."""

  spec: Spec
  dim: int
  axes: tuple[str, ...]


def to_spec(
  names: tuple[str | None, ...], rules: ShardingRules, ndim: int
) -> jax.sharding.PartitionSpec:
  """The partition of an array whose `ndim` dims have these logical names.

  Raises:
    ValueError: an unknown name, the wrong number of names, or a mesh axis that
      would shard two dims.
  """
  if len(names) != ndim:
    raise ValueError(f'{names} names {len(names)} dims of an array of {ndim}')
  known = [field.name for field in dataclasses.fields(rules)]
  known.remove('fsdp')
  parts, used = [], set()
  for name in names:
    if name is None:
      parts.append(None)
      continue
    if name not in known:
      raise ValueError(f'logical axis {name!r} is unknown; known: {known}')
    axes = getattr(rules, name)
    for axis in axes_of(axes):
      if axis in used:
        raise ValueError(f'mesh axis {axis!r} would shard two dims of {names}')
      used.add(axis)
    parts.append(axes)
  return jax.sharding.PartitionSpec(*parts)


def make_mesh(cfg: config.ParallelConfig) -> jax.sharding.Mesh:
  """The mesh over the first devices, axes in the order of `AXES`.

  Raises:
    InputError: the mesh has more devices than there are or, in a job of several
      processes, fewer.
  """
  shape = tuple(getattr(cfg, axis) for axis in AXES)
  count, devices = math.prod(shape), jax.devices()
  asked = ', '.join(
    f'parallel.{a}={n}' for a, n in zip(AXES, shape, strict=True)
  )
  if count > len(devices):
    raise errors.InputError(
      f'{asked} need {count} devices, {len(devices)} are here'
    )
  if count < len(devices) and jax.process_count() > 1:
    raise errors.InputError(
      f'{asked} use {count} of the {len(devices)} devices of '
      f'{jax.process_count()} processes: they must use all'
    )
  grid = np.asarray(devices[:count]).reshape(shape)
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=types)


def without_pipe(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """A mesh of the same devices, with `pipe` folded into `data`."""
  pipe, data, *rest = mesh.devices.shape
  grid = mesh.devices.reshape(1, pipe * data, *rest)
  return jax.sharding.Mesh(grid, AXES, axis_types=mesh.axis_types)


def named_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree of partitions as NamedShardings of a mesh."""
  is_spec = lambda x: isinstance(x, Spec)

  def one(spec):
    # Spelt as in the outputs of a jitted step. Otherwise the second call, whose
    # inputs are these outputs, would compile again.
    real = lambda axes: tuple(
      axis for axis in axes_of(axes) if mesh.shape[axis] > 1
    )
    parts = [real(axes) or None for axes in spec]
    while parts and parts[-1] is None:
      parts.pop()
    return jax.sharding.NamedSharding(mesh, Spec(*parts))

  return jax.tree.map(one, specs, is_leaf=is_spec)


def shard_map_step(
  function: Callable,
  mesh: jax.sharding.Mesh,
  rules: ShardingRules = RULES,
  **specs,
) -> Callable:
  """`function` under `jax.shard_map` over all axes of the mesh.

  Args:
    rules: by which parameters are sharded; `sharding.rules()` returns them
      inside the function.
    specs: `in_specs` and `out_specs`.
  """

  def run(*args):  # gets the name of `function`, for profiles
    before = _RULES.set(rules)
    try:
      return function(*args)
    finally:
      _RULES.reset(before)

  inner = function
  while isinstance(inner, functools.partial):
    inner = inner.func
  run.__name__ = inner.__name__
  # A loss is this device's share of a sum over devices, so the transpose of
  # psum is psum. JAX does that if it does not track replication.
  return jax.shard_map(run, mesh=mesh, check_vma=False, **specs)


def rules() -> ShardingRules:
  """The rules of the `shard_map_step` that is being traced."""
  return _RULES.get()


def storage_spec(
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  rules: ShardingRules,
  sizes: Mapping[str, int],
) -> ShardedSpec:
  """Partition of a stored parameter: by its names, matrices also by FSDP."""
  spec = to_spec(names, rules, len(shape))
  used = {axis for axes in spec for axis in axes_of(axes)}
  dims = [dim for dim, name in enumerate(names) if name != 'layers']
  free = [a for a in rules.fsdp if a not in used and sizes[a] > 1]
  return shard_largest_dim(
    spec, shape, free if len(dims) > 1 else (), sizes, dims
  )


def shard_largest_dim(
  spec: Spec,
  shape: tuple[int, ...],
  free: Sequence[str],
  sizes: Mapping[str, int],
  dims: Sequence[int],
) -> ShardedSpec:
  """Shards one more dim: over as many `free` axes as divide one of `dims`.

  Of the dims that they divide, the largest is chosen.
  """
  by_length = sorted(dims, key=lambda dim: -shape[dim])
  counts = range(len(free), 0, -1)
  choices = [c for n in counts for c in itertools.combinations(free, n)]
  for axes, dim in itertools.product(choices, by_length):
    along = axes_of(spec[dim]) + axes
    if shape[dim] % math.prod(sizes[axis] for axis in along) == 0:
      parts = list(spec)
      parts[dim] = along
      return ShardedSpec(Spec(*parts), dim, axes)
  return ShardedSpec(spec, 0, ())


def axes_of(axes: MeshAxes) -> tuple[str, ...]:
  """Mesh axes as a tuple."""
  return (axes,) if isinstance(axes, str) else axes or ()
