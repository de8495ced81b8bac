"""Auxiliary balance losses in float64 (TR eqs. 17-20, 4.5.3; V2 2.2.3).

  f_i = E / (K T) * |{t : s_it in TopK_j(s_jt, K)}|
  s'_it = s_it / sum_j s_jt,   P_i = 1/T sum_t s'_it
  L = alpha * sum_i f_i P_i

TopK in f_i is over the unbiased scores of all experts: neither the bias nor
the group limit of the routing enters. T counts valid (not padding) tokens.
No valid token: the loss is 0.

Letters: B sequences, T tokens of one, M tokens of any number of them,
K experts per token, E experts. Devices hold E / num_devices experts in order.
"""

import math

import numpy as np

from . import moe


def _valid_rows(scores_ME, valid_M):
  """Indices of the tokens that count."""
  return [m for m in range(len(scores_ME)) if valid_M is None or valid_M[m]]


def _mean_probabilities(scores_ME, rows):
  """P_i: mean over tokens of the scores divided by their sum (eqs. 19-20)."""
  probs_E = np.zeros(len(scores_ME[0]))
  for m in rows:
    total = math.fsum(scores_ME[m])
    for e, score in enumerate(scores_ME[m]):
      probs_E[e] += score / total / len(rows)
  return probs_E


def sequence_balance_loss(scores_TE, top_k, alpha, valid_T=None):
  """L_Bal of one sequence (eqs. 17-20).

  Args:
    scores_TE: the router's affinities without bias, not normalised.
    valid_T: truthy where the token counts; None: everywhere.
  """
  rows = _valid_rows(scores_TE, valid_T)
  if not rows:
    return 0.0
  num_experts = len(scores_TE[0])
  count_E = np.zeros(num_experts)
  for t in rows:
    for e in moe.top_indices(list(scores_TE[t]), top_k):
      count_E[e] += 1
  f_E = count_E * num_experts / (top_k * len(rows))
  return alpha * math.fsum(f_E * _mean_probabilities(scores_TE, rows))


def mean_sequence_balance_loss(scores_BTE, top_k, alpha, valid_BT=None):
  """Mean over the B sequences of eq. 17 (sequences without a token add 0)."""
  losses = [
    sequence_balance_loss(
      scores_BTE[b], top_k, alpha, None if valid_BT is None else valid_BT[b]
    )
    for b in range(len(scores_BTE))
  ]
  return math.fsum(losses) / len(losses)


def batch_balance_loss(scores_BTE, top_k, alpha, valid_BT=None):
  """The batch-wise variant: f and P over all tokens of the batch (4.5.3)."""
  scores_BTE = np.asarray(scores_BTE, np.float64)
  scores_ME = scores_BTE.reshape(-1, scores_BTE.shape[-1])
  valid_M = None if valid_BT is None else np.asarray(valid_BT).reshape(-1)
  return sequence_balance_loss(scores_ME, top_k, alpha, valid_M)


def v2_expert_loss(scores_ME, ids_MK, alpha, valid_M=None):
  """V2's L_ExpBal = a1 sum_i f_i P_i, f_i from the chosen experts."""
  rows = _valid_rows(scores_ME, valid_M)
  if not rows:
    return 0.0
  f_E = _chosen_fractions(len(scores_ME[0]), ids_MK, rows)
  return alpha * math.fsum(f_E * _mean_probabilities(scores_ME, rows))


def v2_device_loss(scores_ME, ids_MK, alpha, num_devices, valid_M=None):
  """V2's L_DevBal = a2 sum_d f'_d P'_d.

  f'_d is the mean of f_i and P'_d the sum of P_i over the device's experts.
  """
  rows = _valid_rows(scores_ME, valid_M)
  if not rows:
    return 0.0
  num_experts = len(scores_ME[0])
  f_E = _chosen_fractions(num_experts, ids_MK, rows)
  probs_E = _mean_probabilities(scores_ME, rows)
  loss = 0.0
  for members in _devices(num_experts, num_devices):
    f_device = math.fsum(f_E[e] for e in members) / len(members)
    loss += f_device * math.fsum(probs_E[e] for e in members)
  return alpha * loss


def v2_communication_loss(
  scores_ME, ids_MK, alpha, num_devices, device_limit, valid_M=None
):
  """V2's L_CommBal = a3 sum_d f''_d P''_d.

  f''_d = D / (M' T) * tokens sent to device d, where D is `num_devices`, M'
  the most devices a token may reach; a token counts once for a device however
  many of its experts live there.
  """
  rows = _valid_rows(scores_ME, valid_M)
  if not rows:
    return 0.0
  probs_E = _mean_probabilities(scores_ME, rows)
  loss = 0.0
  for members in _devices(len(scores_ME[0]), num_devices):
    sent = sum(any(e in members for e in ids_MK[m]) for m in rows)
    f_device = num_devices / (device_limit * len(rows)) * sent
    loss += f_device * math.fsum(probs_E[e] for e in members)
  return alpha * loss


def _chosen_fractions(num_experts, ids_MK, rows):
  """f_i = E / (K T) * tokens that chose expert i."""
  count_E = np.zeros(num_experts)
  for m in rows:
    for e in ids_MK[m]:
      count_E[e] += 1
  return count_E * num_experts / (len(ids_MK[0]) * len(rows))


def _devices(num_experts, num_devices):
  """The experts of each device."""
  size = num_experts // num_devices
  return [range(d * size, (d + 1) * size) for d in range(num_devices)]
