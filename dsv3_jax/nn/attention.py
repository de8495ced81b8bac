"""Multi-head latent attention as a module: weights, and the three modes.

  train    no cache; naive form, queries see the batch's own tokens
  prefill  naive form; the latents are written to the cache too
  decode   absorbed form, queries see what the cache holds; also later chunks
           of a prompt

All have the same parameters and projections; decision 21 says why they are one
module. The maths is in `ops.mla` and `ops.attention`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import latent_cache, layers
from dsv3_jax.ops import attention, fp8_linear, linear, mla, norm, rope

LatentCache = latent_cache.LatentCache


class AttentionContext(NamedTuple):
  """What all layers share for one batch.

  cos_BTr, sin_BTr: rotations of the positions of this device's tokens.
  valid_BS: f32, 0 on padding. segments_BS: int32, or None when tokens may
  attend across samples; both of whole rows, also where `context` shards them.
  index_BT: int32, place of each token in its row, negative on padding.
  table_Bb: int32, block table of each row. Both None without a cache.
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
) -> AttentionContext:
  """The context of whole rows whose tokens have the given rotary positions."""
  cos_BTr, sin_BTr = rope.tables(cfg, collectives.shard_sequence(positions_BS))
  return AttentionContext(
    cos_BTr, sin_BTr, valid_BS, segments_BS, index_BT, table_Bb
  )


class LatentAttention(nn.Module):
  """MLA (TR 2.1.1).

  absorbed: it decodes; otherwise it trains or, with a cache, prefills.
  """

  cfg: config.ModelConfig
  policy: precision.Policy
  absorbed: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    context: AttentionContext,
    cache: LatentCache | None,
    layer: Int[Array, ''],
  ) -> tuple[Float[Array, 'B T D'], LatentCache | None]:
    cfg, m = self.cfg, self.cfg.mla
    x = linear.operand(_flat(x_BTD), self.policy)
    q_BTNX = self._queries(x).reshape(*x_BTD.shape[:2], -1, m.qk_head_dim)
    latents = self._latents(x, context)
    up = (m.kv_lora_rank, m.num_heads)
    axes = ('kv_latent', 'heads', 'head_dim')
    w_uk_CNH = self._weight('w_uk', (*up, m.qk_nope_head_dim), *axes)
    w_uv_CNU = self._weight('w_uv', (*up, m.v_head_dim), *axes)
    where = (context.index_BT, context.table_Bb, layer)
    if cache is not None:
      cache = latent_cache.write(cache, latents, *where)
    queries = mla.split_query(q_BTNX, context.cos_BTr, context.sin_BTr)
    weights, packed = (w_uk_CNH, w_uv_CNU), None
    if cache is None:
      o_BTNU, packed = self._train(queries, latents, context, *weights)
    elif self.absorbed:
      blocks = latent_cache.layer_blocks(cache, *where)
      o_BTNU = self._decode(queries, blocks, *weights)
    else:
      o_BTNU, packed = self._prefill(queries, latents, cache, context, *weights)
    shape = (m.num_heads, m.v_head_dim, cfg.d_model)
    w_o_NUD = self._weight('w_o', shape, 'heads', 'head_dim', 'embed')
    return self._output(o_BTNU, packed, w_o_NUD), cache

  def _decode(self, queries, blocks, w_uk_CNH, w_uv_CNU):
    """Absorbed form: attends to the cache, up to each query's own index.

    The tokens of a row are consecutive; padding comes behind them.
    """
    return mla.attend_absorbed(
      *queries,
      *blocks,
      w_uk_CNH,
      w_uv_CNU,
      self._scale(),
      self.policy.implementation,
    )

  def _prefill(self, queries, latents, cache, context, w_uk_CNH, w_uv_CNU):
    """As training, with the latents as decode steps will read them."""
    if latent_cache.is_fp8(cache):
      latents = latent_cache.rounded(latents)
    return self._train(queries, latents, context, w_uk_CNH, w_uv_CNU)

  def _train(self, queries, latents, context, w_uk_CNH, w_uv_CNU):
    """Naive form: keys and values of all heads.

    Where `context` shards the rows, the latents of other devices are gathered.

    Returns:
      The output and, under FP8, its E5M6 form for the backward pass.
    """
    policy, heads = self.policy, queries[0].shape[2]
    q_BTNX = jnp.concatenate(queries, axis=-1)
    latents = mla.Latents(*map(collectives.all_gather_sequence, latents))
    c = linear.operand(_flat(latents.c_BSC), policy)
    with jax.named_scope('kv_up'):
      shape = (*latents.c_BSC.shape[:2], heads, -1)
      k_nope_BSNH = linear.project(c, w_uk_CNH, policy).reshape(shape)
      v_BSNU = linear.project(c, w_uv_CNU, policy).reshape(shape)
    keys = (k_nope_BSNH, latents.k_rope_BSR, v_BSNU)
    return attention.causal(
      q_BTNX,
      *keys,
      context.segments_BS,
      self._scale(),
      pack=policy.fp8,
      implementation=policy.implementation,
    )

  def _output(self, o_BTNU, packed, w_o_NUD) -> Float[Array, 'B T D']:
    """The output projection, summed over the devices of the heads."""
    policy, (batch, length, *_) = self.policy, o_BTNU.shape
    with jax.named_scope('attention_out'):
      o = o_BTNU.reshape(batch * length, -1)
      if policy.fp8:
        o = fp8_linear.operand(o, policy, pow2=True)._replace(saved=packed)
      y_MD = linear.project(o, w_o_NUD, policy, pow2=True)
      y_MD = collectives.psum_f32(y_MD, sharding.rules().heads)
      return y_MD.reshape(batch, length, -1)

  def _latents(
    self, x: linear.Operand, context: AttentionContext
  ) -> mla.Latents:
    """Latents and rotary keys of this device's tokens (TR eqs. 1, 3)."""
    cfg, m = self.cfg, self.cfg.mla
    tokens = context.cos_BTr.shape[:2]
    shape = (cfg.d_model, m.cache_width)
    w_dkv_DY = self._weight('w_dkv', shape, 'embed', None)
    kv_norm = layers.norm_weight(self, 'kv_norm', m.kv_lora_rank, 'kv_latent')
    with jax.named_scope('kv_down'):
      y_BTY = linear.project(x, w_dkv_DY, self.policy).reshape(*tokens, -1)
    tables = (context.cos_BTr, context.sin_BTr)
    return mla.compress(y_BTY, kv_norm, *tables, cfg.latent_norm_eps)

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
      q_MQ = norm.rms_norm(q_MQ, q_norm, self.cfg.latent_norm_eps)
      return linear.project(linear.operand(q_MQ, policy), w_uq_QNX, policy)

  def _weight(self, name: str, shape: tuple[int, ...], *axes: str | None):
    return layers.matrix(self, name, shape, axes, self.cfg.init_std)

  def _scale(self) -> float:
    return rope.softmax_scale(self.cfg)


def _flat(x: Float[Array, 'B T D']) -> Float[Array, 'M D']:
  return x.reshape(-1, x.shape[-1])
