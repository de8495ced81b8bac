"""Causal attention where `context` cuts the sequence: queries of one device.

A row of S keys is 2 C pieces; device i has the queries of the pieces i and
2 C - 1 - i (`sharding.own_tokens`) and, made from the gathered latents, the
keys of all. Its queries look at i + 1 and 2 C - i pieces of keys, so every
device makes 2 C + 1 of its 4 C products of pieces: the same number in the same
time, and about half. Which they are differs from device to device, so they are
the turns of one loop; its softmax is summed up as it goes:

  m' = max(m, max_s s_ts),  z' = z exp(m - m') + sum_s exp(s_ts - m')
  o' = o exp(m - m') + sum_s exp(s_ts - m') v_s;  o / z at the end

The piece of a query's own key comes last. Whatever was summed up before a first
key that may be seen is then multiplied by exp(lowest - m) = 0.
Letters: X = H + R; t queries of a block, s keys of a piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives

_QUERY_BLOCK = 128  # at most so many rows of a piece at a time
_LOWEST = jnp.finfo(jnp.float32).min


class Keys(NamedTuple):
  """Of whole rows; the rotary part is shared by all heads."""

  k_nope_BSNH: Array
  k_rope_BSR: Array
  v_BSNU: Array


class _Turn(NamedTuple):
  """First query among this device's, its index in the row, and first key."""

  query: Array
  index: Array
  key: Array


class Loop:
  """The products of a device: blocks of queries times pieces of keys."""

  def __init__(self, queries: int):
    self.piece = queries // 2
    self.block = min(_QUERY_BLOCK, self.piece)
    while self.piece % self.block:
      self.block -= 1
    self.blocks = self.piece // self.block
    self.devices = collectives.axis_size('context')
    self.device = collectives.axis_index('context')
    self.turns = (2 * self.devices + 1) * self.blocks

  def turn(self, number: Array) -> _Turn:
    """First all of the early piece's, then of the late one's."""
    pair, block = number // self.blocks, number % self.blocks
    early = pair <= self.device
    other = 2 * self.devices - 1 - self.device
    pieces = jnp.where(early, self.device, other)
    key = jnp.where(early, pair, pair - self.device - 1)
    first = block * self.block
    return _Turn(
      jnp.where(early, 0, self.piece) + first,
      pieces * self.piece + first,
      key * self.piece,
    )

  def queries(self, x: Array, turn: _Turn, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, turn.query, self.block, axis)

  def put(self, x: Array, part: Array, turn: _Turn, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, turn.query, axis)

  def keys(self, x: Array, turn: _Turn) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, turn.key, self.piece, 1)

  def add(self, x: Array, part: Array, turn: _Turn) -> Array:
    """Adds to the keys' rows of a sum."""
    part += self.keys(x, turn)
    return jax.lax.dynamic_update_slice_in_dim(x, part, turn.key, 1)

  def scores(self, q_BtNX, keys: Keys, segments_BS, turn, scale):
    """Joined keys and scaled logits, f32, the masked ones very low."""
    k_nope_BsNH, k_rope_BsR = (self.keys(x, turn) for x in keys[:2])
    k_BsNX = join(k_nope_BsNH, k_rope_BsR)
    index_t1 = turn.index + jnp.arange(self.block)[:, None]
    mask_Bts = (turn.key + jnp.arange(self.piece) <= index_t1)[None]
    if segments_BS is not None:
      at = (segments_BS, turn.index, self.block, 1)
      own_Bt1 = jax.lax.dynamic_slice_in_dim(*at)[..., None]
      mask_Bts &= own_Bt1 == self.keys(segments_BS, turn)[:, None]
    s_BNts = product('btnx,bsnx->bnts', q_BtNX, k_BsNX) * scale
    return k_BsNX, jnp.where(mask_Bts[:, None], s_BNts, _LOWEST)


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  keys: Keys,
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output, f32, and log-sum-exp of this device's queries."""
  loop = Loop(q_BTNX.shape[1])

  def body(number, sums):
    o_BTNU, most_BNT, total_BNT = sums
    turn = loop.turn(number)
    q, v = loop.queries(q_BTNX, turn), loop.keys(keys.v_BSNU, turn)
    _, s = loop.scores(q, keys, segments_BS, turn, scale)
    before = loop.queries(most_BNT, turn, 2)
    most = jnp.maximum(before, jnp.max(s, axis=-1))
    shrink, p = jnp.exp(before - most), jnp.exp(s - most[..., None])
    total = loop.queries(total_BNT, turn, 2) * shrink + jnp.sum(p, axis=-1)
    o = loop.queries(o_BTNU, turn) * jnp.swapaxes(shrink, 1, 2)[..., None]
    o += product('bnts,bsnu->btnu', p.astype(v.dtype), v)
    return (
      loop.put(o_BTNU, o, turn),
      loop.put(most_BNT, most, turn, 2),
      loop.put(total_BNT, total, turn, 2),
    )

  rows, length, heads, _ = q_BTNX.shape
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  width = keys.v_BSNU.shape[-1]
  most_BNT = jnp.full((rows, heads, length), _LOWEST)
  sums = (zeros(rows, length, heads, width), most_BNT, zeros(*most_BNT.shape))
  sums = jax.lax.fori_loop(0, loop.turns, body, sums)
  o_BTNU, most_BNT, total_BNT = sums
  o_BTNU /= jnp.swapaxes(total_BNT, 1, 2)[..., None]
  return o_BTNU, most_BNT + jnp.log(total_BNT)


