"""Causal attention of MLA in blocks of queries, for XLA on any device.

What `reference` computes, without arrays of size T x T: a block of 128 queries
sees only the keys up to its own end, so that about half of the products are
skipped, and the backward pass recomputes the scores of a block from their
log-sum-exp.

Letters: B sequences, T queries, S = T keys, N heads, X = H + R, U values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 128  # queries of one block
LOWEST = jnp.finfo(jnp.float32).min  # a masked score


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output and log-sum-exp, both f32."""
  k_BSNX = join(k_nope_BSNH, k_rope_BSR)
  outputs, sums = [], []
  for start, end in _blocks(q_BTNX.shape[1]):
    q, k = q_BTNX[:, start:end], k_BSNX[:, :end]
    s_BNTS = _scores(q, k, segments_BT, start, scale)
    lse_BNT = jax.nn.logsumexp(s_BNTS, axis=-1)
    p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., None]).astype(v_BSNU.dtype)
    outputs.append(product('bnts,bsnu->btnu', p_BNTS, v_BSNU[:, :end]))
    sums.append(lse_BNT)
  return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=-1)


def backward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
  lse_BNT: Float[Array, 'B N T'],
  delta_BNT: Float[Array, 'B N T'],
  do_BTNU: Float[Array, 'B T N U'],
) -> tuple[Array, Array, Array, Array]:
  """Gradients of q, k_nope, k_rope and v; those of keys and values f32."""
  k_BSNX = join(k_nope_BSNH, k_rope_BSR)
  length = q_BTNX.shape[1]
  dq, dk_BSNX, dv_BSNU = [], 0.0, 0.0
  for start, end in _blocks(length):
    q, k, v = q_BTNX[:, start:end], k_BSNX[:, :end], v_BSNU[:, :end]
    do, rest = do_BTNU[:, start:end], (0, length - end)
    s_BNTS = _scores(q, k, segments_BT, start, scale)
    rows = (x[..., start:end] for x in (lse_BNT, delta_BNT))
    dq_tile, dk, dv = tile_gradients(q, k, v, s_BNTS, *rows, do, scale)
    dq.append(dq_tile.astype(q.dtype))
    grow = lambda x, rest=rest: jnp.pad(x, ((0, 0), rest, (0, 0), (0, 0)))
    dk_BSNX += grow(dk)
    dv_BSNU += grow(dv)
  width = k_nope_BSNH.shape[-1]
  dk_rope_BSR = jnp.sum(dk_BSNX[..., width:], axis=2)
  dq_BTNX = jnp.concatenate(dq, axis=1)
  return dq_BTNX, dk_BSNX[..., :width], dk_rope_BSR, dv_BSNU


def masked_scores(
  q_BTNX: Float[Array, 'B T N X'],
  k_BSNX: Float[Array, 'B S N X'],
  index_T1: Int[Array, 'T 1'],
  index_S: Int[Array, 'S'],
  segments: tuple[Int[Array, 'B T'], Int[Array, 'B S']] | None,
  scale: float,
) -> Float[Array, 'B N T S']:
  """Scaled logits, f32; `LOWEST` for keys that a query does not see.

  Args:
    index_T1, index_S: places of the queries and keys in their sequence.
    segments: of the queries and of the keys.
  """
  mask_BTS = (index_S <= index_T1)[None]
  if segments is not None:
    query_BT, key_BS = segments
    mask_BTS = mask_BTS & (query_BT[:, :, None] == key_BS[:, None])
  s_BNTS = product('btnx,bsnx->bnts', q_BTNX, k_BSNX) * scale
  return jnp.where(mask_BTS[:, None], s_BNTS, LOWEST)


def tile_gradients(
  q_BTNX: Float[Array, 'B T N X'],
  k_BSNX: Float[Array, 'B S N X'],
  v_BSNU: Float[Array, 'B S N U'],
  s_BNTS: Float[Array, 'B N T S'],
  lse_BNT: Float[Array, 'B N T'],
  delta_BNT: Float[Array, 'B N T'],
  do_BTNU: Float[Array, 'B T N U'],
  scale: float,
) -> tuple[Array, Array, Array]:
  """What queries T and keys S add to the gradients of q, k and v, f32."""
  dtype = q_BTNX.dtype
  p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., None])
  dp_BNTS = product('btnu,bsnu->bnts', do_BTNU, v_BSNU)
  ds_BNTS = p_BNTS * (dp_BNTS - delta_BNT[..., None]) * scale
  p_BNTS, ds_BNTS = p_BNTS.astype(dtype), ds_BNTS.astype(dtype)
  return (
    product('bnts,bsnx->btnx', ds_BNTS, k_BSNX),
    product('bnts,btnx->bsnx', ds_BNTS, q_BTNX),
    product('bnts,btnu->bsnu', p_BNTS, do_BTNU),
  )


def join(
  k_nope_BSNH: Float[Array, 'B S N H'], k_rope_BSR: Float[Array, 'B S R']
) -> Float[Array, 'B S N X']:
  """Keys of all heads, the shared rotary key behind each."""
  shape = (*k_nope_BSNH.shape[:3], k_rope_BSR.shape[-1])
  k_rope_BSNR = jnp.broadcast_to(k_rope_BSR[:, :, None], shape)
  return jnp.concatenate([k_nope_BSNH, k_rope_BSNR], axis=-1)


def product(subscripts: str, a: Array, b: Array) -> Float[Array, '...']:
  """A product of heads with f32 sums and an f32 result."""
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[tuple[int, int]]:
  """Start and end of every block of queries."""
  starts = range(0, length, QUERY_BLOCK)
  return [(start, min(start + QUERY_BLOCK, length)) for start in starts]


def _scores(q_BTNX, k_BSNX, segments_BS, start, scale):
  """Scores of a block: its queries begin at `start` and end with the keys."""
  end = k_BSNX.shape[1]
  index_T1, index_S = jnp.arange(start, end)[:, None], jnp.arange(end)
  segments = None
  if segments_BS is not None:
    segments = segments_BS[:, start:end], segments_BS[:, :end]
  return masked_scores(q_BTNX, k_BSNX, index_T1, index_S, segments, scale)
