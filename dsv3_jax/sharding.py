"""Logical axes, the mesh, and the strict way from one to the other.

Parameters and activations name their dims ('embed', 'batch', ...). One frozen
table maps these names to mesh axes; an unknown name, a wrong arity or one mesh
axis used by two dims is an error and never means "unsharded".
"""

import dataclasses
import math

import jax
import numpy as np

from dsv3_jax import config, errors

AXES = ('pipe', 'data', 'context', 'node', 'expert', 'model')
BATCH_AXES = ('data', 'node', 'expert')

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """Mesh axes of each logical name; None is replicated."""

  batch: MeshAxes = BATCH_AXES
  sequence: MeshAxes = 'context'
  layers: MeshAxes = None
  vocab: MeshAxes = None
  embed: MeshAxes = None
  heads: MeshAxes = None
  head_dim: MeshAxes = None
  q_latent: MeshAxes = None
  kv_latent: MeshAxes = None
  ffn: MeshAxes = None
  experts: MeshAxes = None


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
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      if axis in used:
        raise ValueError(f'mesh axis {axis!r} would shard two dims of {names}')
      used.add(axis)
    parts.append(axes)
  return jax.sharding.PartitionSpec(*parts)


def constrain(
  x: jax.Array, names: tuple[str | None, ...], rules: ShardingRules = RULES
) -> jax.Array:
  """Pins the sharding of `x` inside jit; checks the names on any mesh."""
  spec = to_spec(names, rules, x.ndim)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def make_mesh(cfg: config.MeshConfig) -> jax.sharding.Mesh:
  """The mesh over the first devices, axes in the order of `AXES`.

  Raises:
    InputError: the axes ask for more devices than there are.
  """
  shape = tuple(getattr(cfg, axis) for axis in AXES)
  count, devices = math.prod(shape), jax.devices()
  if count > len(devices):
    asked = ', '.join(f'mesh.{a}={n}' for a, n in zip(AXES, shape, strict=True))
    raise errors.InputError(
      f'{asked} need {count} devices, {len(devices)} are here'
    )
  grid = np.asarray(devices[:count]).reshape(shape)
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=types)


def batch_shards() -> int:
  """Number of parts that the current mesh cuts the batch into."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
