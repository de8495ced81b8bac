"""Causal attention of whole sequences, differentiated by hand.

  s_ts = scale (q_t . k_s),  p = exp(s - lse),  o = p v
  delta_t = o_t . do_t,  ds = p (do v^T - delta) scale             (TR eq. 10)

The backward pass makes the scores again from their log-sum-exp, so that nothing
of size T x T is kept: queries, keys and values (which rematerialisation makes
again from the latents), lse, and the output; under FP8 the output in E5M6,
shared with the projection behind it (TR 3.3.3).

Keys of all heads end in one rotary key that they share. Blocks of queries see
only the keys up to their own end: about half of the products are never made.
Letters: X = H + R; others as in the alphabet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives
from dsv3_jax.ops import context_attention
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import e5m6
from pallas_kernels.mla_attention import api as mla_attention

_product = context_attention.product
_QUERY_BLOCK = 128  # rows of one causal block


def causal(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
  pack: bool = False,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N U'], quantized.Packed | None]:
  """Causal attention of a sequence on itself (TR eqs. 2, 5, 10).

  Where `context` cuts it, queries are this device's and keys all.

  Args:
    segments_BS: tokens attend within their segment only; None: to all before.
    scale: factor on the logits; softmax in f32.
    pack: keep the output as E5M6, [B * T, N * U].
    implementation: of `mla_attention`; its reference is the code below.
  Returns:
    The output, and with `pack` what the backward pass has instead of it.
  Raises:
    ValueError, NotImplementedError: as `mla_attention.attention`; and there is
      no kernel where `context` cuts the rows.
  """
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS)
  chosen = 'context'
  if collectives.axis_size(chosen) == 1:
    chosen = mla_attention.choose(implementation, *args)
  elif implementation not in ('auto', 'reference'):
    raise NotImplementedError(f'no {implementation!r} where rows are cut')
  return _causal(*args, scale, pack, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _causal(
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS, scale, pack, chosen
):
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS)
  return _causal_fwd(*args, scale, pack, chosen)[0]


def _causal_fwd(
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS, scale, pack, chosen
):
  keys = context_attention.Keys(k_nope_BSNH, k_rope_BSR, v_BSNU)
  forward, _ = _ways(chosen)
  with jax.named_scope('attention'):
    o_BTNU, lse_BNT = forward(q_BTNX, keys, segments_BS, scale)
    o_BTNU = o_BTNU.astype(v_BSNU.dtype)
  kept = o_BTNU
  if pack:
    tokens = o_BTNU.shape[0] * o_BTNU.shape[1]
    kept = e5m6.quantize(o_BTNU.reshape(tokens, -1))
  kept, lse_BNT = jax.tree.map(
    lambda x: checkpoint_name(x, 'attention'), (kept, lse_BNT)
  )
  inputs = (q_BTNX, keys, segments_BS)
  if pack:
    return (o_BTNU, kept), (inputs, lse_BNT, kept)
  # The caller goes on with the kept array: one more would be a second copy.
  return (kept, None), (inputs, lse_BNT, kept)


def _causal_bwd(scale, pack, chosen, residuals, cotangents):
  inputs, lse_BNT, kept = residuals
  do_BTNU, dtype, f32 = cotangents[0], inputs[0].dtype, jnp.float32
  o_BTNU = e5m6.unpack(kept).reshape(do_BTNU.shape) if pack else kept
  _, backward = _ways(chosen)
  with jax.named_scope('attention'):
    delta_BNT = jnp.einsum(
      'btnu,btnu->bnt', o_BTNU.astype(f32), do_BTNU.astype(f32)
    )
    grads = backward(*inputs, scale, lse_BNT, delta_BNT, do_BTNU)
    dq_BTNX, keys = jax.tree.map(lambda x: x.astype(dtype), grads)
    return dq_BTNX, *keys, None


def _ways(chosen: str):
  """Forward and backward: of a sequence on itself, or of a device's part."""
  if chosen == 'context':
    return context_attention.forward, context_attention.backward
  if chosen == 'reference':
    return _forward, _backward
  forward, backward = mla_attention.ways(chosen)

  def gradients(q_BTNX, keys, *rest):
    dq_BTNX, *dkeys = backward(q_BTNX, *keys, *rest)
    return dq_BTNX, context_attention.Keys(*dkeys)

  return lambda q, keys, *rest: forward(q, *keys, *rest), gradients


