"""Slots of redundant experts, and the choice between them (TR 3.4).

A slot is room for the weights of one expert. There are Z of them, more than
experts or as many, sharded over devices as experts are without redundancy;
which expert is in a slot is data, so that it can change between two steps. The
tokens of an expert take its slots in turn.

Letters: Z slots, r = Z - E + 1, the most slots that an expert can have.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives, sharding


class RedundantSlots(NamedTuple):
  """Slots of each expert of a layer: the first `count_E` of `slots_Er`."""

  slots_Er: Int[Array, 'E r']
  count_E: Int[Array, 'E']

  @property
  def num_slots(self) -> int:
    experts, most = self.slots_Er.shape
    return experts + most - 1


def choose(
  ids_MK: Int[Array, 'M K'], valid_M: Float[Array, 'M'], slots: RedundantSlots
) -> Int[Array, 'M K']:
  """A slot for every assignment; where valid_M is 0, the number of slots.

  The tokens of an expert on a device take its slots in turn, each device
  beginning with another.
  """
  valid_M1 = valid_M[:, None] > 0
  hot_MKE = ids_MK[:, :, None] == jnp.arange(len(slots.count_E))
  hot_ME = jnp.any(hot_MKE, axis=1) & valid_M1
  before_ME = jnp.cumsum(hot_ME, axis=0, dtype=jnp.int32) - hot_ME
  turn_MK = jnp.take_along_axis(before_ME, ids_MK, axis=1) + _batch_index()
  slots_MK = slots.slots_Er[ids_MK, turn_MK % slots.count_E[ids_MK]]
  return jnp.where(valid_M1, slots_MK, slots.num_slots)


def _batch_index() -> Int[Array, ''] | int:
  """This device's index among those that have tokens of their own."""
  number = 0
  for axis in sharding.BATCH_AXES:
    number = number * collectives.axis_size(axis) + collectives.axis_index(axis)
  return number
