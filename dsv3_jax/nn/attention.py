"""Multi-head latent attention as a module: weights, cache, choice of form."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import layers
from dsv3_jax.ops import attention, fp8_linear, linear, mla, norm, rope
from pallas_kernels import quantized
from pallas_kernels.mla_decode import api as mla_decode


class Context(NamedTuple):
  """What all layers share for one batch.

  cos_BTr, sin_BTr: rotations of the positions of this device's tokens.
  valid_BS: f32, 0 on padding. segments_BS: int32, or None when tokens may
  attend across samples; both of whole rows, of which a device on `context` has
  a part. index_BT: int32, place of each token in its row, or None without a
  cache; negative ones belong to no row. table_Bb: int32, pages of the rows.
  """

  cos_BTr: Array
  sin_BTr: Array
  valid_BS: Array
  segments_BS: Array | None
  index_BT: Array | None
  table_Bb: Array | None


def make_context(
  cfg: config.ModelConfig,
  positions_BS: Int[Array, 'B S'],
  valid_BS: Float[Array, 'B S'],
  segments_BS: Int[Array, 'B S'] | None = None,
  index_BT: Int[Array, 'B T'] | None = None,
  table_Bb: Int[Array, 'B b'] | None = None,
) -> Context:
  """Context of whole rows whose tokens have the given rotary positions."""
  cos_BTr, sin_BTr = rope.tables(cfg, collectives.shard_sequence(positions_BS))
  return Context(cos_BTr, sin_BTr, valid_BS, segments_BS, index_BT, table_Bb)


class Cache(NamedTuple):
  """Latents of all layers of one stack, in p pages of s tokens.

  Key i of row r is in page table_Bb[r, i // s], at place i % s. Latents are in
  the rotary keys' dtype, or `Quantized` with a scale for each 128 of a token.
  """

  c_LpsC: Array | quantized.Quantized
  k_rope_LpsR: Array


def empty_cache(
  cfg: config.ModelConfig,
  num_layers: int,
  pages: int,
  size: int,
  dtype,
  *,
  fp8: bool,
) -> Cache:
  """A cache of zeros: pages of `size` tokens."""

  def shapes():
    each = lambda width: jnp.zeros((num_layers, pages, size, width), dtype)
    widths = (cfg.mla.kv_lora_rank, cfg.mla.qk_rope_head_dim)
    return Cache(*_kept(mla_decode.Cache(*map(each, widths)), fp8))

  zeros = lambda like: jnp.zeros(like.shape, like.dtype)
  return jax.tree.map(zeros, jax.eval_shape(shapes))


class LatentAttention(nn.Module):
  """MLA (TR 2.1.1).

  With `absorbed`, queries attend to the cache up to their own index, a row's
  tokens being consecutive and those of no row behind them; without,
  to the batch's own tokens, whose latents a cache, if given, receives. Where
  `context` cuts the rows, the latents of the others are gathered.
  """

  cfg: config.ModelConfig
  policy: precision.Policy
  absorbed: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    context: Context,
    cache: Cache | None,
    layer: Int[Array, ''],
  ) -> tuple[Float[Array, 'B T D'], Cache | None]:
    cfg, m, policy = self.cfg, self.cfg.mla, self.policy
    cos, sin = context.cos_BTr, context.sin_BTr
    over = sharding.rules().heads
    heads = m.num_heads // collectives.axis_size(over)  # of this device
    flat = lambda x: x.reshape(-1, x.shape[-1])
    tokens = x_BTD.shape[:2]
    x = linear.operand(flat(x_BTD), policy)
    q_BTNX = self._queries(x).reshape(*tokens, heads, m.qk_head_dim)
    w_dkv_DY = self._weight(
      'w_dkv', (cfg.d_model, m.cache_width), 'embed', None
    )
    kv_norm = layers.norm_weight(self, 'kv_norm', m.kv_lora_rank, 'kv_latent')
    with jax.named_scope('kv_down'):
      y_BTY = linear.project(x, w_dkv_DY, policy).reshape(*tokens, -1)
    latents = mla.compress(y_BTY, kv_norm, cos, sin, cfg.norm_eps)
    up = (m.kv_lora_rank, m.num_heads)
    axes = ('kv_latent', 'heads', 'head_dim')
    w_uk_CNH = self._weight('w_uk', (*up, m.qk_nope_head_dim), *axes)
    w_uv_CNU = self._weight('w_uv', (*up, m.v_head_dim), *axes)
    cache = _write(cache, latents, context, layer)
    scale, packed = rope.softmax_scale(cfg), None
    if self.absorbed:
      q_nope, q_rope = mla.split_query(q_BTNX, cos, sin)
      o_BTNU = mla.attend_absorbed(
        *(q_nope, q_rope, *_of_layer(cache, context, layer)),
        *(w_uk_CNH, w_uv_CNU, scale, policy.implementation),
      )
    else:
      q_BTNX = jnp.concatenate(mla.split_query(q_BTNX, cos, sin), axis=-1)
      if _is_fp8(cache):  # all tokens see the same, whichever form is used
        latents = _rounded(latents)
      latents = mla.Latents(*map(collectives.all_gather_sequence, latents))
      c = linear.operand(flat(latents.c_BSC), policy)
      with jax.named_scope('kv_up'):
        each = (*latents.c_BSC.shape[:2], heads, -1)
        k_nope_BSNH = linear.project(c, w_uk_CNH, policy).reshape(each)
        v_BSNU = linear.project(c, w_uv_CNU, policy).reshape(each)
      keys = (k_nope_BSNH, latents.k_rope_BSR, v_BSNU)
      o_BTNU, packed = attention.causal(
        *(q_BTNX, *keys, context.segments_BS, scale),
        *(policy.fp8, policy.implementation),
      )
    shape = (m.num_heads, m.v_head_dim, cfg.d_model)
    w_o_NUD = self._weight('w_o', shape, 'heads', 'head_dim', 'embed')
    with jax.named_scope('attention_out'):
      o = o_BTNU.reshape(-1, heads * m.v_head_dim)
      if policy.fp8:
        o = fp8_linear.operand(o, policy, pow2=True)._replace(kept=packed)
      y_MD = linear.project(o, w_o_NUD, policy, pow2=True)
      y_MD = collectives.psum_f32(y_MD, over)
      return y_MD.reshape(x_BTD.shape), cache

  def _queries(self, x: linear.Operand) -> Float[Array, 'M NX']:
    """Query heads, through the query latent if there is one (TR eqs. 6, 7)."""
    m, policy = self.cfg.mla, self.policy
    heads = (m.num_heads, m.qk_head_dim)
    with jax.named_scope('q_proj'):
      if not m.q_lora_rank:
        shape = (self.cfg.d_model, *heads)
        w_q_DNX = self._weight('w_q', shape, 'embed', 'heads', 'head_dim')
        return linear.project(x, w_q_DNX, policy)
      rank = m.q_lora_rank
      w_dq_DQ = self._weight(
        'w_dq', (self.cfg.d_model, rank), 'embed', 'q_latent'
      )
      q_norm = layers.norm_weight(self, 'q_norm', rank, 'q_latent')
      w_uq_QNX = self._weight(
        'w_uq', (rank, *heads), 'q_latent', 'heads', 'head_dim'
      )
      q_MQ = linear.project(x, w_dq_DQ, policy)
      q_MQ = checkpoint_name(q_MQ, 'q_latent')
      q_MQ = norm.rms_norm(q_MQ, q_norm, self.cfg.norm_eps)
      return linear.project(linear.operand(q_MQ, policy), w_uq_QNX, policy)

  def _weight(self, name: str, shape: tuple[int, ...], *axes: str | None):
    return layers.matrix(self, name, shape, axes, self.cfg.init_std)


def _write(
  cache: Cache | None,
  latents: mla.Latents,
  context: Context,
  layer: Int[Array, ''],
) -> Cache | None:
  """Puts latents at their indices; those of no row or past its pages go."""
  if cache is None:
    return None
  _, pages, size, _ = cache.c_LpsC.shape
  index_BT, table_Bb = context.index_BT, context.table_Bb
  page_BT = jnp.take_along_axis(
    table_Bb, index_BT // size, axis=1, mode='fill', fill_value=pages
  )
  page_BT = jnp.where(index_BT < 0, pages, page_BT)
  at = (layer, page_BT, index_BT % size)

  def put(old, new):
    bits = mla_decode.bits
    new = bits(new.astype(old.dtype))
    written = bits(old).at[at].set(new, mode='drop')
    return mla_decode.from_bits(written, old.dtype)

  new = Cache(*_kept(mla_decode.Cache(*latents), _is_fp8(cache)))
  return jax.tree.map(put, cache, new)


def _is_fp8(cache: Cache | None) -> bool:
  return cache is not None and isinstance(cache.c_LpsC, quantized.Quantized)


def _kept(latents: mla_decode.Cache, fp8: bool) -> tuple:
  """Latents and rotary keys as the cache has them."""
  kept = mla_decode.quantize(latents) if fp8 else latents
  return kept.c_psC, kept.k_rope_psR


def _rounded(latents: mla.Latents) -> mla.Latents:
  """Latents as they are read from an FP8 cache."""
  kept = mla_decode.quantize(mla_decode.Cache(*latents))
  read = mla_decode.dequantize(kept, latents.c_BSC.dtype)
  return mla.Latents(read.c_psC, read.k_rope_psR)


def _of_layer(
  cache: Cache, context: Context, layer: Int[Array, '']
) -> tuple[mla_decode.Cache, Int[Array, 'B b'], Int[Array, 'B']]:
  """The pages of all layers as they lie, a layer's table, and lengths.

  A row's tokens follow one another from the first, which tells its length;
  what comes behind them belongs to no row, and sees what it may.
  """
  _, count, size, _ = cache.c_LpsC.shape
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  # Where a row has no page, one of its own stands: another's may not be finite.
  own_B1 = jnp.minimum(context.table_Bb[:, :1], count - 1)
  table_Bb = jnp.where(context.table_Bb < count, context.table_Bb, own_B1)
  table_Bb += layer * count
  first_B, length = context.index_BT[:, 0], context.index_BT.shape[1]
  lengths_B = jnp.where(first_B < 0, 0, first_B + length)
  # Drafts behind drafts may pass the end of the table.
  lengths_B = jnp.minimum(lengths_B, table_Bb.shape[1] * size)
  pages = mla_decode.Cache(*jax.tree.map(flat, cache))
  return pages, table_Bb, lengths_B