def _forward(q_BTNX, keys, segments_BT, scale):
  """Output, f32, and log-sum-exp."""
  k_BSNX = context_attention.join(keys.k_nope_BSNH, keys.k_rope_BSR)
  v_BSNU, outputs, sums = keys.v_BSNU, [], []
  for start, end in _blocks(q_BTNX.shape[1]):
    s_BNTS = _scores(q_BTNX, k_BSNX, segments_BT, start, end, scale)
    lse_BNT = jax.nn.logsumexp(s_BNTS, axis=-1)
    p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., None]).astype(v_BSNU.dtype)
    outputs.append(_product('bnts,bsnu->btnu', p_BNTS, v_BSNU[:, :end]))
    sums.append(lse_BNT)
  return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=-1)


def _backward(q_BTNX, keys, segments_BT, scale, lse_BNT, delta_BNT, do_BTNU):
  """Gradients of queries and keys."""
  k_BSNX = context_attention.join(keys.k_nope_BSNH, keys.k_rope_BSR)
  length, dtype = q_BTNX.shape[1], q_BTNX.dtype
  dq, dk_BSNX, dv_BSNU = [], 0.0, 0.0
  for start, end in _blocks(length):
    q, k, v = q_BTNX[:, start:end], k_BSNX[:, :end], keys.v_BSNU[:, :end]
    do, rest = do_BTNU[:, start:end], (0, length - end)
    s_BNTS = _scores(q_BTNX, k_BSNX, segments_BT, start, end, scale)
    p_BNTS = jnp.exp(s_BNTS - lse_BNT[..., start:end, None])
    dp_BNTS = _product('btnu,bsnu->bnts', do, v)
    ds_BNTS = p_BNTS * (dp_BNTS - delta_BNT[..., start:end, None]) * scale
    p_BNTS, ds_BNTS = p_BNTS.astype(dtype), ds_BNTS.astype(dtype)
    dq.append(_product('bnts,bsnx->btnx', ds_BNTS, k).astype(dtype))
    grow = lambda x, rest=rest: jnp.pad(x, ((0, 0), rest, (0, 0), (0, 0)))
    dk_BSNX += grow(_product('bnts,btnx->bsnx', ds_BNTS, q))
    dv_BSNU += grow(_product('bnts,btnu->bsnu', p_BNTS, do))
  width = keys.k_nope_BSNH.shape[-1]
  dk_rope_BSR = jnp.sum(dk_BSNX[..., width:], axis=2)
  dkeys = (dk_BSNX[..., :width], dk_rope_BSR, dv_BSNU)
  return jnp.concatenate(dq, axis=1), context_attention.Keys(*dkeys)


_causal.defvjp(_causal_fwd, _causal_bwd)


def _blocks(length: int) -> list[tuple[int, int]]:
  """First and last query of every block."""
  starts = range(0, length, _QUERY_BLOCK)
  return [(start, min(start + _QUERY_BLOCK, length)) for start in starts]


def _scores(q_BTNX, k_BSNX, segments_BT, start, end, scale):
  """Scaled logits of queries [start, end), f32, the masked ones very low."""
  mask_BTS = (jnp.arange(end) <= jnp.arange(start, end)[:, None])[None]
  if segments_BT is not None:
    query_segments, key_segments = segments_BT[:, start:end], segments_BT
    same = query_segments[:, :, None] == key_segments[:, None, :end]
    mask_BTS = mask_BTS & same
  q, k = q_BTNX[:, start:end], k_BSNX[:, :end]
  s_BNTS = _product('btnx,bsnx->bnts', q, k) * scale
  return jnp.where(mask_BTS[:, None], s_BNTS, jnp.finfo(jnp.float32).min)
