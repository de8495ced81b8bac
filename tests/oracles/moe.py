"""DeepSeekMoE, its router and its bias rule in float64 (TR 2.1.2, eqs. 12-16).

  s = sigmoid(x W) or softmax(x W);  choose by s + b;  weigh by s
  y = shared(x) + sum_k g_k expert_k(x)        (the residual is added outside)

Letters: M tokens, K experts per token, D model, F hidden, E experts.
"""

import math

import numpy as np

from . import mla


def silu(x):
  """x * sigmoid(x)."""
  return x * sigmoid(x)


def sigmoid(x):
  """1 / (1 + e^-x), without overflow on either side."""
  return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))


def swiglu(x, w_gate_DF, w_up_DF, w_down_FD):
  """down(silu(gate x) * (up x)) over the last dim."""
  return (silu(x @ w_gate_DF) * (x @ w_up_DF)) @ w_down_FD


def scores(x_MD, w_DE, score_func):
  """Affinities s_ME in (0, 1) (eq. 15); 'softmax' is V2's."""
  logits_ME = np.asarray(x_MD, np.float64) @ w_DE
  if score_func == 'sigmoid':
    return sigmoid(logits_ME)
  if score_func == 'softmax':
    return np.array([mla.softmax(logits_E) for logits_E in logits_ME])
  raise ValueError(f'score_func={score_func!r} must be sigmoid or softmax')


def top_indices(values, count):
  """The `count` largest, largest first; of equals the lower index first."""
  order = sorted(range(len(values)), key=lambda i: (-values[i], i))
  return order[:count]


def choose(scores_E, bias_E, num_groups, top_groups, top_k, score_func):
  """Ids of one token's experts by descending biased score (eq. 16; TR 2.1.2).

  Groups are ranked by the sum of their two best biased scores ('sigmoid') or
  by their best one ('softmax'); the other groups' experts become -inf.
  """
  biased = [float(s) + float(b) for s, b in zip(scores_E, bias_E, strict=True)]
  size = len(biased) // num_groups
  group_scores = []
  for g in range(num_groups):
    members = sorted(biased[g * size : (g + 1) * size], reverse=True)
    best = 2 if score_func == 'sigmoid' else 1
    group_scores.append(math.fsum(members[:best]))
  kept = top_indices(group_scores, top_groups)
  masked = [
    value if e // size in kept else -math.inf for e, value in enumerate(biased)
  ]
  return top_indices(masked, top_k)


def route(
  x_MD,
  w_DE,
  bias_E,
  num_groups,
  top_groups,
  top_k,
  score_func,
  norm_topk,
  route_scale,
):
  """Chooses K experts per token and weighs them (eqs. 13-16).

  Args:
    bias_E: steers the choice only; None is zero (V2).
    norm_topk: gates are divided by their sum before `route_scale`.
  Returns:
    ids_MK int by descending biased score, gates_MK, load_E int [tokens].
  """
  scores_ME = scores(x_MD, w_DE, score_func)
  num_tokens, num_experts = scores_ME.shape
  if bias_E is None:
    bias_E = np.zeros(num_experts)
  ids_MK = np.zeros((num_tokens, top_k), np.int64)
  gates_MK = np.zeros((num_tokens, top_k))
  load_E = np.zeros(num_experts, np.int64)
  for m in range(num_tokens):
    ids = choose(
      scores_ME[m], bias_E, num_groups, top_groups, top_k, score_func
    )
    total = math.fsum(scores_ME[m, e] for e in ids) if norm_topk else 1.0
    for k, e in enumerate(ids):
      ids_MK[m, k] = e
      gates_MK[m, k] = scores_ME[m, e] / total * route_scale
      load_E[e] += 1
  return ids_MK, gates_MK, load_E


def moe_ffn(x_MD, ids_MK, gates_MK, experts, shared):
  """Shared expert plus gated routed experts, no token dropped (eq. 12).

  Args:
    experts: w_gate_EDF, w_up_EDF, w_down_EFD.
    shared: w_gate_DF, w_up_DF, w_down_FD of width n_shared * F, or None.
  """
  out_MD = np.zeros((len(x_MD), experts['w_down_EFD'].shape[2]))
  for m, x_D in enumerate(np.asarray(x_MD, np.float64)):
    if shared is not None:
      out_MD[m] += swiglu(
        x_D, shared['w_gate_DF'], shared['w_up_DF'], shared['w_down_FD']
      )
    for e, gate in zip(ids_MK[m], gates_MK[m], strict=True):
      out_MD[m] += gate * swiglu(
        x_D,
        experts['w_gate_EDF'][e],
        experts['w_up_EDF'][e],
        experts['w_down_EFD'][e],
      )
  return out_MD


def bias_update(bias_E, load_E, rate):
  """b_i += rate * sign(mean load - load_i), after a step (TR 2.1.2)."""
  mean = math.fsum(load_E) / len(load_E)
  return np.array(
    [
      b + rate * float(np.sign(mean - load))
      for b, load in zip(bias_E, load_E, strict=True)
    ]
  )


def max_violation(load_E):
  """MaxVio = (max load - mean load) / mean load."""
  mean = math.fsum(load_E) / len(load_E)
  return (max(load_E) - mean) / mean
