"""Absorbed decoding in plain jnp (TR 2.1.1).

A row's token s is at place s % 64 of page table[s // 64]. Its T queries are its
last T tokens, so that query t sees the tokens s <= length - T + t:

  score_s = (q_c . c_s + q_r . k_s) * scale,   p = softmax(score)
  o = sum_s p_s c_s,                           lse = log sum_s exp(score_s)

An FP8 latent is dequantised to the queries' dtype first. Scores, softmax and
sums are f32. A query that sees no token has o = 0 and lse = -inf. What is not a
row's own (pages of others, the rest of its last page, table entries beyond its
length) may hold anything, NaN too.

Letters: S tokens of a row, t = N T, Y = C + R; p pages, s tokens of a page, b
blocks of a row, i parts; others as in CONTRIBUTING.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.mla_decode import cache as caches
from pallas_kernels.mla_decode import parts
from pallas_kernels.mla_decode.cache import PAGE


def decode(
  q_BTNY: Float[Array, 'B T N Y'],
  cache: caches.LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  scale: float,
  *,
  splits: int = 1,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `api.decode`."""
  rows, queries, heads, _ = q_BTNY.shape
  c_BSC, k_rope_BSR = gather(cache, table_Bb, lengths_B, q_BTNY.dtype)
  with jax.named_scope('scores'):
    # Heads and queries as rows of one product, of which the keys are as they
    # lie: any other order is a copy of them.
    q_BNTY = jnp.swapaxes(q_BTNY, 1, 2)
    q_BtY = q_BNTY.reshape(rows, heads * queries, -1)
    q_BtC, q_BtR = jnp.split(q_BtY, [c_BSC.shape[-1]], axis=-1)
    scores_BtS = _product(q_BtC, c_BSC) + _product(q_BtR, k_rope_BSR)
    scores_BNTS = (scores_BtS * scale).reshape(rows, heads, queries, -1)
  s_S = jnp.arange(c_BSC.shape[1], dtype=jnp.int32)
  t_T = jnp.arange(queries, dtype=jnp.int32)
  last_BT = lengths_B[:, None] - queries + t_T
  seen_BTS = s_S <= last_BT[..., None]
  if splits == 1:
    o_BTNC, lse_BNT = _attend(scores_BNTS, c_BSC, seen_BTS)
    return o_BTNC.astype(q_BTNY.dtype), lse_BNT
  of_parts = []
  for part in range(splits):
    first_B, end_B = parts.bounds(lengths_B, part, splits)
    block_S = s_S // PAGE
    mine_BS = (first_B[:, None] <= block_S) & (block_S < end_B[:, None])
    of_parts.append(_attend(scores_BNTS, c_BSC, seen_BTS & mine_BS[:, None]))
  o_iBTNC, lse_iBNT = jax.tree.map(lambda *x: jnp.stack(x), *of_parts)
  return parts.combine(o_iBTNC, lse_iBNT, q_BTNY.dtype)


def gather(
  cache: caches.LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, 'B S C'], Float[Array, 'B S R']]:
  """Latents and rotary keys of each row in order, zeros beyond its length."""
  with jax.named_scope('gather'):
    owned_Bb = parts.owned(table_Bb, lengths_B, cache.pages)
    own = lambda x: caches.from_bits(caches.bits(x)[owned_Bb], x.dtype)
    mine = jax.tree.map(own, cache)
    mine = caches.dequantize(mine, dtype)
    s_S = jnp.arange(owned_Bb.shape[1] * PAGE, dtype=jnp.int32)
    inside_BS1 = (s_S < lengths_B[:, None])[..., None]

    def tokens(x_BbsD):
      x_BSD = x_BbsD.reshape(owned_Bb.shape[0], s_S.size, x_BbsD.shape[-1])
      return jnp.where(inside_BS1, x_BSD, 0)

    return tokens(mine.c_psC), tokens(mine.k_rope_psR)


def _product(q_BtD, k_BSD) -> Float[Array, 'B t S']:
  return jnp.einsum(
    'btd,bsd->bts', q_BtD, k_BSD, preferred_element_type=jnp.float32
  )


def _attend(
  scores_BNTS: Float[Array, 'B N T S'],
  c_BSC: Float[Array, 'B S C'],
  mask_BTS: Bool[Array, 'B T S'],
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Softmax and sum over the tokens of the mask, in f32."""
  with jax.named_scope('attend'):
    masked_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf)
    most_BNT = jnp.max(masked_BNTS, axis=-1, initial=-jnp.inf)
    most_BNT = jnp.where(jnp.isneginf(most_BNT), 0.0, most_BNT)
    p_BNTS = jnp.exp(masked_BNTS - most_BNT[..., None])
    total_BNT = jnp.sum(p_BNTS, axis=-1)
    lse_BNT = most_BNT + jnp.log(total_BNT)
    p_BNTS /= jnp.where(total_BNT == 0, 1.0, total_BNT)[..., None]
    p_BtS = p_BNTS.reshape(len(p_BNTS), -1, p_BNTS.shape[-1])
    o_BtC = jnp.einsum('bts,bsc->btc', p_BtS, c_BSC.astype(jnp.float32))
    o_BNTC = o_BtC.reshape(*p_BNTS.shape[:3], -1)
    return jnp.swapaxes(o_BNTC, 1, 2), lse_BNT
