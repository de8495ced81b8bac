"""The training loss of the main model and of MTP (TR 2.2, eqs. 24-25).

The main model, depth 0, predicts t_{i+1} at position i. MTP depth k predicts
t_{i+k+1}, for i = 1..T-k. Each depth's loss is a weighted sum of
cross-entropies; `depth_targets` gives its targets and weights:

  loss      sum over the main targets / how many count
  mtp_loss  mean over depths of: a depth's sum / how many MAIN targets count
            (eq. 24: T of a full row) or, with
            `model.mtp.normalizer='valid'`, / how many of its own count
  total     loss + lambda mtp_loss + balance loss

`nn/model.py` (`Model.loss`) and, under a pipeline,
`parallel/pipeline/vocab_parallel.py` (`VocabParallel.head`) call it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config
from dsv3_jax.distributed import collectives, sharding


def depth_targets(
  targets_BS: Int[Array, 'B S'],
  weights_BS: Float[Array, 'B S'],
  segments_BS: Int[Array, 'B S'],
  scales: dict[str, Array],
  depth: int,
  isolated: bool,
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Targets of a depth and what each counts in the depth's mean.

  Args:
    targets_BS, weights_BS, segments_BS: of whole sequences.
    scales: of `loss_scales`.
    depth: 0 for the main model, k for MTP depth k.
    isolated: as of `mtp_weights`.
  Returns:
    Of this device's part of each sequence.
  """
  if depth:
    segments = (weights_BS, segments_BS)
    weights_BS = mtp_weights(*segments, depth, isolated)
    weights_BS *= scales['mtp'][depth - 1] / len(scales['mtp'])
    targets_BS = mtp_shift(targets_BS, depth)
  else:
    weights_BS = weights_BS * scales['main']
  return tuple(map(collectives.shard_sequence, (targets_BS, weights_BS)))


def part_name(depth: int) -> str:
  """The part of the loss that a depth's loss is added to."""
  return 'mtp_loss' if depth else 'loss'


def weight_in_total(depth: int, scales: dict[str, Array]) -> Array | float:
  """By what a depth's loss is multiplied in the total: 1 or lambda."""
  return scales['mtp_weight'] if depth else 1.0


def total(parts: dict[str, Array], scales: dict[str, Array]) -> Array:
  """What is minimised, of 'loss', 'mtp_loss' and the scaled 'balance'."""
  losses = parts['loss'] + scales['mtp_weight'] * parts['mtp_loss']
  return losses + parts['balance']


def loss_scales(
  cfg: config.MtpConfig,
  weights: Float[Array, '*n B T'],
  segments: Int[Array, '*n B T'],
  isolated: bool,
) -> dict[str, Array]:
  """The factor of each sum of losses, from all of a step's micro-batches.

  The main loss is a mean over the targets that count: T of a full row, fewer
  where rows hold padding or prompts of chats. MTP's is divided by the same
  number, as eq. 24 divides both by T, or, with `normalizer='valid'`, by the
  number of its own targets. So lambda keeps its weight when few targets count.
  A row of padding only is not a sequence: it fills a batch that the ramp has
  not filled yet. Counts are those of all devices; each adds its share.

  Returns:
    'main', 'mtp' (one a depth) and 'balance'.
  """
  rows, length = weights.shape[-2:]
  weights, segments = (x.reshape(-1, length) for x in (weights, segments))
  sequences = jnp.sum(jnp.any(segments > 0, axis=-1)).astype(jnp.float32)
  sequences = collectives.psum(sequences, sharding.BATCH_AXES)
  everywhere = lambda x: collectives.psum(jnp.sum(x), sharding.BATCH_AXES)
  inverse = lambda count: 1.0 / jnp.maximum(count, 1.0)
  main = inverse(everywhere(weights))
  mtp = [main] * cfg.depth
  if cfg.normalizer == 'valid':
    counted = lambda k: mtp_weights(weights, segments, k, isolated)
    mtp = [inverse(everywhere(counted(k + 1))) for k in range(cfg.depth)]
  return {
    'main': main,
    'mtp': mtp,
    'balance': rows * inverse(sequences),
  }


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