def backward(
  q_BTNX: Float[Array, 'B T N X'],
  keys: Keys,
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
  lse_BNT: Float[Array, 'B N T'],
  delta_BNT: Float[Array, 'B N T'],
  do_BTNU: Float[Array, 'B T N U'],
) -> tuple[Float[Array, 'B T N X'], Keys]:
  """Gradients, f32: of its queries, and its part of those of all keys."""
  loop, dtype = Loop(q_BTNX.shape[1]), q_BTNX.dtype
  width = keys.k_nope_BSNH.shape[-1]

  def body(number, sums):
    dq_BTNX, dkeys = sums
    turn = loop.turn(number)
    q, do = (loop.queries(x, turn) for x in (q_BTNX, do_BTNU))
    lse, delta = (loop.queries(x, turn, 2) for x in (lse_BNT, delta_BNT))
    v = loop.keys(keys.v_BSNU, turn)
    k, s = loop.scores(q, keys, segments_BS, turn, scale)
    p = jnp.exp(s - lse[..., None])
    ds = p * (product('btnu,bsnu->bnts', do, v) - delta[..., None]) * scale
    p, ds = p.astype(dtype), ds.astype(dtype)
    dq = loop.queries(dq_BTNX, turn) + product('bnts,bsnx->btnx', ds, k)
    dk = product('bnts,btnx->bsnx', ds, q)
    dv = product('bnts,btnu->bsnu', p, do)
    parts = (dk[..., :width], jnp.sum(dk[..., width:], axis=2), dv)
    pairs = zip(dkeys, parts, strict=True)
    dkeys = Keys(*(loop.add(x, part, turn) for x, part in pairs))
    return loop.put(dq_BTNX, dq, turn), dkeys

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  sums = jax.tree.map(zeros, (q_BTNX, keys))
  return jax.lax.fori_loop(0, loop.turns, body, sums)


def join(k_nope_BSNH, k_rope_BSR):
  """Keys of all heads, the shared rotary key behind each."""
  shape = (*k_nope_BSNH.shape[:3], k_rope_BSR.shape[-1])
  k_rope_BSNR = jnp.broadcast_to(k_rope_BSR[:, :, None], shape)
  return jnp.concatenate([k_nope_BSNH, k_rope_BSNR], axis=-1)


def product(subscripts: str, a: Array, b: Array) -> Float[Array, '...']:
  """A product of heads with f32 sums and an f32 result."""
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
