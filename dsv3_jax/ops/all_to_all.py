"""All-to-all: tokens to their experts' devices and back (TR 3.2.2).

For the body of a shard_map over the mesh axes of the experts: each device has M
tokens, ids of experts of the whole model, and num_local experts of its own; the
device with index w of the axes has those from w * num_local on.

  plan = make_plan(ids_MK, num_local, axes)
  x_ID = dispatch(x_MD, plan)     to each device of its experts, once
  y_ID = f(x_ID, plan.ids_IK)     outputs of this device's experts
  y_MD = combine(y_ID, plan)      their sum, on the token's own device

`dispatch` and `combine` are each other's gradient, along the same plan: the
backward pass reuses the layout of the forward pass. `axes` are hops, one after
the other:

  (('node', 'expert'),)   one hop: to each device that has one of its experts
  ('node', 'expert')      two: to each node that has one, to the device of the
                          same index there, and then within the node
  ()                      none: all experts are on this device

With node-limited routing a token crosses nodes at most top_groups times in two
hops, but up to K times in one.

Order of sums: f32, by the index of the device that a part comes from, rounded
to the dtype of y after each hop. So a repeated run gives the same bits; one and
two hops differ by rounding.

Shapes are static: a hop has room for I rows, those of source 0 first. Unused
rows are 0, and their ids are those of no expert. By default there is room for
all tokens of all devices; `rounds` makes do with less and drops nothing.
Transports:

  'ragged'   sends the rows in use over `ragged_all_to_all`, which XLA lacks on
             CPU
  'padded'   runs on any device: sends I / W rows to each device over
             `all_to_all`, as often as all tokens to one device would need

Both put every row in the same place. 'auto' is 'padded' on CPU and 'ragged'
elsewhere.

Letters: W devices of a hop; O rows in the send buffer, I rows received; n =
min(K, W), the most devices of one token; P rows to each device at once.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int, Shaped

Axes = tuple[str | tuple[str, ...], ...]
TRANSPORTS = ('auto', 'padded', 'ragged')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hop:
  """One all-to-all: the layout of its send buffer, and its transport.

  token_O: the token in each row of the send buffer, M in empty rows. back_Mn:
  the rows of each token, by device, padded with O. count_WW: the rows that each
  device sends to each. room: rows of the receive buffer. room, axes, transport:
  static.
  """

  # Any: a tree of this form also holds shapes or shardings.
  token_O: Any
  back_Mn: Any
  count_WW: Any
  room: int = dataclasses.field(metadata={'static': True})
  axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  transport: str = dataclasses.field(metadata={'static': True})


class HopRoom(NamedTuple):
  """Rows of the buffers of a hop."""

  send: int
  receive: int


class AllToAllPlan(NamedTuple):
  """The hops of an all-to-all, and the experts of the received rows.

  ids_IK: indices of experts on this device; num_local for all others.
  """

  hops: tuple[Hop, ...]
  ids_IK: Int[Array, 'I K']


def live(axes: Axes) -> tuple[tuple[str, ...], ...]:
  """The hops over more than one device."""
  hops = ((hop,) if isinstance(hop, str) else tuple(hop) for hop in axes)
  return tuple(hop for hop in hops if jax.lax.axis_size(hop) > 1)


def make_plan(
  ids_MK: Int[Array, 'M K'],
  num_local: int,
  axes: Axes,
  transport: str = 'auto',
  rooms: tuple[HopRoom, ...] = (),
) -> AllToAllPlan:
  """Where each token goes, for both directions and both passes.

  Args:
    ids_MK: of the whole model's experts, distinct in a row; an id past the
      last one goes nowhere.
    num_local: experts of each device.
    axes: hops, major first; a hop over one device only is left out.
    rooms: of each hop over more devices; if one does not suffice, the result is
      wrong. () is for all tokens of all devices.
  Raises:
    ValueError: `transport` is not one of `TRANSPORTS`.
  """
  if transport not in TRANSPORTS:
    raise ValueError(f'transport={transport!r} must be one of {TRANSPORTS}')
  if transport == 'auto':
    cpu = jax.default_backend() == 'cpu'
    transport = 'padded' if cpu else 'ragged'
  ids, hops = ids_MK, []
  with jax.named_scope('plan'):
    axes = live(axes)
    sizes = [jax.lax.axis_size(hop) for hop in axes]
    rooms = rooms or _room_for_all(*ids_MK.shape, sizes)
    for at, over in enumerate(axes):
      # Ids count from the first expert of the devices that remain;
      # `span` of them belong to each device, or node, of this hop.
      span = num_local * math.prod(sizes[at + 1 :])
      hop = _make_hop(ids // span, over, transport, rooms[at])
      ids = _send(ids, hop, fill=span * sizes[at])
      ids -= jax.lax.axis_index(over) * span
      ids = jnp.where((ids >= 0) & (ids < span), ids, span)
      hops.append(hop)
  return (
    AllToAllPlan(*_named((tuple(hops), ids))) if hops else AllToAllPlan((), ids)
  )


def _room_for_all(tokens, top_k, sizes):
  rooms = []
  for size in sizes:
    rooms.append(HopRoom(tokens * min(top_k, size), tokens * size))
    tokens *= size
  return tuple(rooms)


def _make_hop(goal_MK, axes, transport, room) -> Hop:
  """The layout of a hop to the devices `goal_MK`, each at most once."""
  (tokens, top_k), devices = goal_MK.shape, jax.lax.axis_size(axes)
  goes_MW = jnp.any(goal_MK[:, :, None] == jnp.arange(devices), axis=1)
  rank_MW = jnp.cumsum(goes_MW, axis=0, dtype=jnp.int32) - goes_MW
  count_W = jnp.sum(goes_MW, axis=0, dtype=jnp.int32)
  most = min(top_k, devices)
  rows = min(most * tokens, room.send)
  start_W = jnp.cumsum(count_W) - count_W
  own_W = jnp.arange(devices) == jax.lax.axis_index(axes)
  count_WW = jax.lax.psum(jnp.where(own_W[:, None], count_W, 0), axes)
  row_MW = jnp.where(goes_MW, start_W + rank_MW, rows)
  token_M = jnp.arange(tokens, dtype=jnp.int32)
  token_O = jnp.full(rows, tokens, jnp.int32)
  token_O = token_O.at[row_MW].set(token_M[:, None], mode='drop')
  back_Mn = jnp.sort(row_MW, axis=1)[:, :most]
  return Hop(token_O, back_Mn, count_WW, room.receive, axes, transport)


def rows_sent(plan: AllToAllPlan) -> tuple[Int[Array, 'W'], ...]:
  """Rows from this device to each device of every hop, itself included."""
  return tuple(hop.count_WW[jax.lax.axis_index(hop.axes)] for hop in plan.hops)


def dispatch(tree: Any, plan: AllToAllPlan) -> Any:
  """Rows of tokens, [M, ...] -> [I, ...], to the devices of their experts.

  Args:
    tree: of arrays of any dtype; integers get no gradient. FP8 is best moved
      as bytes.
  """
  if not plan.hops:
    return tree
  with jax.named_scope('dispatch'):
    return _named(_dispatch(tree, plan))


def combine(
  y_I: Shaped[Array, 'I *rest'], plan: AllToAllPlan
) -> Shaped[Array, 'M *rest']:
  """Sums the outputs of a token's devices, on the token's own device."""
  if not plan.hops:
    return y_I
  with jax.named_scope('combine'):
    return _combine(y_I, plan)


@jax.custom_vjp
def _dispatch(tree, plan):
  for hop in plan.hops:
    tree = jax.tree.map(lambda x, hop=hop: _send(x, hop), tree)
  return tree


def _dispatch_bwd(plan, grads):
  def back(grad):
    return None if grad.dtype == jax.dtypes.float0 else combine(grad, plan)

  return jax.tree.map(back, grads), None


@jax.custom_vjp
def _combine(y_I, plan):
  for hop in reversed(plan.hops):
    y_I = _collect(y_I, hop)
  return y_I


def _combine_bwd(plan, dy_M):
  return dispatch(dy_M, plan), None


_dispatch.defvjp(
  lambda tree, plan: (_dispatch(tree, plan), plan), _dispatch_bwd
)
_combine.defvjp(lambda y_I, plan: (_combine(y_I, plan), plan), _combine_bwd)


def _send(x_M, hop, fill=0):
  """Sends rows over one hop; received rows that no device sent are `fill`."""
  x_O = jnp.take(x_M, hop.token_O, axis=0, mode='fill', fill_value=fill)
  x_I = jnp.full((hop.room, *x_M.shape[1:]), fill, x_M.dtype)
  there, back = _slices(hop)
  return _move(x_O, x_I, there, back, hop)


def _collect(y_I, hop):
  """Returns rows over one hop and sums those of each token."""
  y_O = _give_back(y_I, hop)
  sum_M = 0.0
  for row_M in hop.back_Mn.T:
    part_M = jnp.take(y_O, row_M, axis=0, mode='fill', fill_value=0)
    sum_M += part_M.astype(jnp.float32)
  return sum_M.astype(y_I.dtype)


def _give_back(y_I, hop):
  """Returns each row to its place in the send buffer of its sender."""
  y_O = jnp.zeros((len(hop.token_O), *y_I.shape[1:]), y_I.dtype)
  there, back = _slices(hop)
  return _move(y_I, y_O, back, there, hop)


class _Slices(NamedTuple):
  """Of a buffer of this device: the rows that go to, or come from, each device.

  remote_W: the first of them in the buffer of that device.
  """

  start_W: Any
  count_W: Any
  remote_W: Any


def _slices(hop):
  """Slices of the send buffer, and of the receive buffer."""
  own, count_WW = jax.lax.axis_index(hop.axes), hop.count_WW
  sent_WW = jnp.cumsum(count_WW, axis=1) - count_WW
  received_WW = jnp.cumsum(count_WW, axis=0) - count_WW
  there = _Slices(sent_WW[own], count_WW[own], received_WW[own])
  back = _Slices(received_WW[:, own], count_WW[:, own], sent_WW[:, own])
  return there, back


def _move(x, into, there, back, hop):
  """Moves the slices `there` of x; they come as the slices `back` of `into`."""
  if hop.transport == 'ragged':
    sent = (there.start_W, there.count_W, there.remote_W, back.count_W)
    return jax.lax.ragged_all_to_all(x, into, *sent, axis_name=hop.axes)
  devices = len(there.count_W)
  at_once = -(-hop.room // devices)
  device, nth = _places(back, len(into))

  def step(t, into):
    nth_P = t * at_once + jnp.arange(at_once)
    row_WP = jnp.where(
      nth_P < there.count_W[:, None], there.start_W[:, None] + nth_P, len(x)
    )
    part = jnp.take(x, row_WP.reshape(-1), axis=0, mode='clip')
    part = jax.lax.all_to_all(part, hop.axes, 0, 0, tiled=True)
    place = nth - t * at_once
    arrives = (device < devices) & (place >= 0) & (place < at_once)
    rows = jnp.take(part, device * at_once + place, axis=0, mode='clip')
    return jnp.where(_column(arrives, into), rows, into)

  # As often as if all tokens went to one device. A loop of as many turns as the
  # fullest pair needs would be another that XLA:CPU does not order (`experts`).
  for t in range(-(-len(hop.back_Mn) // at_once)):
    into = step(t, into)
  return into


def _places(slices, size):
  """The device that each row of a buffer belongs to, and which of its rows."""
  row = jnp.arange(size, dtype=jnp.int32)
  ends_W = slices.start_W + slices.count_W
  device = jnp.searchsorted(ends_W, row, side='right').astype(jnp.int32)
  start = jnp.take(slices.start_W, device, mode='clip')
  return device, row - start


def _column(mask, like):
  return mask.reshape(-1, *[1] * (like.ndim - 1))


def _named(tree):
  """Names what was received, so that remat can save it from being resent."""
  return jax.tree.map(lambda x: checkpoint_name(x, 'all_to_all'), tree)
