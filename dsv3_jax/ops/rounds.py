"""Rounds of an all-to-all, so that bounded buffers drop no token.

Room for all tokens of all devices is what no imbalance exceeds, and W times
what an even load needs. Here a device has room for `buffer_factor` times the
even load. Tokens go in rounds, nearly always one: each device cuts its tokens
into slices, so small that one always fits, and a round is as many slices, in
order, as fit everywhere. All devices know the load of each slice before
anything is sent, so all have the same rounds; no shape depends on data.

  room = room_of(tokens, top_k, num_local, sizes, buffer_factor)
  rounds = assign(ids_MK, num_local, axes, room)      None: always one
  ids_MK = of_round(ids_MK, rounds, r, none)          the others go nowhere

Letters: G slices; X buffers that a slice's load is counted in.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops import all_to_all


class Room(NamedTuple):
  """Sizes of a device's buffers, static; an item for each hop.

  hops: rows sent and received. assignments: of the received rows, to experts of
  this device, or of those that it passes rows on to. slice_tokens: of a slice
  on each device.
  """

  hops: tuple[all_to_all.HopRoom, ...]
  assignments: tuple[int, ...]
  slice_tokens: int


class Rounds(NamedTuple):
  """The round of each token of this device, and how many all devices have."""

  round_M: Int[Array, 'M']
  count: Int[Array, '']


def room_of(
  tokens: int,
  top_k: int,
  num_local: int,
  sizes: tuple[int, ...],
  buffer_factor: float,
) -> Room:
  """Room for `buffer_factor` times the even load, and for one slice at least.

  Args:
    tokens: of each device.
    num_local: experts of each device.
    sizes: devices of each hop.
    buffer_factor: infinite is room for all tokens of all devices.
  """

  def room(per_token, per_slice):
    """Of an even load, but for a slice of one token, and not for more than all.

    Args:
      per_slice: what one token of each source can bring at most.
    """
    even = min(buffer_factor * tokens * per_token, tokens * per_slice)
    return max(math.ceil(even), per_slice)

  devices, sources = math.prod(sizes), 1
  hops, assignments, slices = [], [], [tokens]
  most = tokens * top_k
  for size in sizes or (1,):
    sources *= size
    per_source = min(top_k, num_local * (devices // sources))
    sent = min(most, (hops[-1].receive if hops else tokens) * min(top_k, size))
    most = room(top_k, sources * per_source)
    rows = min(room(min(top_k, sources), sources), most)
    hops.append(all_to_all.HopRoom(sent, rows))
    assignments.append(most)
    slices += [most // (sources * per_source), rows // sources]
  return Room(tuple(hops), tuple(assignments), min(slices))


def assign(
  ids_MK: Int[Array, 'M K'], num_local: int, axes: all_to_all.Axes, room: Room
) -> Rounds | None:
  """As many slices to a round as fit into every buffer of every device.

  None if one slice holds all tokens: then there is one round.
  """
  slices = -(-len(ids_MK) // room.slice_tokens)
  if slices == 1:
    return None
  with jax.named_scope('rounds'):
    load_GX, limit_X = _loads(ids_MK, num_local, all_to_all.live(axes), room)

    def place(carry, add_X):
      load_X, current = carry
      full = jnp.any(load_X + add_X > limit_X)
      load_X = jnp.where(full, add_X, load_X + add_X)
      current += full
      return (load_X, current), current

    start = (jnp.zeros_like(limit_X), jnp.int32(0))
    (_, last), round_G = jax.lax.scan(place, start, load_GX)
    round_M = jnp.repeat(round_G, room.slice_tokens)[: len(ids_MK)]
    return Rounds(round_M, last + 1)


def of_round(
  ids_MK: Int[Array, 'M K'], rounds: Rounds, number: Array | int, none: int
) -> Int[Array, 'M K']:
  """The ids of one round's tokens; `none` for all others."""
  return jnp.where((rounds.round_M == number)[:, None], ids_MK, none)


def _loads(ids_MK, num_local, axes, room):
  """What each slice of all devices brings to every buffer, and its room."""
  sizes = [jax.lax.axis_size(hop) for hop in axes]
  devices, flat = math.prod(sizes), tuple(a for hop in axes for a in hop)
  hot_MKW = (ids_MK // num_local)[:, :, None] == jnp.arange(devices)
  count_MW = jnp.sum(hot_MKW, axis=1, dtype=jnp.int32)
  loads, limits = [], []
  for at, (hop, most) in enumerate(
    zip(room.hops, room.assignments, strict=True)
  ):
    # A group's assignments reach its device of the same index as the sender.
    inner = math.prod(sizes[at + 1 :])
    count_Mg = count_MW.reshape(len(ids_MK), -1, inner).sum(axis=2)
    rest = tuple(a for hop in axes[at + 1 :] for a in hop)
    own_i = jnp.arange(inner) == (jax.lax.axis_index(rest) if rest else 0)
    for load_Mg, limit in ((count_Mg, most), (count_Mg > 0, hop.receive)):
      load_Mgi = load_Mg[:, :, None] * own_i
      loads.append(load_Mgi.reshape(len(ids_MK), -1).astype(jnp.int32))
      limits.append(jnp.full(devices, limit))
  load_MX = jnp.concatenate(loads, axis=1)
  padding = -len(ids_MK) % room.slice_tokens
  load_MX = jnp.pad(load_MX, ((0, padding), (0, 0)))
  load_GX = load_MX.reshape(-1, room.slice_tokens, load_MX.shape[1]).sum(axis=1)
  return jax.lax.psum(load_GX, flat), jnp.concatenate(limits)
