"""ZeRO-1: master weights and optimizer state exist once (TR 3.2).

A parameter has two partitions. Modules read its compute form: experts are
sharded over their axes; everything else is replicated, or sharded over
`parallel.fsdp` and all-gathered by the module. Its master, like the moments,
has one dim sharded over more axes (`sharding.shard_largest_dim`): as many as
possible of those along which the compute form is replicated. A step all-gathers
compute forms from masters once, sums the gradients of all micro-batches
locally, and reduce-scatters each sum to its master.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import model

Spec = sharding.Spec
Tree = Any


class Placement(NamedTuple):
  """Where one parameter is.

  Attributes:
    compute: partition of the compute form.
    master, dim, axes: a `sharding.ShardedSpec`: the master's partition, in
      which `dim` is also sharded over `axes`; () where no dim can be divided.
    sums: axes over which gradients are summed, since devices along them see
      different tokens.
  """

  compute: Spec
  master: Spec
  dim: int
  axes: tuple[str, ...]
  sums: tuple[str, ...]


def placements(specs: Tree, shapes: Tree, sizes: Mapping[str, int]) -> Tree:
  """A `Placement` for every parameter.

  Args:
    specs: partitions of the compute forms.
    shapes: of the whole parameters.
    sizes: devices along each mesh axis.
  """
  is_spec = lambda x: isinstance(x, Spec)
  place = lambda spec, like: _place(spec, like.shape, sizes)
  return jax.tree.map(place, specs, shapes, is_leaf=is_spec)


def model_placements(
  net: model.Model,
  sizes: Mapping[str, int],
  rules: sharding.ShardingRules = sharding.RULES,
) -> Tree:
  """Placements of a model in its own form, on a mesh without a pipeline."""
  specs = model.param_specs(net, rules, sizes)
  return placements(specs, model.param_shapes(net), sizes)


def _place(spec: Spec, shape: tuple[int, ...], sizes) -> Placement:
  """Shards the master over the axes along which gradients are summed."""
  used = {axis for axes in spec for axis in sharding.axes_of(axes)}
  # Ranks of a pipeline sum the gradients of parameters that they share.
  sums = (*sharding.TOKEN_AXES, 'pipe')
  sums = tuple(axis for axis in sums if axis not in used)
  free = [axis for axis in sums if sizes[axis] > 1]
  dims = range(len(shape))
  return Placement(
    spec, *sharding.shard_largest_dim(spec, shape, free, sizes, dims), sums
  )


def gather(masters: Tree, placed: Tree) -> Tree:
  """All-gathers compute forms from masters, in a shard_map'ed function."""

  def one(w, place):
    if not place.axes:
      return w
    return jax.lax.all_gather(w, place.axes, axis=place.dim, tiled=True)

  return jax.tree.map(one, masters, placed)


def reduce(grads: Tree, placed: Tree) -> Tree:
  """Reduce-scatters gradients of compute forms to the masters' shards."""

  def one(g, place):
    reduced = tuple(axis for axis in place.sums if axis not in place.axes)
    g = collectives.psum(g, reduced)
    if not place.axes:
      return g
    return jax.lax.psum_scatter(
      g, place.axes, scatter_dimension=place.dim, tiled=True
    )

  return jax.tree.map(one, grads, placed)


def shard(replicated: Tree, placed: Tree) -> Tree:
  """This device's shard of replicated arrays: the inverse of `gather`."""

  def one(g, place):
    if not place.axes:
      return g
    size = g.shape[place.dim] // collectives.axis_size(place.axes)
    at = jax.lax.axis_index(place.axes) * size
    return jax.lax.dynamic_slice_in_dim(g, at, size, place.dim)

  return jax.tree.map(one, replicated, placed)


def norm(grads: Tree, placed: Tree) -> jax.Array:
  """Global L2 norm of masters' gradients, each entry counted once."""
  sums = {}
  pairs = zip(jax.tree.leaves(grads), leaves(placed), strict=True)
  for g, place in pairs:
    axes = tuple(
      sorted(axis for dim in place.master for axis in sharding.axes_of(dim))
    )
    square = jnp.sum(jnp.square(g.astype(jnp.float32)))
    sums[axes] = sums.get(axes, 0.0) + square
  total = sum(collectives.psum(value, axes) for axes, value in sums.items())
  return jnp.sqrt(total)


def masters(placed: Tree) -> Tree:
  """The masters' partitions."""
  return _map(lambda place: place.master, placed)


def _map(function, placed: Tree) -> Tree:
  is_place = lambda x: isinstance(x, Placement)
  return jax.tree.map(function, placed, is_leaf=is_place)


def leaves(placed: Tree) -> list[Placement]:
  is_place = lambda x: isinstance(x, Placement)
  return jax.tree.leaves(placed, is_leaf=is_place)
