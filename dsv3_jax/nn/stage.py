"""One stage of a pipeline as a module: some layers, at the end the MTP chain.

The last stage ends with the final norm and the MTP modules. Embedding and head
are outside: they are sharded over the vocabulary on all ranks. Layers are
unrolled, so that a backward pass can be split into its input and weight halves.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, precision
from dsv3_jax.nn import block, layers, model, mtp


class PipelineStage(nn.Module):
  """Layers `dense_0, ..., moe_0, ...`; of the last also `final_norm, mtp_0`."""

  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy
  isolated: bool
  num_dense: int
  num_moe: int
  last: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    ahead: list[Float[Array, 'B T D']],
    batch: model.Batch,
    router_biases: model.RouterBiases,
  ) -> tuple[Array, dict[str, Array]]:
    """Output, and 'balance', 'load' [num_moe, E], 'mtp_load' [depth, E].

    The last stage's output is [1 + depth, B, T, D]: what the head multiplies.

    Args:
      ahead: of the last stage, Emb(t_{i+k}) for each MTP depth; else empty.
      router_biases: of this stage's MoE layers and of the MTP modules.
    """
    cfg = self.cfg
    context = model.make_context(cfg, batch, self.isolated)
    make_block = functools.partial(
      block.with_remat(cfg, scanned=False),
      cfg,
      self.balance,
      self.policy,
      absorbed=False,
    )
    no_bias, at = jnp.zeros(0, jnp.float32), jnp.array(0)
    carry, loads, balances = (x_BTD, None), [], []
    for i in range(self.num_dense):
      layer = make_block(is_moe=False, name=f'dense_{i}')
      carry, _ = layer(carry, no_bias, at, context)
    for i in range(self.num_moe):
      layer = make_block(is_moe=True, name=f'moe_{i}')
      carry, layer_stats = layer(carry, router_biases['moe'][i], at, context)
      loads.append(layer_stats.load_E)
      balances.append(layer_stats.balance)
    empty = jnp.zeros((0, cfg.moe.num_experts))
    stats = {
      'balance': sum(balances, jnp.zeros(())),
      'load': jnp.stack(loads) if loads else empty,
      'mtp_load': empty,
    }
    raw_BTD, _ = carry
    if not self.last:
      return raw_BTD, stats
    h_BTD = layers.RMSNorm(cfg, name='final_norm')(raw_BTD)
    modules = [
      mtp.MtpModule(cfg, self.balance, self.policy, name=f'mtp_{k}')
      for k in range(cfg.mtp.depth)
    ]
    deeper, mtp_stats = mtp.chain(
      cfg, modules, h_BTD, raw_BTD, ahead, router_biases, context
    )
    stats['balance'] += jnp.sum(mtp_stats.balance)
    stats['mtp_load'] = mtp_stats.load_E
    return jnp.stack([h_BTD, *deeper]), stats
