"""The routed product where busy experts have copies (TR 3.4).

A slot is room for the weights of one expert. There are Z of them, more than
experts or as many, spread over devices as experts are without copies; which
expert is in a slot is data, so that it can change between two steps. A token
takes the copies of an expert in turn.

Every assignment is sent by itself and comes home by itself, where those of a
token are added up in the order of its choice, as on one device. So a sum does
not depend on which slots lie together, at the price of sending a token once for
each of its experts and not once for each device. Blocks have as many rows as
they would have without copies: in f32 a product of blocks gives the same bits
whichever slot computes it.

Letters: Z slots, r = Z - E + 1, the most copies that an expert can have.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.ops import all_to_all
from dsv3_jax.ops import experts as expert_ops


class Copies(NamedTuple):
  """Slots of each expert of a layer: the first `count_E` of `slots_Er`."""

  slots_Er: Int[Array, 'E r']
  count_E: Int[Array, 'E']

  @property
  def num_slots(self) -> int:
    experts, most = self.slots_Er.shape
    return experts + most - 1


def choose(
  ids_MK: Int[Array, 'M K'], valid_M: Float[Array, 'M'], copies: Copies
) -> Int[Array, 'M K']:
  """A slot for every assignment; the number of slots, which is none, if void.

  The tokens of an expert on a device take its copies in turn, each device
  beginning with another.
  """
  valid_M1 = valid_M[:, None] > 0
  hot_MKE = ids_MK[:, :, None] == jnp.arange(len(copies.count_E))
  hot_ME = jnp.any(hot_MKE, axis=1) & valid_M1
  before_ME = jnp.cumsum(hot_ME, axis=0, dtype=jnp.int32) - hot_ME
  turn_MK = jnp.take_along_axis(before_ME, ids_MK, axis=1) + _home()
  slots_MK = copies.slots_Er[ids_MK, turn_MK % copies.count_E[ids_MK]]
  return jnp.where(valid_M1, slots_MK, copies.num_slots)


def _home() -> Int[Array, ''] | int:
  """This device's number among those that have tokens of their own."""
  number = 0
  for axis in sharding.BATCH_AXES:
    number = number * collectives.axis_size(axis) + collectives.axis_index(axis)
  return number


def expert_ffn(
  x_MD: Float[Array, 'M D'],
  ids_MK: Int[Array, 'M K'],
  gates_MK: Float[Array, 'M K'],
  valid_M: Float[Array, 'M'],
  experts: expert_ops.Experts,
  copies: Copies,
  product: str,
  block_size: int,
  axes: all_to_all.Axes = (),
) -> Float[Array, 'M D']:
  """As `dispatch.expert_ffn`, with weights by slot.

  Args:
    valid_M: 0 for tokens that nobody needs; they go nowhere and give 0.
    experts: of the slots of this device.
  """
  (tokens, top_k), num_local = ids_MK.shape, experts.w_up_EDF.shape[0]
  holders = copies.num_slots // num_local
  sharing = len(copies.count_E) // holders
  rows = expert_ops.block_rows(ids_MK.size, sharing, block_size)
  with jax.named_scope('choose_copies'):
    slots_MK = choose(ids_MK, valid_M, copies)
  if tokens == 1 and not all_to_all.live(axes):  # as it would be without copies
    args = (x_MD, slots_MK, gates_MK, experts, product, rows)
    return expert_ops.multiply(*args)
  slots_A1, gates_A1 = slots_MK.reshape(-1, 1), gates_MK.reshape(-1, 1)
  x_AD = jnp.repeat(x_MD, top_k, axis=0)
  plan = all_to_all.make_plan(slots_A1, num_local, axes)
  x_ID, gates_I1 = all_to_all.dispatch((x_AD, gates_A1), plan)
  how = (product, rows)
  y_ID = expert_ops.multiply(x_ID, plan.ids_IK, gates_I1, experts, *how)
  y_AD = all_to_all.combine(y_ID, plan)
  return jnp.sum(y_AD.reshape(tokens, top_k, -1), axis=1)
