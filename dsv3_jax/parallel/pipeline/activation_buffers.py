"""Buffers of what one pass of a stage saves for a later one.

A rank runs stages of several kinds. One program serves all ranks, so every rank
has room for every kind. Arrays of one shape and dtype share a buffer. A slot
has room for the arrays of the kind that has most of them. A rank therefore
needs as many slots as it holds micro-batches at a time, of all its stages
together.

Dims of a buffer: s slots, n places for arrays of one shape, then the shape.
"""

import collections
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp

Buffers = dict[str, jax.Array]


class ActivationBuffers:
  """Where the arrays of each kind are in the shared buffers."""

  def __init__(self, shapes: Mapping[Hashable, Sequence]):
    """Args: shapes: of the arrays (`.shape` and `.dtype`) of every kind."""
    self._avals, self._places, self._most = {}, {}, collections.Counter()
    for kind, avals in shapes.items():
      used = collections.Counter()
      places = []
      for aval in avals:
        name = f'{aval.dtype}[{",".join(map(str, aval.shape))}]'
        self._avals[name] = aval
        places.append((name, used[name]))
        used[name] += 1
      self._places[kind] = places
      self._most |= used  # the larger of both counts

  def empty(self, slots: int) -> Buffers:
    """Zeros, [s, n, ...] by shape."""
    return {
      name: jnp.zeros((slots, self._most[name], *aval.shape), aval.dtype)
      for name, aval in self._avals.items()
    }

  def put(
    self, buffers: Buffers, kind: Hashable, slot: jax.Array, values: Sequence
  ) -> Buffers:
    """The buffers with the arrays of a kind in a slot."""
    buffers = dict(buffers)
    for (name, n), x in zip(self._places[kind], values, strict=True):
      at = (slot, n, *[0] * x.ndim)
      buffers[name] = jax.lax.dynamic_update_slice(
        buffers[name], x[None, None], at, allow_negative_indices=False
      )
    return buffers

  def take(
    self, buffers: Buffers, kind: Hashable, slot: jax.Array
  ) -> list[jax.Array]:
    """The arrays of a kind out of a slot."""
    arrays = []
    for name, n in self._places[kind]:
      buffer = buffers[name]
      at, size = (slot, n, *[0] * (buffer.ndim - 2)), buffer.shape[2:]
      x = jax.lax.dynamic_slice(
        buffer, at, (1, 1, *size), allow_negative_indices=False
      )
      arrays.append(x.reshape(size))
    return arrays


def read_slot(buffer: jax.Array, slot: jax.Array) -> jax.Array:
  """The array in a slot, which is not negative."""
  return jax.lax.dynamic_index_in_dim(
    buffer, slot, keepdims=False, allow_negative_indices=False
  )


def write_slot(buffer: jax.Array, slot: jax.Array, x: jax.Array) -> jax.Array:
  """The buffer with x in a slot, which is not negative."""
  return jax.lax.dynamic_update_index_in_dim(
    buffer, x, slot, 0, allow_negative_indices=False
  )
