"""Multi-head latent attention (TR 2.1.1).

Queries and keys have a part without position (H) and a rotary part (R); the
rotary key is one vector a token, shared by all heads. Keys and values come from
one latent of width C a token, so a cache holds C + R values a token and layer.

  naive     k_h = W_UK_h c, v_h = W_UV_h c;  o_h = softmax(q_h . k_h) v_h
  absorbed  q_h^T (W_UK_h c) = (W_UK_h^T q_h)^T c: attend in the latent space,
            then apply W_UV_h once to the mixed latent

Both give the same output. Naive (`ops/attention.py`) is cheaper for many
queries, absorbed for few; `nn/attention.py` chooses. A token's place in the
cache is its index in the row, not its RoPE position.
Letters: X = H + R, Y = C + R; others as in CONTRIBUTING.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import norm, rope
from pallas_kernels.mla_decode import api as mla_decode


class Latents(NamedTuple):
  """What is cached a token: normed latent and rotated key."""

  c_BSC: Float[Array, 'B S C']
  k_rope_BSR: Float[Array, 'B S R']


def compress(
  y_BTY: Float[Array, 'B T Y'],
  kv_norm_C: Float[Array, 'C'],
  cos_BTr: Float[Array, 'B T r'],
  sin_BTr: Float[Array, 'B T r'],
  eps: float,
) -> Latents:
  """Latents from the down-projection W_DKV x (TR eqs. 1, 3).

  The rotary key is not normed.
  """
  with jax.named_scope('kv_latent'):
    y_BTY = checkpoint_name(y_BTY, 'kv_latent')
    width = kv_norm_C.shape[0]
    c_BTC = norm.rms_norm(y_BTY[..., :width], kv_norm_C, eps)
    return Latents(c_BTC, rope.rotate(y_BTY[..., width:], cos_BTr, sin_BTr))


def split_query(
  q_BTNX: Float[Array, 'B T N X'],
  cos_BTr: Float[Array, 'B T r'],
  sin_BTr: Float[Array, 'B T r'],
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B T N R']]:
  """Query heads into their unrotated and rotated parts (TR eqs. 8, 9)."""
  head_dim = q_BTNX.shape[-1] - 2 * cos_BTr.shape[-1]
  q_rope_BTNR = rope.rotate(q_BTNX[..., head_dim:], cos_BTr, sin_BTr)
  return q_BTNX[..., :head_dim], q_rope_BTNR


def attend_absorbed(
  q_nope_BTNH: Float[Array, 'B T N H'],
  q_rope_BTNR: Float[Array, 'B T N R'],
  cache: mla_decode.LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  w_uk_CNH: Float[Array, 'C N H'],
  w_uv_CNU: Float[Array, 'C N U'],
  scale: float,
  implementation: str = 'auto',
) -> Float[Array, 'B T N U']:
  """Attention of rows' last T tokens in the latent space (TR 2.1.1).

  Args:
    cache, table_Bb, lengths_B, implementation: as in `mla_decode.decode`.
  """
  with jax.named_scope('attention_absorbed'):
    dtype = q_nope_BTNH.dtype
    w_uk_CNH, w_uv_CNU = w_uk_CNH.astype(dtype), w_uv_CNU.astype(dtype)
    q_abs_BTNC = jnp.einsum('btnh,cnh->btnc', q_nope_BTNH, w_uk_CNH)
    q_BTNY = jnp.concatenate([q_abs_BTNC, q_rope_BTNR], axis=-1)
    args = (q_BTNY, cache, table_Bb, lengths_B, scale, implementation)
    o_BTNC, _ = mla_decode.decode(*args)
    return jnp.einsum('btnc,cnu->btnu', o_BTNC, w_uv_CNU)
