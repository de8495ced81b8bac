"""The DeepSeekMoE gate and its auxiliary-loss-free balance (TR 2.1.2).

  s = sigmoid(W x)                                    (eq. 15)
  choose by s + b, restricted to the best groups      (eq. 16, node-limited)
  gates = s / sum of the chosen s * route_scale       (eqs. 13, 14)
  b += gamma * sign(mean load - load), once a step

The bias steers the choice only. V2's gate is `score_func='softmax'`: groups are
scored by their best expert; for all of V2 also set `norm_topk=False` and, as it
has no biases, `optim.bias_rate` to 0. Ties go to the lower index. LF is the
paper of the biases, arXiv 2408.15664.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config


class Routing(NamedTuple):
  """Chosen experts and gates of each token, and all the scores."""

  ids_MK: Int[Array, 'M K']
  gates_MK: Float[Array, 'M K']
  scores_ME: Float[Array, 'M E']


def route(
  x_MD: Float[Array, 'M D'],
  w_DE: Float[Array, 'D E'],
  bias_E: Float[Array, 'E'],
  cfg: config.MoeConfig,
) -> Routing:
  """Chooses K experts per token (TR 2.1.2, eqs. 13-16).

  Args:
    x_MD: normed tokens, any float dtype; logits are computed in f32.
    bias_E: f32; steers the choice only and gets no gradient.
  Returns:
    ids_MK int32, by falling biased score; gates_MK f32, rows sum to
    cfg.route_scale when cfg.norm_topk; scores_ME f32 without the bias.
  """
  with jax.named_scope('gate'):
    logits_ME = jnp.einsum(
      'md,de->me',
      x_MD.astype(jnp.float32),
      w_DE.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    if cfg.score_func == 'sigmoid':
      scores_ME = jax.nn.sigmoid(logits_ME)
    else:
      scores_ME = jax.nn.softmax(logits_ME, axis=-1)
    biased_ME = jax.lax.stop_gradient(scores_ME + bias_E)
    if cfg.num_groups > 1:
      biased_ME = _limit_groups(biased_ME, cfg)
    _, ids_MK = jax.lax.top_k(biased_ME, cfg.top_k)
    gates_MK = jnp.take_along_axis(scores_ME, ids_MK, axis=-1)
    if cfg.norm_topk:
      gates_MK /= jnp.sum(gates_MK, axis=-1, keepdims=True)
    return Routing(ids_MK, gates_MK * cfg.route_scale, scores_ME)


def _limit_groups(
  biased_ME: Float[Array, 'M E'], cfg: config.MoeConfig
) -> Float[Array, 'M E']:
  """Sets biased scores outside the best groups to -inf (TR 2.1.2).

  A group is the experts of one node. Its score is the sum of its best two
  experts' (V2: its best one's). The report sums the best K / top_groups, in V3
  8 / 4 = 2; the released code fixes 2.
  """
  groups_MGE = biased_ME.reshape(
    -1, cfg.num_groups, biased_ME.shape[-1] // cfg.num_groups
  )
  best = 2 if cfg.score_func == 'sigmoid' else 1
  group_scores_MG = jnp.sum(jax.lax.top_k(groups_MGE, best)[0], axis=-1)
  _, chosen_Mi = jax.lax.top_k(group_scores_MG, cfg.top_groups)
  kept_MG = jnp.any(chosen_Mi[:, :, None] == jnp.arange(cfg.num_groups), axis=1)
  limited = jnp.where(kept_MG[:, :, None], groups_MGE, -jnp.inf)
  return limited.reshape(biased_ME.shape)


def count_load(
  ids_BTK: Int[Array, 'B T K'],
  num_experts: int,
  valid_BT: Float[Array, 'B T'],
) -> Float[Array, 'E']:
  """Tokens sent to each expert, f32 [tokens]; padding does not count."""
  return jnp.sum(count_per_sequence(ids_BTK, num_experts, valid_BT), axis=0)


def count_per_sequence(
  ids_BTK: Int[Array, 'B T K'],
  num_experts: int,
  valid_BT: Float[Array, 'B T'],
) -> Float[Array, 'B E']:
  """As `count_load`, for each row of the batch."""
  chosen_BTE = jnp.sum(jax.nn.one_hot(ids_BTK, num_experts), axis=2)
  return jnp.sum(chosen_BTE * valid_BT[:, :, None], axis=1)


def max_violation(load_LE: Float[Array, 'L E']) -> Float[Array, '']:
  """(max load - mean load) / mean load, mean over the layers (LF, 3).

  0 is perfect balance, or no experts.
  """
  if not load_LE.size:  # a model without experts
    return jnp.zeros(())
  mean_L = jnp.mean(load_LE, axis=-1)
  above_L = jnp.max(load_LE, axis=-1) - mean_L
  return jnp.mean(above_L / jnp.maximum(mean_L, 1e-9))


def update_bias(
  bias_E: Float[Array, '*layers E'],
  load_E: Float[Array, '*layers E'],
  rate: Float[Array, ''] | float,
) -> Float[Array, '*layers E']:
  """b += gamma sign(mean load - load), each layer for itself (TR 2.1.2).

  Args:
    load_E: tokens of the *whole* batch: all devices, all micro-batches.
    rate: gamma of this step.
  """
  # total - E * relative = E (mean load - load). Loads are whole numbers, so f32
  # is exact below 2^24, and subtracting expert 0's load keeps them small. A
  # rounded mean would move experts whose load is exactly the mean.
  relative_E = load_E - load_E[..., :1]
  total = jnp.sum(relative_E, axis=-1, keepdims=True)
  return bias_E + rate * jnp.sign(total - load_E.shape[-1] * relative_E)
