"""Auxiliary balance losses (TR 2.1.2, eqs. 17-20; 4.5.3; V2 report 2.2.3).

Per sequence, alpha sum_i f_i P_i with f_i from the unbiased, ungrouped top-K.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.ops import routing

# Devices along these share each sequence.
_SEQUENCE_AXES = ('context',)


def balance_loss(
  scores_BTE: Float[Array, 'B T E'],
  ids_BTK: Int[Array, 'B T K'],
  valid_BT: Float[Array, 'B T'],
  cfg: config.BalanceConfig,
  moe: config.MoeConfig,
) -> Float[Array, '']:
  """The auxiliary loss of one layer, mean over the batch's sequences.

  `cfg.kind` 'sequence' is eqs. 17-20. 'batch' is the same over all tokens of
  the micro-batch (TR 4.5.3). 'v2' are the expert, device and communication
  losses of the V2 report 2.2.3, with groups as devices. Gradients flow through
  P only.
  """
  if cfg.kind == 'none':
    return jnp.zeros((), jnp.float32)
  with jax.named_scope('balance_loss'):
    # s'_i,t of eq. 19.
    probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    if cfg.kind == 'v2':
      return _v2_losses(probs_BTE, ids_BTK, valid_BT, cfg, moe)
    _, top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), moe.top_k)
    axes = _SEQUENCE_AXES
    if cfg.kind == 'batch':
      axes = sharding.TOKEN_AXES
      flat = lambda x: x.reshape(1, -1, *x.shape[2:])
      probs_BTE, top_BTK, valid_BT = map(flat, (probs_BTE, top_BTK, valid_BT))
    tokens_B1 = _tokens(valid_BT, axes)
    f_BE = _frequency(top_BTK, valid_BT, tokens_B1, moe, axes)
    p_BE = _mean_prob(probs_BTE, valid_BT, tokens_B1, axes)
    mean = jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))  # eq. 17
    # Every device on `context` has this value, and the step sums over them.
    return cfg.alpha * mean / collectives.axis_size(_SEQUENCE_AXES)


def _tokens(valid_BT, axes):
  """Tokens of each sequence, at least 1, over the devices that share it."""
  tokens_B1 = collectives.psum(jnp.sum(valid_BT, axis=1, keepdims=True), axes)
  return jnp.maximum(tokens_B1, 1.0)


def _frequency(ids_BTK, valid_BT, tokens_B1, moe, axes):
  """f_i = E / (K T) * tokens of the sequence that chose i (eq. 18)."""
  count_BE = routing.count_per_sequence(ids_BTK, moe.num_experts, valid_BT)
  count_BE = collectives.psum(count_BE, axes)
  return count_BE * moe.num_experts / (moe.top_k * tokens_B1)


def _mean_prob(probs_BTE, valid_BT, tokens_B1, axes):
  """P_i = mean over the sequence's tokens of s'_i (eq. 20)."""
  sums_BE = jnp.sum(probs_BTE * valid_BT[..., None], axis=1)
  return collectives.psum(sums_BE, axes) / tokens_B1


def _v2_losses(probs_BTE, ids_BTK, valid_BT, cfg, moe):
  """V2's three losses: over experts, devices, and tokens sent to devices."""
  axes = _SEQUENCE_AXES
  tokens_B1 = _tokens(valid_BT, axes)
  f_BE = _frequency(ids_BTK, valid_BT, tokens_B1, moe, axes)
  p_BE = _mean_prob(probs_BTE, valid_BT, tokens_B1, axes)
  groups = (f_BE.shape[0], moe.num_groups, -1)
  f_BG = jnp.mean(f_BE.reshape(groups), axis=-1)
  p_BG = jnp.sum(p_BE.reshape(groups), axis=-1)
  group_BTK = ids_BTK // (moe.num_experts // moe.num_groups)
  hot_BTG = jnp.max(jax.nn.one_hot(group_BTK, moe.num_groups), axis=2)
  sent_BG = jnp.sum(hot_BTG * valid_BT[..., None], axis=1)
  sent_BG = collectives.psum(sent_BG, axes)
  sent_BG *= moe.num_groups / (moe.top_groups * tokens_B1)
  total_B = cfg.v2_expert_alpha * jnp.sum(f_BE * p_BE, axis=-1)
  total_B += cfg.v2_device_alpha * jnp.sum(f_BG * p_BG, axis=-1)
  total_B += cfg.v2_comm_alpha * jnp.sum(sent_BG * p_BG, axis=-1)
  return jnp.mean(total_B) / collectives.axis_size(axes)
