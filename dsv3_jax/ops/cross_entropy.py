"""Cross-entropy of the output head, with its gradients (TR 2.2).

The main model and every MTP depth share the head. Where a pipeline shards the
vocabulary over its ranks, each rank has its columns of the head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives

# Ranks of a pipeline share the vocabulary of the head.
_VOCAB_AXIS = 'pipe'
TOKENS_AT_ONCE = 2048  # at most so many tokens have logits at a time


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

  The head is multiplied in the dtype of h; where a pipeline shards the
  vocabulary over its ranks, each has its columns and all have the same h.
  Logits exist for a few tokens at a time. Since the result is one number, the
  gradients are computed in the forward pass, while the logits exist, and scaled
  in the backward pass.
  """
  return _scan_head(h_BTD, head_DV, targets_BT, weights_BT, False)[0]


def head_loss_and_grads(
  h_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  weights_BT: Float[Array, 'B T'],
) -> tuple[Array, tuple[Array, Array]]:
  """`head_loss` and its gradients of h and head, for a split backward pass."""
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
  """The loss, and its gradients on request, in chunks of the sequence."""
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
    dh_BtD = collectives.psum(dh_BtD, _VOCAB_AXIS).astype(h_BtD.dtype)
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
  first = collectives.axis_index(_VOCAB_AXIS) * logits_BtV.shape[-1]
  hot_BtV = (targets_Bt - first)[..., None] == jnp.arange(logits_BtV.shape[-1])
  most_Bt1 = jnp.max(logits_BtV, axis=-1, keepdims=True)
  most_Bt1 = collectives.pmax(most_Bt1, _VOCAB_AXIS)
  e_BtV = jnp.exp(logits_BtV - most_Bt1)
  sums_Bt1 = jnp.sum(e_BtV, axis=-1, keepdims=True)
  sums_Bt1 = collectives.psum(sums_Bt1, _VOCAB_AXIS)
  chosen_Bt = jnp.sum(jnp.where(hot_BtV, logits_BtV - most_Bt1, 0.0), axis=-1)
  chosen_Bt = collectives.psum(chosen_Bt, _VOCAB_AXIS)
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
  pieces = -(-length // max(1, TOKENS_AT_ONCE // batch))
  size = -(-length // pieces)
  missing = [(0, 0), (0, pieces * size - length)] + [(0, 0)] * len(rest)
  x_BT = jnp.pad(x_BT, missing).reshape(batch, pieces, size, *rest)
  return jnp.moveaxis(x_BT, 1, 0)


def _join_sequence(pieces, length):
  """The inverse."""
  x_BT = jnp.moveaxis(pieces, 0, 1)
  x_BT = x_BT.reshape(x_BT.shape[0], -1, *x_BT.shape[3:])
  return x_BT[:, :length]
