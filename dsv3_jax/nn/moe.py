"""DeepSeekMoE as a module: router, shared expert, routed experts (TR 2.1.2).

In inference experts can have copies (TR 3.4): the collection 'copies' then says
in which slots each is, and the weights of experts are those of slots.
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
from dsv3_jax.ops import fp8_experts, linear, redundant_experts, routing


class MoeStats(NamedTuple):
  """What a MoE layer tells: f32 load_E [tokens] and its balance loss."""

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

    copies = None
    if self.has_variable('copies', 'slots'):
      names = ('slots', 'count')
      found = (self.get_variable('copies', name) for name in names)
      copies = redundant_experts.Copies(*found)
    slots = count if copies is None else copies.num_slots

    def experts_weight(name, rows, columns, *axes):
      full = (slots, rows, columns)
      return layers.matrix(self, name, full, ('experts', *axes), std)

    experts = expert_ops.Experts(
      experts_weight('w_gate', cfg.d_model, moe.d_ff, 'embed', 'ffn'),
      experts_weight('w_up', cfg.d_model, moe.d_ff, 'embed', 'ffn'),
      experts_weight('w_down', moe.d_ff, cfg.d_model, 'ffn', 'embed'),
    )
    tokens = (x_BTD, ids_BTK, gates_BTK, valid_BT)
    y_BTD = _routed(tokens, experts, copies, moe, self.policy)
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


def _routed(tokens, experts, copies, moe, policy):
  """The routed product of this device's tokens, wherever the experts are."""
  x_BTD, ids_BTK, gates_BTK, valid_BT = tokens
  flat = lambda x: x.reshape(-1, x.shape[-1])
  routed = (flat(x_BTD), flat(ids_BTK), flat(gates_BTK))
  # A hop over nodes, then one within the node (TR 3.2.2).
  spread = sharding.axes_of(sharding.rules().experts)
  axes = tuple(axis for axis in spread if collectives.axis_size(axis) > 1)
  how = (moe.product, moe.block_size, axes)
  if copies is not None:
    valid_M = valid_BT.reshape(-1)
    y_MD = redundant_experts.expert_ffn(*routed, valid_M, experts, copies, *how)
  elif policy.fp8:
    y_MD = fp8_experts.expert_ffn(*routed, experts, policy, axes)
  else:
    y_MD = expert_ops.expert_ffn(*routed, experts, *how)
  return y_MD.reshape(x_BTD.shape)
