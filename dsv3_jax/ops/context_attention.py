"""Causal attention where `context` shards the sequence: one device's queries.

A sequence of S keys is 2 n pieces on n devices. Device i has the queries of the
pieces i and 2 n - 1 - i (`collectives.shard_sequence`) and the keys of all,
computed from the gathered latents. Its queries see i + 1 and 2 n - i pieces of
keys. So every device computes 2 n + 1 of its 4 n products of pieces: about
half, and as many as every other. Which they are differs from device to device,
so they are the iterations of one loop with an online softmax:

  m' = max(m, max_s s_ts),  z' = z exp(m - m') + sum_s exp(s_ts - m')
  o' = o exp(m - m') + sum_s exp(s_ts - m') v_s;  o / z at the end

The piece of a query's own key comes last. Whatever was summed before the first
key that the query sees is then multiplied by exp(lowest - m) = 0.

`forward` and `backward` are passes of `pallas_kernels.mla_attention.api`.
Letters: X = H + R; t queries of a block, s keys of a piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives
from pallas_kernels.mla_attention import xla


class _Tile(NamedTuple):
  """A block of queries times a piece of keys.

  query: its first query, counted on this device. index: the same in the whole
  sequence. key: its first key.
  """

  query: Array
  index: Array
  key: Array


class CausalTiles:
  """The tiles that one device computes, `count` in number."""

  def __init__(self, queries: int):
    self.piece = queries // 2
    self.block = min(xla.QUERY_BLOCK, self.piece)
    while self.piece % self.block:
      self.block -= 1
    self.blocks = self.piece // self.block
    self.devices = collectives.axis_size('context')
    self.device = collectives.axis_index('context')
    self.count = (2 * self.devices + 1) * self.blocks

  def tile(self, number: Array) -> _Tile:
    """First all of the early piece's, then of the late one's."""
    pair, block = number // self.blocks, number % self.blocks
    early = pair <= self.device
    other = 2 * self.devices - 1 - self.device
    pieces = jnp.where(early, self.device, other)
    key = jnp.where(early, pair, pair - self.device - 1)
    first = block * self.block
    return _Tile(
      jnp.where(early, 0, self.piece) + first,
      pieces * self.piece + first,
      key * self.piece,
    )

  def queries(self, x: Array, tile: _Tile, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, tile.query, self.block, axis)

  def put(self, x: Array, part: Array, tile: _Tile, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, tile.query, axis)

  def keys(self, x: Array, tile: _Tile) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, tile.key, self.piece, 1)

  def add(self, x: Array, part: Array, tile: _Tile) -> Array:
    """Adds to the keys' rows of a sum."""
    part += self.keys(x, tile)
    return jax.lax.dynamic_update_slice_in_dim(x, part, tile.key, 1)

  def scores(self, q_BtNX, keys, segments_BS, tile, scale):
    """Joined keys and scaled logits, f32, the masked ones very low."""
    k_nope_BsNH, k_rope_BsR = (self.keys(x, tile) for x in keys)
    k_BsNX = xla.join(k_nope_BsNH, k_rope_BsR)
    index_t1 = tile.index + jnp.arange(self.block)[:, None]
    index_s, segments = tile.key + jnp.arange(self.piece), None
    if segments_BS is not None:
      at = (segments_BS, tile.index, self.block, 1)
      own_Bt = jax.lax.dynamic_slice_in_dim(*at)
      segments = own_Bt, self.keys(segments_BS, tile)
    args = (q_BtNX, k_BsNX, index_t1, index_s, segments, scale)
    return k_BsNX, xla.masked_scores(*args)


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output, f32, and log-sum-exp of this device's queries."""
  tiles, keys = CausalTiles(q_BTNX.shape[1]), (k_nope_BSNH, k_rope_BSR)

  def body(number, sums):
    o_BTNU, most_BNT, total_BNT = sums
    tile = tiles.tile(number)
    q, v = tiles.queries(q_BTNX, tile), tiles.keys(v_BSNU, tile)
    _, s = tiles.scores(q, keys, segments_BS, tile, scale)
    before = tiles.queries(most_BNT, tile, 2)
    most = jnp.maximum(before, jnp.max(s, axis=-1))
    shrink, p = jnp.exp(before - most), jnp.exp(s - most[..., None])
    total = tiles.queries(total_BNT, tile, 2) * shrink + jnp.sum(p, axis=-1)
    o = tiles.queries(o_BTNU, tile) * jnp.swapaxes(shrink, 1, 2)[..., None]
    o += xla.product('bnts,bsnu->btnu', p.astype(v.dtype), v)
    return (
      tiles.put(o_BTNU, o, tile),
      tiles.put(most_BNT, most, tile, 2),
      tiles.put(total_BNT, total, tile, 2),
    )

  rows, length, heads, _ = q_BTNX.shape
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  width = v_BSNU.shape[-1]
  most_BNT = jnp.full((rows, heads, length), xla.LOWEST)
  sums = (zeros(rows, length, heads, width), most_BNT, zeros(*most_BNT.shape))
  sums = jax.lax.fori_loop(0, tiles.count, body, sums)
  o_BTNU, most_BNT, total_BNT = sums
  o_BTNU /= jnp.swapaxes(total_BNT, 1, 2)[..., None]
  return o_BTNU, most_BNT + jnp.log(total_BNT)


def backward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
  lse_BNT: Float[Array, 'B N T'],
  delta_BNT: Float[Array, 'B N T'],
  do_BTNU: Float[Array, 'B T N U'],
) -> tuple[Array, Array, Array, Array]:
  """Gradients of q, k_nope, k_rope and v, f32.

  Those of keys and values are this device's summands, of all keys.
  """
  tiles, keys = CausalTiles(q_BTNX.shape[1]), (k_nope_BSNH, k_rope_BSR)
  width = k_nope_BSNH.shape[-1]

  def body(number, sums):
    dq_BTNX, dkeys = sums
    tile = tiles.tile(number)
    q, do = (tiles.queries(x, tile) for x in (q_BTNX, do_BTNU))
    lse, delta = (tiles.queries(x, tile, 2) for x in (lse_BNT, delta_BNT))
    v = tiles.keys(v_BSNU, tile)
    k, s = tiles.scores(q, keys, segments_BS, tile, scale)
    dq, dk, dv = xla.tile_gradients(q, k, v, s, lse, delta, do, scale)
    dq += tiles.queries(dq_BTNX, tile)
    parts = (dk[..., :width], jnp.sum(dk[..., width:], axis=2), dv)
    pairs = zip(dkeys, parts, strict=True)
    dkeys = tuple(tiles.add(x, part, tile) for x, part in pairs)
    return tiles.put(dq_BTNX, dq, tile), dkeys

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  sums = jax.tree.map(zeros, (q_BTNX, (*keys, v_BSNU)))
  dq_BTNX, dkeys = jax.lax.fori_loop(0, tiles.count, body, sums)
  return dq_BTNX, *dkeys
