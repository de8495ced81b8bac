"""One stage of a pipeline as a module: some layers, and the MTP chain behind.

The last stage ends with the final norm and the MTP modules; embedding and head
are outside, since all ranks share their work. Layers are unrolled, so that a
backward pass can be cut into its halves.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import config, precision
from dsv3_jax.nn import block, layers, model, mtp


class Stage(nn.Module):
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
    router: model.Router,
  ) -> tuple[Array, dict[str, Array]]:
    """Output, and 'balance', 'load' [num_moe, E], 'mtp_load' [depth, E].

    The last stage's output is [1 + depth, B, T, D]: what the head multiplies.

    Args:
      ahead: of the last stage, Emb(t_{i+k}) for each MTP depth; else empty.
      router: biases of this stage's MoE layers and of the MTP modules.
    """
    cfg, common = self.cfg, (self.cfg, self.balance, self.policy)
    context = model.make_context(cfg, batch, self.isolated)
    make = block.with_remat(cfg, scanned=False)
    none, at = jnp.zeros(0, jnp.float32), jnp.array(0)
    carry, loads, balances = (x_BTD, None), [], []
    for i in range(self.num_dense):
      layer = make(*common, False, False, name=f'dense_{i}')
      carry, _ = layer(carry, none, at, context)
    for i in range(self.num_moe):
      layer = make(*common, True, False, name=f'moe_{i}')
      carry, stats = layer(carry, router['moe'][i], at, context)
      loads.append(stats.load_E)
      balances.append(stats.balance)
    empty = jnp.zeros((0, cfg.moe.num_experts))
    told = {
      'balance': sum(balances, jnp.zeros(())),
      'load': jnp.stack(loads) if loads else empty,
      'mtp_load': empty,
    }
    raw_BTD, _ = carry
    if not self.last:
      return raw_BTD, told
    h_BTD = layers.RMSNorm(cfg, name='final_norm')(raw_BTD)
    modules = [
      mtp.MtpModule(*common, name=f'mtp_{k}') for k in range(cfg.mtp.depth)
    ]
    deeper, stats = mtp.chain(
      cfg, modules, h_BTD, raw_BTD, ahead, router, context
    )
    told['balance'] += jnp.sum(stats.balance)
    told['mtp_load'] = stats.load_E
    return jnp.stack([h_BTD, *deeper]), told
