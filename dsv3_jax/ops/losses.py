"""Cross-entropy of the head, MTP targets, and the balance losses.

Main loss: mean cross-entropy over the targets that count. MTP (TR 2.2, eqs.
24-25): depth k predicts t_{i+k+1} from position i, for i = 1..T-k; its sum is
divided by T, or by the targets that count. Balance (TR 2.1.2, eqs. 17-20): per
sequence, alpha sum_i f_i P_i with f_i from the unbiased, ungrouped top-K.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, sharding
from dsv3_jax.ops import routing

# Ranks of a pipeline share the vocabulary of the head.
_VOCAB_AXIS = 'pipe'
# Devices along these share each sequence.
_SEQUENCE_AXES = ('context',)
_TOKENS_AT_ONCE = 2048  # logits of so many tokens exist at a time


def token_losses(
  logits_BTV: Float[Array, 'B T V'], targets_BT: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Cross-entropy of each target, f32 [nats]."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT[..., 0]


@jax.custom_vjp
def head_loss(
  h_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  weights_BT: Float[Array, 'B T'],
) -> Float[Array, '']:
  """Weighted sum of the cross-entropies of softmax(h W_head), f32 [nats].

  The head is multiplied in the dtype of h; where a pipeline cuts the vocabulary
  over its ranks, each has its columns and all have the same h. Logits exist for
  a few tokens at a time. Since the result is one number, the gradients are made
  in the forward pass, while the logits are there, and scaled in the backward.
  """
  return _scan_head(h_BTD, head_DV, targets_BT, weights_BT, False)[0]


def head_loss_and_grads(
  h_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  weights_BT: Float[Array, 'B T'],
) -> tuple[Array, tuple[Array, Array]]:
  """`head_loss` and its gradients of h and head, for who splits a backward."""
  return _scan_head(h_BTD, head_DV, targets_BT, weights_BT, True)


def head_token_losses(
  h_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
) -> Float[Array, 'B T']:
  """Cross-entropy of each target under softmax(h W_head), f32 [nats].

  As in `head_loss`, logits exist for a few tokens at a time.
  """
  cast_DV = head_DV.astype(h_BTD.dtype)

  def piece(args):
    h_BtD, targets_Bt = args
    return token_losses(_head_logits(h_BtD, cast_DV), targets_Bt)

  with jax.named_scope('head'):
    losses = jax.lax.map(
      piece, tuple(map(_split_sequence, (h_BTD, targets_BT)))
    )
  return _join_sequence(losses, targets_BT.shape[1])


def _head_loss_fwd(h_BTD, head_DV, targets_BT, weights_BT):
  return _scan_head(h_BTD, head_DV, targets_BT, weights_BT, True)


def _head_loss_bwd(grads, scale):
  dh_BTD, dhead_DV = grads
  dh_BTD = (dh_BTD * scale).astype(dh_BTD.dtype)
  dhead_DV = (dhead_DV * scale).astype(dhead_DV.dtype)
  return dh_BTD, dhead_DV, None, None


head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)


def _scan_head(h_BTD, head_DV, targets_BT, weights_BT, with_grads):
  """The loss and, if asked, its gradients, over chunks of the sequence."""
  cast_DV = head_DV.astype(h_BTD.dtype)

  def body(carry, piece):
    total, dhead_DV = carry
    h_BtD, targets_Bt, weights_Bt = piece
    logits = _head_logits(h_BtD, cast_DV)
    losses, p, hot = _cross_entropy(logits, targets_Bt)
    total += jnp.sum(losses * weights_Bt)
    if not with_grads:
      return (total, dhead_DV), None
    dlogits = (p - hot) * weights_Bt[..., None]
    dlogits = dlogits.astype(h_BtD.dtype)
    dhead_DV += jnp.einsum(
      'btd,btv->dv', h_BtD, dlogits, preferred_element_type=jnp.float32
    )
    dh_BtD = jnp.einsum(
      'btv,dv->btd', dlogits, cast_DV, preferred_element_type=jnp.float32
    )
    # Every rank's part of the vocabulary, then rounded once.
    dh_BtD = sharding.psum(dh_BtD, _VOCAB_AXIS).astype(h_BtD.dtype)
    return (total, dhead_DV), dh_BtD

  with jax.named_scope('head'):
    shape = head_DV.shape if with_grads else (0, 0)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32))
    pieces = tuple(map(_split_sequence, (h_BTD, targets_BT, weights_BT)))
    (total, dhead_DV), dh = jax.lax.scan(body, start, pieces)
  if not with_grads:
    return total, None
  dh_BTD = _join_sequence(dh, h_BTD.shape[1])
  return total, (dh_BTD, dhead_DV.astype(head_DV.dtype))


def _cross_entropy(logits_BtV, targets_Bt):
  """Losses, probabilities and one-hot targets of this device's vocabulary."""
  first = sharding.index(_VOCAB_AXIS) * logits_BtV.shape[-1]
  hot_BtV = (targets_Bt - first)[..., None] == jnp.arange(logits_BtV.shape[-1])
  most_Bt1 = jnp.max(logits_BtV, axis=-1, keepdims=True)
  most_Bt1 = sharding.pmax(most_Bt1, _VOCAB_AXIS)
  e_BtV = jnp.exp(logits_BtV - most_Bt1)
  sums_Bt1 = jnp.sum(e_BtV, axis=-1, keepdims=True)
  sums_Bt1 = sharding.psum(sums_Bt1, _VOCAB_AXIS)
  chosen_Bt = jnp.sum(jnp.where(hot_BtV, logits_BtV - most_Bt1, 0.0), axis=-1)
  chosen_Bt = sharding.psum(chosen_Bt, _VOCAB_AXIS)
  losses_Bt = jnp.log(sums_Bt1[..., 0]) - chosen_Bt
  return losses_Bt, e_BtV / sums_Bt1, hot_BtV


