"""Causal attention of MLA, in plain jnp (TR eqs. 4, 10).

  s_ts = scale (q_t . [k_nope_s, k_rope_s])  where s <= t, of one segment
  lse_t = log sum_s exp s_ts,  p_ts = exp(s_ts - lse_t),  o_t = sum_s p_ts v_s

With delta_t = o_t . do_t - dlse_t, the gradient of the logits is

  ds_ts = p_ts (do_t . v_s - delta_t) scale

A query always sees itself, so that no row is without keys. Logits and sums are
f32; weights and their gradients are rounded to the operands' type for their
products. It builds arrays of size T x S.

Letters: B sequences, T queries, S = T keys, N heads, X = H + R, U values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output, in q's type, and log-sum-exp, f32."""
  s_BNTS = _logits(q_BTNX, k_nope_BSNH, k_rope_BSR, segments_BT, scale)
  lse_BNT = jax.nn.logsumexp(s_BNTS, axis=-1)
  p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., None]).astype(v_BSNU.dtype)
  o_BTNU = _product('bnts,bsnu->btnu', p_BNTS, v_BSNU)
  return o_BTNU.astype(q_BTNX.dtype), lse_BNT


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
  """Gradients of q, k_nope, k_rope (summed over heads in f32) and v."""
  dtype, width = q_BTNX.dtype, k_nope_BSNH.shape[-1]
  s_BNTS = _logits(q_BTNX, k_nope_BSNH, k_rope_BSR, segments_BT, scale)
  p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., None])
  dp_BNTS = _product('btnu,bsnu->bnts', do_BTNU, v_BSNU)
  ds_BNTS = (p_BNTS * (dp_BNTS - delta_BNT[..., None]) * scale).astype(dtype)
  dv_BSNU = _product('bnts,btnu->bsnu', p_BNTS.astype(dtype), do_BTNU)
  dq_nope_BTNH = _product('bnts,bsnh->btnh', ds_BNTS, k_nope_BSNH)
  dq_rope_BTNR = _product('bnts,bsr->btnr', ds_BNTS, k_rope_BSR)
  dk_BSNX = _product('bnts,btnx->bsnx', ds_BNTS, q_BTNX)
  grads = (
    jnp.concatenate([dq_nope_BTNH, dq_rope_BTNR], axis=-1),
    dk_BSNX[..., :width],
    jnp.sum(dk_BSNX[..., width:], axis=2),
    dv_BSNU,
  )
  return tuple(x.astype(dtype) for x in grads)


def _logits(q_BTNX, k_nope_BSNH, k_rope_BSR, segments_BT, scale):
  """Scaled, f32; -inf where a query does not see the key."""
  width, length = k_nope_BSNH.shape[-1], q_BTNX.shape[1]
  s_BNTS = _product('btnh,bsnh->bnts', q_BTNX[..., :width], k_nope_BSNH)
  s_BNTS += _product('btnr,bsr->bnts', q_BTNX[..., width:], k_rope_BSR)
  seen_BTS = jnp.tril(jnp.ones((1, length, length), bool))
  if segments_BT is not None:
    seen_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return jnp.where(seen_BTS[:, None], s_BNTS * scale, -jnp.inf)


def _product(equation, *operands):
  """In f32: not every backend multiplies BF16 into f32."""
  operands = [x.astype(jnp.float32) for x in operands]
  return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)
