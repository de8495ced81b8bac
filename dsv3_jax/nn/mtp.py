"""One multi-token prediction module (TR 2.2).

  h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k-1})]     (eq. 21)
  h^k  = Block(h');  p = softmax(Head(RMSNorm(h^k)))         (eqs. 22, 23)

The embedding comes first in the concatenation, as in the published checkpoint;
eq. 21 writes the reverse, which is a permutation of M's columns. The output
norm is the module's own; embedding and head are the main model's.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, precision
from dsv3_jax.nn import attention, block, layers, moe
from dsv3_jax.ops import linear, mtp_loss


class MtpModule(nn.Module):
  """Depth k of the prediction chain."""

  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy
  absorbed: bool = False

  @nn.compact
  def __call__(
    self,
    h_BTD: Float[Array, 'B T D'],
    embedded_BTD: Float[Array, 'B T D'],
    bias_E: Float[Array, 'E'],
    context: attention.AttentionContext,
    cache: attention.LatentCache | None = None,
  ) -> tuple[Array, Array, moe.MoeStats, attention.LatentCache | None]:
    """Returns the block's output, its normed form, statistics and the cache.

    Args:
      h_BTD: of depth k - 1. embedded_BTD: Emb(t_{i+k}) at position i.
    """
    cfg = self.cfg
    with jax.named_scope('mtp'):
      pair = (
        layers.RMSNorm(cfg, name='embed_norm')(embedded_BTD),
        layers.RMSNorm(cfg, name='hidden_norm')(h_BTD),
      )
      shape, axes = (2 * cfg.d_model, cfg.d_model), (None, 'embed')
      w_proj = layers.matrix(self, 'w_proj', shape, axes, cfg.init_std)
      merged = jnp.concatenate(pair, axis=-1)
      merged_M2D = merged.reshape(-1, 2 * cfg.d_model)
      x_MD = linear.project(merged_M2D, w_proj, self.policy)
      x_BTD = x_MD.reshape(h_BTD.shape)
      body = block.with_remat(cfg, scanned=False)(
        cfg,
        self.balance,
        self.policy,
        is_moe=True,
        absorbed=self.absorbed,
        name='block',
      )
      carry, stats = body((x_BTD, cache), bias_E, jnp.array(0), context)
      x_BTD, cache = carry
      normed_BTD = layers.RMSNorm(cfg, name='final_norm')(x_BTD)
      return x_BTD, normed_BTD, stats, cache


def chain(
  cfg: config.ModelConfig,
  modules: Sequence[Callable],
  h_BTD: Float[Array, 'B T D'],
  raw_BTD: Float[Array, 'B T D'],
  ahead: Sequence[Float[Array, 'B T D']],
  router_biases: dict[str, Array],
  context: attention.AttentionContext,
) -> tuple[list[Array], moe.MoeStats]:
  """Normed hidden states of each depth, and their MoE statistics.

  Args:
    h_BTD, raw_BTD: the main model's, after and before its final norm.
    ahead: Emb(t_{i+k}) for each depth k.
  """
  takes_normed = cfg.mtp.hidden == 'post_norm'
  previous_BTD = h_BTD if takes_normed else raw_BTD
  normed, module_stats = [], []
  pairs = zip(modules, ahead, strict=True)
  for k, (module, embedded_BTD) in enumerate(pairs, start=1):
    # The last k positions have no target: they are no part of L_k or f_i.
    valid_BS = mtp_loss.mtp_shift(context.valid_BS, k)
    args = (embedded_BTD, router_biases['mtp'][k - 1])
    args += (context._replace(valid_BS=valid_BS),)
    raw, h, stats, _ = module(previous_BTD, *args)
    previous_BTD = h if takes_normed else raw
    normed.append(h)
    module_stats.append(stats)
  if not module_stats:
    empty = jnp.zeros((0, cfg.moe.num_experts))
    return [], moe.MoeStats(empty, jnp.zeros(0))
  return normed, jax.tree.map(lambda *xs: jnp.stack(xs), *module_stats)
