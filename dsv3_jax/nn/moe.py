"""DeepSeekMoE as a module: router, shared expert, routed experts (TR 2.1.2).

Inference can have redundant experts (TR 3.4). The weights are then one matrix a
slot, and the collection 'redundant_slots' holds which slots each expert has.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import layers
from dsv3_jax.ops import balance_loss as balance_losses
from dsv3_jax.ops import experts as expert_ops
from dsv3_jax.ops import linear, redundant_experts, routing


class MoeStats(NamedTuple):
  """Of a MoE layer: f32 load_E [tokens] and its balance loss."""

  load_E: Array
  balance: Array


class DeepSeekMoE(nn.Module):
  """Shared experts plus the K routed ones of each token (TR eq. 12)."""

  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    bias_E: Float[Array, 'E'],
    valid_BT: Float[Array, 'B T'],
  ) -> tuple[Float[Array, 'B T D'], MoeStats]:
    cfg, moe = self.cfg, self.cfg.moe
    std, count = cfg.init_std, moe.num_experts
    shape = (cfg.d_model, count)
    w_DE = layers.weight(self, 'w_router', shape, ('embed', None), std)
    batch, length, dim = x_BTD.shape
    routing_M = routing.route(x_BTD.reshape(-1, dim), w_DE, bias_E, moe)
    unflat = lambda x: x.reshape(batch, length, -1)
    ids_BTK, gates_BTK, scores_BTE = map(unflat, routing_M)

    redundant, num_slots = None, count
    if self.has_variable('redundant_slots', 'slots'):
      redundant = redundant_experts.RedundantSlots(
        self.get_variable('redundant_slots', 'slots'),
        self.get_variable('redundant_slots', 'count'),
      )
      num_slots = redundant.num_slots

    def experts_weight(name, rows, columns, *axes):
      full = (num_slots, rows, columns)
      return layers.matrix(self, name, full, ('experts', *axes), std)

    experts = expert_ops.Experts(
      experts_weight('w_gate', cfg.d_model, moe.d_ff, 'embed', 'ffn'),
      experts_weight('w_up', cfg.d_model, moe.d_ff, 'embed', 'ffn'),
      experts_weight('w_down', moe.d_ff, cfg.d_model, 'ffn', 'embed'),
    )
    flat = lambda x: x.reshape(-1, x.shape[-1])
    y_MD = expert_ops.expert_ffn(
      flat(x_BTD),
      flat(ids_BTK),
      flat(gates_BTK),
      experts,
      self._options(),
      redundant,
      valid_BT.reshape(-1),
    )
    y_BTD = y_MD.reshape(x_BTD.shape)
    if moe.num_shared_experts:
      width = moe.num_shared_experts * moe.d_ff
      shared = layers.SwiGLU(cfg, width, self.policy, name='shared')()
      with jax.named_scope('shared_experts'):
        x_MD = x_BTD.reshape(-1, dim)
        y_MD = linear.swiglu(x_MD, *shared, self.policy)
        y_BTD += y_MD.reshape(x_BTD.shape)
    y_BTD = collectives.psum_f32(y_BTD, sharding.rules().ffn)
    stats = MoeStats(
      load_E=routing.count_load(ids_BTK, count, valid_BT),
      balance=balance_losses.balance_loss(
        scores_BTE, ids_BTK, valid_BT, self.balance, moe
      ),
    )
    return y_BTD, stats

  def _options(self) -> expert_ops.ExpertOptions:
    # A hop over nodes, then one within the node (TR 3.2.2).
    sharded = sharding.axes_of(sharding.rules().experts)
    return expert_ops.ExpertOptions(
      product=self.cfg.moe.product,
      block_size=self.cfg.moe.block_size,
      buffer_factor=self.cfg.moe.buffer_factor,
      axes=tuple(axis for axis in sharded if collectives.axis_size(axis) > 1),
      policy=self.policy,
    )