def _head_logits(h_BtD, head_DV):
  return jnp.einsum(
    'btd,dv->btv', h_BtD, head_DV, preferred_element_type=jnp.float32
  )


def _split_sequence(x_BT):
  """[B, T, ...] -> [pieces, B, t, ...]: logits of t positions exist together.

  The batch stays whole; zeros follow where the last piece is not full.
  """
  batch, length, *rest = x_BT.shape
  pieces = -(-length // max(1, _TOKENS_AT_ONCE // batch))
  size = -(-length // pieces)
  missing = [(0, 0), (0, pieces * size - length)] + [(0, 0)] * len(rest)
  x_BT = jnp.pad(x_BT, missing).reshape(batch, pieces, size, *rest)
  return jnp.moveaxis(x_BT, 1, 0)


def _join_sequence(pieces, length):
  """The inverse."""
  x_BT = jnp.moveaxis(pieces, 0, 1)
  x_BT = x_BT.reshape(x_BT.shape[0], -1, *x_BT.shape[3:])
  return x_BT[:, :length]


def mtp_shift(x_BT: Array, depth: int) -> Array:
  """x_{i+depth} at i; zeros where the sequence ends first."""
  shifted = x_BT[:, depth:]
  return jnp.pad(shifted, ((0, 0), (0, depth)))


def mtp_weights(
  weights_BT: Float[Array, 'B T'],
  segments_BT: Int[Array, 'B T'],
  depth: int,
  isolated: bool,
) -> Float[Array, 'B T']:
  """Which of the targets t_{i+depth+1} count (TR 2.2).

  Args:
    weights_BT: of the main targets t_{i+1}; segments_BT: of the inputs t_i.
    isolated: samples do not see each other: a target counts only if no border
      lies between position i and it.
  """
  shifted_BT = mtp_shift(weights_BT, depth)
  if isolated:
    same = mtp_shift(segments_BT, depth) == segments_BT
    shifted_BT = jnp.where(same, shifted_BT, 0.0)
  return shifted_BT


def balance_loss(
  scores_BTE: Float[Array, 'B T E'],
  ids_BTK: Int[Array, 'B T K'],
  valid_BT: Float[Array, 'B T'],
  cfg: config.BalanceConfig,
  moe: config.MoeConfig,
) -> Float[Array, '']:
  """The auxiliary loss of one layer, mean over the batch's sequences.

  'sequence' is eqs. 17-20, 'batch' the same over all tokens of the micro-batch
  (TR 4.5.3), 'v2' the expert, device and communication losses of the V2 report
  2.2.3, with groups as devices. Gradients flow through P only.
  """
  if cfg.kind == 'none':
    return jnp.zeros((), jnp.float32)
  with jax.named_scope('balance_loss'):
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
    mean = jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))
    return cfg.alpha * mean / sharding.size(_SEQUENCE_AXES)


def _tokens(valid_BT, axes):
  """Tokens of each sequence, at least 1, over the devices that share it."""
  tokens_B1 = sharding.psum(jnp.sum(valid_BT, axis=1, keepdims=True), axes)
  return jnp.maximum(tokens_B1, 1.0)


def _frequency(ids_BTK, valid_BT, tokens_B1, moe, axes):
  """f_i = E / (K T) * tokens of the sequence that chose i (eq. 18)."""
  count_BE = routing.count_per_sequence(ids_BTK, moe.num_experts, valid_BT)
  count_BE = sharding.psum(count_BE, axes)
  return count_BE * moe.num_experts / (moe.top_k * tokens_B1)


def _mean_prob(probs_BTE, valid_BT, tokens_B1, axes):
  """P_i = mean over the sequence's tokens of s'_i (eq. 20)."""
  sums_BE = jnp.sum(probs_BTE * valid_BT[..., None], axis=1)
  return sharding.psum(sums_BE, axes) / tokens_B1


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
  sent_BG = sharding.psum(sent_BG, axes)
  sent_BG *= moe.num_groups / (moe.top_groups * tokens_B1)
  total_B = cfg.v2_expert_alpha * jnp.sum(f_BE * p_BE, axis=-1)
  total_B += cfg.v2_device_alpha * jnp.sum(f_BG * p_BG, axis=-1)
  total_B += cfg.v2_comm_alpha * jnp.sum(sent_BG * p_BG, axis=-1)
  return jnp.mean(total_B) / sharding.size(axes)
