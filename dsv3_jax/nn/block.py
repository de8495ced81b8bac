"""One transformer block, and stacks of them (TR 2.1).

  x += Attention(RMSNorm(x));  x += FFN(RMSNorm(x))

A stack scans over layers whose parameters carry a leading layer dim, so that 61
layers compile as fast as one; unrolled, each layer has parameters of its own.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import attention, layers, moe
from dsv3_jax.ops import linear

# 'report' (TR 3.2.3): RMSNorm, the MLA up-projections and the SwiGLU product
# are recomputed in the backward pass from the values named here.
_SAVED = (
  'q_latent',
  'kv_latent',
  'attention',
  'all_to_all',
  'swiglu_in',
  'residual',
)


class Block(nn.Module):
  """Attention and feed-forward, each behind a norm and a residual."""

  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy
  is_moe: bool
  absorbed: bool

  @nn.compact
  def __call__(
    self,
    carry: tuple[Array, attention.LatentCache | None],
    bias_E: Float[Array, 'E'],
    layer: Array,
    context: attention.AttentionContext,
  ) -> tuple[tuple[Array, attention.LatentCache | None], moe.MoeStats | None]:
    """(hidden, cache) -> the same after the block, and the MoE's statistics."""
    cfg, (x_BTD, cache) = self.cfg, carry
    attend = attention.LatentAttention(
      cfg, self.policy, self.absorbed, name='attention'
    )
    normed = layers.RMSNorm(cfg, name='attention_norm')(x_BTD)
    y_BTD, cache = attend(normed, context, cache, layer)
    x_BTD = jax.ad_checkpoint.checkpoint_name(x_BTD + y_BTD, 'residual')
    normed = layers.RMSNorm(cfg, name='ffn_norm')(x_BTD)
    if self.is_moe:
      ffn = moe.DeepSeekMoE(cfg, self.balance, self.policy, name='moe')
      valid_BT = collectives.shard_sequence(context.valid_BS)
      y_BTD, stats = ffn(normed, bias_E, valid_BT)
    else:
      ffn = layers.SwiGLU(cfg, cfg.d_ff, self.policy, name='ffn')
      normed_MD = normed.reshape(-1, cfg.d_model)
      y_MD = linear.swiglu(normed_MD, *ffn(), self.policy)
      y_MD = collectives.psum_f32(y_MD, sharding.rules().ffn)
      y_BTD, stats = y_MD.reshape(x_BTD.shape), None
    return (x_BTD + y_BTD, cache), stats


class Stack(nn.Module):
  """`length` blocks of one kind, scanned or unrolled."""

  length: int
  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy
  is_moe: bool
  absorbed: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    cache: attention.LatentCache | None,
    bias_LE: Float[Array, 'L E'],
    context: attention.AttentionContext,
  ) -> tuple[Array, attention.LatentCache | None, moe.MoeStats | None]:
    """Runs all blocks; statistics come stacked over the layers."""
    index_L = jnp.arange(self.length)
    block = with_remat(self.cfg, scanned=self.cfg.scan_layers)
    fields = {
      'cfg': self.cfg,
      'balance': self.balance,
      'policy': self.policy,
      'is_moe': self.is_moe,
      'absorbed': self.absorbed,
    }
    carry = (x_BTD, cache)
    if self.cfg.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={'params': 0, 'quantized': 0, 'redundant_slots': 0},
        split_rngs={'params': True},
        in_axes=(0, 0, nn.broadcast),
        length=self.length,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(**fields, name='layers')
      carry, stats = scanned(carry, bias_LE, index_L, context)
      return *carry, stats
    layer_stats = []
    for i in range(self.length):
      layer = block(**fields, name=f'layer_{i}')
      carry, stats = layer(carry, bias_LE[i], index_L[i], context)
      layer_stats.append(stats)
    return *carry, jax.tree.map(lambda *xs: jnp.stack(xs), *layer_stats)


def with_remat(cfg: config.ModelConfig, *, scanned: bool) -> Any:
  """`Block` under the policy named by `model.remat`."""
  if cfg.remat == 'none':
    return Block
  policies = jax.checkpoint_policies
  named = policies.save_only_these_names(*_SAVED)
  policy = policies.nothing_saveable if cfg.remat == 'full' else named
  # Inside a scan, JAX cannot merge the second forward pass with the first.
  return nn.remat(Block, prevent_cse=not scanned, policy=policy)
