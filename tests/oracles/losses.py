"""Next-token and multi-token losses in float64 nats (TR 2.2, eqs. 23-25).

A row holds T + 1 tokens t_1..t_{T+1}. The main model sees t_1..t_T. Module k
works at positions i = 1..T-k, reads Emb(t_{i+k}) and predicts t_{i+k+1}:

  L_k = - 1/T sum_{i=1}^{T-k} log p_i^k[t_{i+k+1}]
  L_MTP = lambda / depth * sum_k L_k

Depth 0 is the main loss. With isolated segments position i counts only when
tokens i+1..i+k+1 all lie in the segment of token i.

Letters: T tokens, J = T - k positions of depth k, M tokens of any number of
rows, V vocabulary, Z = T + 1 tokens of the whole row.
"""

import math

import numpy as np


def cross_entropy(logits_MV, targets_M):
  """Nats per token: log sum exp of the logits minus the target's logit."""
  nats_M = np.zeros(len(targets_M))
  for m, target in enumerate(targets_M):
    logits_V = np.asarray(logits_MV[m], np.float64)
    largest = np.max(logits_V)
    log_sum = largest + math.log(math.fsum(np.exp(logits_V - largest)))
    nats_M[m] = log_sum - logits_V[target]
  return nats_M


def main_loss(logits_MV, targets_M, weights_M):
  """Weighted mean of the cross-entropy; 0 when no target has weight."""
  total = math.fsum(weights_M)
  if total == 0.0:
    return 0.0
  return math.fsum(cross_entropy(logits_MV, targets_M) * weights_M) / total


def mtp_targets(tokens_Z, depth, weights_Z=None, segments_Z=None):
  """Targets of depth k (0: the main model) and their weights (eq. 24).

  Args:
    tokens_Z: the T + 1 tokens of one row.
    weights_Z: weight of each token as a *target* (that of the first is not
      used); None: ones.
    segments_Z: segment of each token when samples are isolated, else None.
  Returns:
    targets_J int and weights_J of positions 1..T-k.
  """
  num_inputs = len(tokens_Z) - 1
  targets, weights = [], []
  for i in range(num_inputs - depth):
    target = i + depth + 1
    weight = 1.0 if weights_Z is None else float(weights_Z[target])
    if segments_Z is not None:
      for j in range(i + 1, target + 1):
        if segments_Z[j] != segments_Z[i]:
          weight = 0.0
    targets.append(tokens_Z[target])
    weights.append(weight)
  return np.array(targets, np.int64), np.array(weights, np.float64)


def mtp_depth_loss(logits_MV, targets_M, weights_M, normalizer, main_weight):
  """L_k (eq. 24), over one row or many laid end to end.

  Args:
    normalizer: 'T' divides by `main_weight`, 'valid' by the sum of weights_M.
    main_weight: sum of the main loss' weights: T for a full row.
  """
  total = math.fsum(cross_entropy(logits_MV, targets_M) * weights_M)
  if normalizer == 'T':
    count = main_weight
  elif normalizer == 'valid':
    count = math.fsum(weights_M)
  else:
    raise ValueError(f'normalizer={normalizer!r} must be T or valid')
  return total / count if count else 0.0


def mtp_loss(depth_losses, weight):
  """L_MTP = lambda / depth * sum_k L_k (eq. 25)."""
  if not depth_losses:
    return 0.0
  return weight / len(depth_losses) * math.fsum(depth_losses)
