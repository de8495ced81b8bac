"""Logical axes, the mesh, and the strict way from one to the other.

Parameters and activations name their dims ('embed', 'batch', ...). One frozen
table maps these names to mesh axes; an unknown name, a wrong arity or one mesh
axis used by two dims is an error and never means "unsharded".

Training and evaluation are one `jax.shard_map` over all axes: the same model
code runs on every device, on its rows of the batch and its experts, and says
what it sends. The functions at the end are for such code; outside of it every
axis has the size 1, so that one device runs the plain program.
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
  """Mesh axes of each logical name; None is replicated.

  fsdp: axes that no name has, over which matrices lie cut all the same; a
  module gathers its own when it multiplies them.
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
# Of inference: heads and FFN width over `model`, whose devices have the same
# tokens and add up what each makes of its part.
TENSOR_RULES = ShardingRules(heads='model', ffn='model')
_RULES = contextvars.ContextVar('rules', default=RULES)


class ShardedSpec(NamedTuple):
  """A partition, and which dim of it lies cut over which axes on top."""

  spec: Spec
  dim: int
  axes: tuple[str, ...]


def to_spec(
  names: tuple[str | None, ...], rules: ShardingRules, ndim: int
) -> jax.sharding.PartitionSpec:
  """The partition of an array of `ndim` dims called `names`.

  Raises:
    ValueError: an unknown name, the wrong number of names, or a mesh axis that
      two dims would share.
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
    InputError: the axes ask for more devices than there are or, in a job of
      several processes, for fewer.
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
  """The same devices in the same order, those of `pipe` as more of `data`."""
  pipe, data, *rest = mesh.devices.shape
  grid = mesh.devices.reshape(1, pipe * data, *rest)
  return jax.sharding.Mesh(grid, AXES, axis_types=mesh.axis_types)


def named_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
  """Where arrays of these partitions, a tree, are."""
  is_spec = lambda x: isinstance(x, Spec)

  def one(spec):
    # Spelt as JAX spells what a step returns, or the second would compile anew.
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
  """`function` on every device of the mesh, each on its own shards.

  Args:
    rules: by which parameters are cut, inside of it.
  """

  def run(*args):  # named as what it runs, for profiles
    before = _RULES.set(rules)
    try:
      return function(*args)
    finally:
      _RULES.reset(before)

  inner = function
  while isinstance(inner, functools.partial):
    inner = inner.func
  run.__name__ = inner.__name__
  # Losses are shares that add up over the devices, so the transpose of a sum
  # over devices is that sum again: what JAX does without tracking of replicas.
  return jax.shard_map(run, mesh=mesh, check_vma=False, **specs)


def rules() -> ShardingRules:
  """Those of the `mapped` function that is being traced."""
  return _RULES.get()


def storage_spec(
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  rules: ShardingRules,
  sizes: Mapping[str, int],
) -> ShardedSpec:
  """How a parameter lies: by its names, a matrix over `rules.fsdp` on top."""
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
  """Cuts the largest of `dims` that divides, over as many axes as divide it."""
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
  """As a tuple."""
  return (axes,) if isinstance(axes, str) else axes or ()
