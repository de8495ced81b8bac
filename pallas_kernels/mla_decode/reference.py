"""What absorbed decoding means, in plain jnp (TR 2.1.1).

A row's token s is at place s % 64 of page table[s // 64]. Its T queries are its
last T tokens, so that query t sees the tokens s <= length - T + t:

  score_s = (q_c . c_s + q_r . k_s) * scale,   p = softmax(score)
  o = sum_s p_s c_s,                           lse = log sum_s exp(score_s)

An FP8 latent is dequantised to the queries' dtype first. Scores, softmax and
sums are f32. A query that sees no token has o = 0 and lse = -inf. What is not a
row's own (pages of others, the rest of its last page, table entries beyond its
length) may hold anything, NaN too.

Letters: B rows, T queries of a row, N heads, X = N T, C latent, R rotary, Y = C
+ R, S tokens of a row, Z parts; J pages, I tokens of a page, j blocks of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.mla_decode import cache as caches
from pallas_kernels.mla_decode import parts
from pallas_kernels.mla_decode.cache import PAGE


def decode(
  q_BTNY: Float[Array, 'B T N Y'],
  cache: caches.Cache,
  table_Bj: Int[Array, 'B j'],
  lengths_B: Int[Array, 'B'],
  scale: float,
  *,
  splits: int = 1,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `api.decode`."""
  rows, queries, heads, _ = q_BTNY.shape
  c_BSC, k_rope_BSR = gather(cache, table_Bj, lengths_B, q_BTNY.dtype)
  with jax.named_scope('scores'):
    # Heads and queries as rows of one product, of which the keys are as they
    # lie: any other order is a copy of them.
    q_BNTY = jnp.swapaxes(q_BTNY, 1, 2)
    q_BXY = q_BNTY.reshape(rows, heads * queries, -1)
    q_BXC, q_BXR = jnp.split(q_BXY, [c_BSC.shape[-1]], axis=-1)
    scores_BXS = _product(q_BXC, c_BSC) + _product(q_BXR, k_rope_BSR)
    scores_BNTS = (scores_BXS * scale).reshape(rows, heads, queries, -1)
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
  o_ZBTNC, lse_ZBNT = jax.tree.map(lambda *x: jnp.stack(x), *of_parts)
  return parts.combine(o_ZBTNC, lse_ZBNT, q_BTNY.dtype)


def gather(
  cache: caches.Cache,
  table_Bj: Int[Array, 'B j'],
  lengths_B: Int[Array, 'B'],
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, 'B S C'], Float[Array, 'B S R']]:
  """Latents and rotary keys of each row in order, zeros beyond its length."""
  with jax.named_scope('gather'):
    owned_Bj = parts.owned(table_Bj, lengths_B, cache.pages)
    own = lambda x: caches.from_bits(caches.bits(x)[owned_Bj], x.dtype)
    mine = jax.tree.map(own, cache)
    mine = caches.dequantize(mine, dtype)
    s_S = jnp.arange(owned_Bj.shape[1] * PAGE, dtype=jnp.int32)
    inside_BS1 = (s_S < lengths_B[:, None])[..., None]

    def tokens(x_BjID):
      x_BSD = x_BjID.reshape(owned_Bj.shape[0], s_S.size, x_BjID.shape[-1])
      return jnp.where(inside_BS1, x_BSD, 0)

    return tokens(mine.c_JIC), tokens(mine.k_rope_JIR)


def _product(q_BXD, k_BSD) -> Float[Array, 'B X S']:
  return jnp.einsum(
    'bxd,bsd->bxs', q_BXD, k_BSD, preferred_element_type=jnp.float32
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
    p_BXS = p_BNTS.reshape(len(p_BNTS), -1, p_BNTS.shape[-1])
    o_BXC = jnp.einsum('bxs,bsc->bxc', p_BXS, c_BSC.astype(jnp.float32))
    o_BNTC = o_BXC.reshape(*p_BNTS.shape[:3], -1)
    return jnp.swapaxes(o_BNTC, 1, 2), lse_BNT
