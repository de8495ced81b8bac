"""Collectives over the mesh, inside a `sharding.shard_map_step`.

Outside of it every axis has size 1 and nothing is sent, so that the same code
runs unchanged on one device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.distributed import sharding


def axis_size(axes: sharding.MeshAxes) -> int:
  """Number of devices along axes in a `shard_map_step`; 1 outside."""
  return math.prod(axis_sizes()[axis] for axis in sharding.axes_of(axes))


def axis_sizes() -> dict[str, int]:
  """Number of devices by axis in a `shard_map_step`; 1 outside."""
  mesh = jax.sharding.get_abstract_mesh()
  inside = () if mesh.empty else mesh.manual_axes
  return {
    axis: mesh.shape[axis] if axis in inside else 1 for axis in sharding.AXES
  }


def local_shape(shape: tuple[int, ...], spec: sharding.Spec) -> tuple[int, ...]:
  """Shape of one device's shard of an array with this partition."""
  return tuple(
    n // axis_size(axes) for n, axes in zip(shape, spec, strict=True)
  )


def psum(x: Any, axes: sharding.MeshAxes) -> Any:
  """All-reduces (sums) a tree of arrays over the devices along axes."""
  along = tuple(axis for axis in sharding.axes_of(axes) if axis_size(axis) > 1)
  return jax.lax.psum(x, along) if along else x


def psum_f32(x: jax.Array, axes: sharding.MeshAxes) -> jax.Array:
  """All-reduces partial sums in f32; the result is rounded once."""
  if axis_size(axes) == 1:
    return x
  return psum(x.astype(jnp.float32), axes).astype(x.dtype)


def pmax(x: jax.Array, axes: sharding.MeshAxes) -> jax.Array:
  """All-reduces the maximum over the devices along axes."""
  along = tuple(axis for axis in sharding.axes_of(axes) if axis_size(axis) > 1)
  return jax.lax.pmax(x, along) if along else x


def axis_index(axis: str) -> jax.Array | int:
  """This device's index along an axis."""
  return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def shard_sequence(x_BS: jax.Array) -> jax.Array:
  """This device's tokens [B, T, ...] of full sequences, in zig-zag order.

  A sequence is split into 2 * parallel.context pieces. Device i gets pieces i
  and -1 - i, so that causal attention costs the same on every device.
  """
  parts = axis_size('context')
  if parts == 1:
    return x_BS
  pieces = jnp.stack(jnp.split(x_BS, 2 * parts, axis=1))
  here = axis_index('context')
  return jnp.concatenate([pieces[here], pieces[-1 - here]], axis=1)


def all_gather_sequence(x_BT: jax.Array) -> jax.Array:
  """The inverse of `shard_sequence`: full sequences on every device."""
  parts = axis_size('context')
  if parts == 1:
    return x_BT
  early, late = jnp.split(jax.lax.all_gather(x_BT, 'context'), 2, axis=2)
  pieces = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)
  return pieces.reshape(x_BT.shape[0], -1, *x_BT.shape[2:])
