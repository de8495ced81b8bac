"""Logical axes, the mesh, and the strict way from one to the other.

Parameters and activations name their dims ('embed', 'batch', ...). One frozen
table maps these names to mesh axes; an unknown name, a wrong arity or one mesh
axis used by two dims is an error and never means "unsharded".

Training and evaluation are one `jax.shard_map` over all axes: the same model
code runs on every device, on its rows of the batch and its experts, and says
what it sends. The functions at the end are for such code; outside of it every
axis has the size 1, so that one device runs the plain program.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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
  """Mesh axes of each logical name; None is replicated."""

  batch: MeshAxes = BATCH_AXES
  sequence: MeshAxes = 'context'
  layers: MeshAxes = None
  vocab: MeshAxes = 'pipe'
  embed: MeshAxes = None
  heads: MeshAxes = None
  head_dim: MeshAxes = None
  q_latent: MeshAxes = None
  kv_latent: MeshAxes = None
  ffn: MeshAxes = None
  experts: MeshAxes = EXPERT_AXES


RULES = ShardingRules()


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
  parts, used = [], set()
  for name in names:
    if name is None:
      parts.append(None)
      continue
    if name not in known:
      raise ValueError(f'logical axis {name!r} is unknown; known: {known}')
    axes = getattr(rules, name)
    for axis in _tuple(axes):
      if axis in used:
        raise ValueError(f'mesh axis {axis!r} would shard two dims of {names}')
      used.add(axis)
    parts.append(axes)
  return jax.sharding.PartitionSpec(*parts)


def make_mesh(cfg: config.ParallelConfig) -> jax.sharding.Mesh:
  """The mesh over the first devices, axes in the order of `AXES`.

  Raises:
    InputError: the axes ask for more devices than there are.
  """
  shape = tuple(getattr(cfg, axis) for axis in AXES)
  count, devices = math.prod(shape), jax.devices()
  if count > len(devices):
    asked = ', '.join(
      f'parallel.{a}={n}' for a, n in zip(AXES, shape, strict=True)
    )
    raise errors.InputError(
      f'{asked} need {count} devices, {len(devices)} are here'
    )
  grid = np.asarray(devices[:count]).reshape(shape)
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=types)


def without_pipe(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """The same devices in the same order, those of `pipe` as more of `data`."""
  pipe, data, *rest = mesh.devices.shape
  grid = mesh.devices.reshape(1, pipe * data, *rest)
  return jax.sharding.Mesh(grid, AXES, axis_types=mesh.axis_types)


def mapped(function: Callable, mesh: jax.sharding.Mesh, **specs) -> Callable:
  """`function` on every device of the mesh, each on its own shards."""
  # Losses are shares that add up over the devices, so the transpose of a sum
  # over devices is that sum again: what JAX does without tracking of replicas.
  return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)


def size(axes: MeshAxes) -> int:
  """Devices along axes, inside a `mapped` function; 1 outside."""
  mesh = jax.sharding.get_abstract_mesh()
  inside = () if mesh.empty else mesh.manual_axes
  return math.prod(mesh.shape[axis] for axis in _tuple(axes) if axis in inside)


def local_shape(
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  rules: ShardingRules = RULES,
) -> tuple[int, ...]:
  """What of an array with the given logical axes is on one device."""
  spec = to_spec(names, rules, len(shape))
  return tuple(n // size(axes) for n, axes in zip(shape, spec, strict=True))


def psum(x: Any, axes: MeshAxes) -> Any:
  """Sum of a tree of arrays over the devices along axes."""
  along = tuple(axis for axis in _tuple(axes) if size(axis) > 1)
  return jax.lax.psum(x, along) if along else x


def pmax(x: jax.Array, axes: MeshAxes) -> jax.Array:
  """Maximum over the devices along axes."""
  along = tuple(axis for axis in _tuple(axes) if size(axis) > 1)
  return jax.lax.pmax(x, along) if along else x


def index(axis: str) -> jax.Array | int:
  """This device's number along an axis."""
  return jax.lax.axis_index(axis) if size(axis) > 1 else 0


def _tuple(axes: MeshAxes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else axes or ()
