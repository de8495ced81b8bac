"""The routed experts: tokens to their experts and back (TR 2.1.2, 3.2.2).

  y_m = sum_k gate_mk * expert_{ids_mk}(x_m)          (TR eq. 12, routed part)

`expert_ffn` composes what other modules of this folder do:

  choose slots   with redundant experts only            `redundant_experts`
  assign         tokens to rounds, nearly always one    `rounds`
  plan           where each token goes                  `all_to_all`
  dispatch       tokens to the devices of their experts
  multiply       by the experts there                   `expert_products`
  combine        their sum, on the token's own device

In FP8 `fp8_experts` does the last three, as what is sent is FP8 in both passes.
Dropless: no token is dropped at any imbalance. The backward pass has what the
first round saved; it sends and multiplies those of further rounds again.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import precision
from dsv3_jax.ops import (
  all_to_all,
  expert_blocks,
  expert_products,
  fp8_experts,
  redundant_experts,
  rounds,
)

Experts = expert_products.Experts


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
  """How experts are multiplied and where they are.

  product: of `expert_products`: 'auto', 'blocks', 'ragged' or 'dense'; FP8 has
  one product of its own. block_size: most rows of a block; few assignments take
  smaller blocks. axes, transport: as in `all_to_all`; mesh axes that the
  experts are sharded over, in the body of a shard_map. buffer_factor: as in
  `rounds`; with the transport 'auto', infinite on CPU. policy: None is that of
  the tokens' type.
  """

  product: str = 'auto'
  block_size: int = 64
  axes: all_to_all.Axes = ()
  transport: str = 'auto'
  buffer_factor: float = math.inf
  policy: precision.Policy | None = None


def expert_ffn(
  x_MD: Float[Array, 'M D'],
  ids_MK: Int[Array, 'M K'],
  gates_MK: Float[Array, 'M K'],
  experts: Experts,
  options: ExpertOptions,
  redundant: redundant_experts.RedundantSlots | None = None,
  valid_M: Float[Array, 'M'] | None = None,
) -> Float[Array, 'M D']:
  """Sum of each token's chosen experts, weighted by its gates (TR eq. 12).

  Args:
    ids_MK: distinct in a row; of all experts, also where some are elsewhere.
    experts: this device's part, as are their gradients. Any float dtype,
      multiplied in that of x; in FP8 `fp8_linear.Weight`s with a leading expert
      dim; with `redundant`, those of slots.
    redundant: the slots of each expert (TR 3.4); not in FP8.
    valid_M: with `redundant`: 0 for tokens that nobody needs. They go nowhere
      and give 0.
  """
  if redundant is not None:
    routed = (x_MD, ids_MK, gates_MK)
    return _with_redundancy(*routed, experts, options, redundant, valid_M)
  num_local = experts.w_up_EDF.shape[0]
  # Of an even load, which the all-to-all does not change.
  rows = expert_blocks.block_rows(ids_MK.size, num_local, options.block_size)
  return _exchange(x_MD, ids_MK, gates_MK, experts, options, rows)


def _exchange(x_MD, ids_MK, gates_MK, experts, options, rows: int):
  """Dispatch, product in blocks of `rows`, combine: in rounds."""
  num_local = experts.w_up_EDF.shape[0]
  hops = all_to_all.live(options.axes)
  sizes = tuple(jax.lax.axis_size(hop) for hop in hops)
  factor = options.buffer_factor
  if options.transport == 'auto' and jax.default_backend() == 'cpu':
    # XLA:CPU does not keep the order of a loop's collectives and others, and
    # its devices share one memory.
    factor = math.inf
  room = rounds.room_of(*ids_MK.shape, num_local, sizes, factor)
  path = _Path(options, room, num_local, rows)
  assigned = rounds.assign(ids_MK, num_local, options.axes, room)
  return _in_rounds(path, x_MD, gates_MK, experts, ids_MK, assigned)


@dataclasses.dataclass(frozen=True)
class _Path:
  """One round, forward and backward."""

  options: ExpertOptions
  room: rounds.Room
  num_local: int
  rows: int

  def plan(self, ids_MK, assigned, number):
    """Where the tokens of a round go."""
    axes, hops = self.options.axes, self.room.hops
    if assigned is not None:
      sizes = (jax.lax.axis_size(hop) for hop in all_to_all.live(axes))
      none = self.num_local * math.prod(sizes)
      ids_MK = rounds.of_round(ids_MK, assigned, number, none)
    return all_to_all.make_plan(
      ids_MK, self.num_local, axes, self.options.transport, hops
    )

  def output(self, x_MD, gates_MK, experts, plan):
    if self.is_fp8:
      return self.forward(x_MD, gates_MK, experts, plan)[0]
    x_ID, gates_IK = all_to_all.dispatch((x_MD, gates_MK), plan)
    options = (self.options.product, self.rows, self.room.assignments[-1])
    y_ID = expert_products.multiply(
      x_ID, plan.ids_IK, gates_IK, experts, *options
    )
    return all_to_all.combine(y_ID, plan)

  def forward(self, x_MD, gates_MK, experts, plan):
    """The output, and what `backward` needs."""
    if self.is_fp8:
      options = (self.options.policy, self.room.assignments[-1])
      with jax.named_scope('experts'):
        return fp8_experts.forward(x_MD, gates_MK, experts, plan, *options)
    run = lambda *args: self.output(*args, plan)
    return jax.vjp(run, x_MD, gates_MK, experts)

  def backward(self, saved, dy_MD):
    """Gradients of tokens, gates and experts."""
    if self.is_fp8:
      return fp8_experts.backward(self.options.policy, saved, dy_MD)
    return saved(dy_MD)

  @property
  def is_fp8(self):
    return self.options.policy is not None and self.options.policy.fp8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(path, x_MD, gates_MK, experts, ids_MK, assigned):
  args = (x_MD, gates_MK, experts)
  one = lambda number: path.output(*args, path.plan(ids_MK, assigned, number))
  return _add_rounds(assigned, one, one(0))[0]


def _in_rounds_fwd(path, x_MD, gates_MK, experts, ids_MK, assigned):
  args = (x_MD, gates_MK, experts)
  plan = functools.partial(path.plan, ids_MK, assigned)
  y_MD, saved = path.forward(*args, plan(0))
  one = lambda number: path.output(*args, plan(number))
  y_MD, _ = _add_rounds(assigned, one, y_MD)
  return y_MD, (saved, args, ids_MK, assigned)


def _in_rounds_bwd(path, residuals, dy_MD):
  saved, args, ids_MK, assigned = residuals
  *inputs, weights = path.backward(saved, dy_MD)

  def again(number):
    plan = path.plan(ids_MK, assigned, number)
    return path.backward(path.forward(*args, plan)[1], dy_MD)

  # Two loops, so that the weights' gradients can be deferred. The second ends
  # where the first did: XLA:CPU must not run both at once.
  inputs, end = _add_rounds(assigned, lambda r: again(r)[:2], tuple(inputs))
  weights, _ = _add_rounds(end, lambda r: again(r)[2], weights)
  return *inputs, weights, None, None


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


def _add_rounds(assigned, one, first):
  """`first` plus `one(r)` for every further round r; and `assigned` again."""
  if assigned is None:
    return first, None

  def add(carry):
    number, sums = carry
    return number + 1, jax.tree.map(jnp.add, sums, one(number))

  more = lambda carry: carry[0] < assigned.count
  end, sums = jax.lax.while_loop(more, add, (jnp.int32(1), first))
  return sums, assigned._replace(count=end)


def _with_redundancy(
  x_MD, ids_MK, gates_MK, experts, options, redundant, valid_M
):
  """Weights by slot: every assignment travels alone.

  So a sum does not depend on which slots share a device, at the price of
  sending a token once for each of its experts and not once for each device. A
  token's assignments are summed in the order of its choice, as on one device.
  Blocks have as many rows as without redundancy: in f32 a product of blocks
  gives the same bits whichever slot computes it.
  """
  (tokens, top_k), num_local = ids_MK.shape, experts.w_up_EDF.shape[0]
  devices = redundant.num_slots // num_local
  num_experts = len(redundant.count_E) // devices
  rows = expert_blocks.block_rows(ids_MK.size, num_experts, options.block_size)
  with jax.named_scope('choose_slots'):
    slots_MK = redundant_experts.choose(ids_MK, valid_M, redundant)
  if tokens == 1 and not all_to_all.live(options.axes):  # as without redundancy
    return expert_products.multiply(
      x_MD, slots_MK, gates_MK, experts, options.product, rows
    )
  slots_A1, gates_A1 = slots_MK.reshape(-1, 1), gates_MK.reshape(-1, 1)
  x_AD = jnp.repeat(x_MD, top_k, axis=0)
  y_AD = _exchange(x_AD, slots_A1, gates_A1, experts, options, rows)
  return jnp.sum(y_AD.reshape(tokens, top_k, -1), axis=1)
