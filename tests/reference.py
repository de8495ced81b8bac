"""The float64 oracles as one network and one loss, driven by a `Config`.

Parameters are the model's own nested dict, in float64; what the oracles call
them and how layers are stacked is translated here.
"""

import math

import jax
import numpy as np

from tests.oracles import balance, losses, model

_MLA = {
  'w_q': 'w_q_DNX',
  'w_dq': 'w_dq_DQ',
  'q_norm': 'q_norm_Q',
  'w_uq': 'w_uq_QNX',
  'w_dkv': 'w_dkv_DY',
  'kv_norm': 'kv_norm_C',
  'w_uk': 'w_uk_CNH',
  'w_uv': 'w_uv_CNU',
  'w_o': 'w_o_NUD',
}
_FFN = {'w_gate': 'w_gate_DF', 'w_up': 'w_up_DF', 'w_down': 'w_down_FD'}
_EXPERTS = {'w_gate': 'w_gate_EDF', 'w_up': 'w_up_EDF', 'w_down': 'w_down_EFD'}


def weights_of(params, router_biases, cfg):
  """The oracle's weights from the model's parameters and router biases."""
  layers = []
  for i in range(cfg.model.num_dense_layers):
    layers.append(_block(_layer(params['dense_layers'], i), None))
  for i in range(cfg.model.num_moe_layers):
    layers.append(
      _block(_layer(params['moe_layers'], i), router_biases['moe'][i])
    )
  modules = []
  for k in range(cfg.model.mtp.depth):
    module = params[f'mtp_{k}']
    modules.append(
      {
        'enorm_D': module['embed_norm']['norm'],
        'hnorm_D': module['hidden_norm']['norm'],
        'eh_proj_2DD': module['w_proj'],
        'block': _block(module['block'], router_biases['mtp'][k]),
        'norm_D': module['final_norm']['norm'],
      }
    )
  return {
    'embed_VD': params['embed']['w'],
    'head_DV': params['head']['w'],
    'final_norm_D': params['final_norm']['norm'],
    'layers': layers,
    'mtp': modules,
  }


def _layer(stack, i):
  """Layer i of a scanned or an unrolled stack."""
  if 'layers' in stack:
    return jax.tree.map(lambda w: w[i], stack['layers'])
  return stack[f'layer_{i}']


def _block(params, bias_E):
  ffn = _named(params['ffn'], _FFN) if 'ffn' in params else None
  if ffn is None:
    moe = params['moe']
    shared = _named(moe['shared'], _FFN) if 'shared' in moe else None
    ffn = {'router_DE': moe['w_router'], 'bias_E': bias_E, 'shared': shared}
    ffn['experts'] = {_EXPERTS[name]: moe[name] for name in _EXPERTS}
  return {
    'attn_norm_D': params['attention_norm']['norm'],
    'ffn_norm_D': params['ffn_norm']['norm'],
    'mla': _named(params['attention'], _MLA),
    'ffn': ffn,
  }


def _named(params, names):
  return {names[name]: value for name, value in params.items()}


def forward(params, router_biases, cfg, batch, targets_Z, isolated):
  """For each row: main logits, MTP logits and routings of all Z tokens.

  Args:
    targets_Z: the last target of each row, token Z = T + 1 of it, and its
      position and segment: three arrays [B].
  """
  weights = weights_of(params, router_biases, cfg)
  rows = []
  for b in range(len(batch.tokens_BT)):
    extended = [
      np.append(np.asarray(row[b]), last[b])
      for row, last in zip(
        (batch.tokens_BT, batch.positions_BT, batch.segments_BT),
        targets_Z,
        strict=True,
      )
    ]
    tokens_Z, positions_Z, segments_Z = extended
    settings = model.settings_of(cfg.model)
    rows.append(
      model.forward(
        weights,
        tokens_Z,
        settings,
        positions_Z,
        segments_Z if isolated else None,
      )
    )
  return rows


def loss(rows, cfg, batch, tokens_BZ, segments_BZ, mtp_weight):
  """Total, main, MTP and balance losses of one batch, and loads by layer.

  Args:
    rows: from `forward`. tokens_BZ, segments_BZ: whole rows of T + 1 tokens.
    mtp_weight: lambda.
  """
  isolated, length = cfg.data.isolate_samples, tokens_BZ.shape[1] - 1
  used = [b for b in range(len(rows)) if np.any(segments_BZ[b] > 0)]

  def depth_terms(k):
    logits, targets, weights = [], [], []
    for b, (main, deeper, _) in enumerate(rows):
      depth_logits = main if k == 0 else deeper[k - 1]
      borders_Z = segments_BZ[b] if isolated else None
      counts_Z = segments_BZ[b] > 0
      terms = losses.mtp_targets(tokens_BZ[b], k, counts_Z, borders_Z)
      logits.append(depth_logits[: length - k])
      targets.append(terms[0])
      weights.append(terms[1])
    return tuple(np.concatenate(x) for x in (logits, targets, weights))

  main, main_weight = losses.main_loss(*depth_terms(0)), sum(depth_terms(0)[2])
  normalizer = cfg.model.mtp.normalizer
  depth_losses = [
    losses.mtp_depth_loss(*depth_terms(k), normalizer, main_weight)
    for k in range(1, cfg.model.mtp.depth + 1)
  ]
  total_balance, loads = 0.0, []
  for layer in range(len(rows[0][2])):
    number = rows[0][2][layer]['layer']
    k = max(0, number - cfg.model.num_layers + 1)
    count = length - k
    stack = lambda key: np.stack([r[2][layer][key][:count] for r in rows])
    valid_BT = segments_BZ[:, k:length] > 0
    scores_BTE, ids_BTK = stack('scores_TE'), stack('ids_TK')
    value = balance_loss(scores_BTE, ids_BTK, valid_BT, cfg)
    total_balance += value * len(rows) / len(used)
    chosen = ids_BTK[valid_BT].reshape(-1)
    loads.append(np.bincount(chosen, minlength=cfg.model.moe.num_experts))
  mtp = losses.mtp_loss(depth_losses, 1.0)
  return {
    'total': main + mtp_weight * mtp + total_balance,
    'loss': main,
    'mtp_loss': mtp,
    'balance': total_balance,
    'loads': loads,
  }


def balance_loss(scores_BTE, ids_BTK, valid_BT, cfg):
  """The auxiliary loss that `cfg.balance` asks for, mean over sequences."""
  kind, b, moe = cfg.balance.kind, cfg.balance, cfg.model.moe
  if kind == 'none':
    return 0.0
  if kind == 'sequence':
    args = (scores_BTE, moe.top_k, b.alpha, valid_BT)
    return balance.mean_sequence_balance_loss(*args)
  if kind == 'batch':
    args = (scores_BTE, moe.top_k, b.alpha, valid_BT)
    return balance.batch_balance_loss(*args)
  parts = []
  for scores, ids, valid in zip(scores_BTE, ids_BTK, valid_BT, strict=True):
    choice = (scores, ids)
    limits = (moe.num_groups, moe.top_groups)
    parts += [
      balance.v2_expert_loss(*choice, b.v2_expert_alpha, valid),
      balance.v2_device_loss(*choice, b.v2_device_alpha, limits[0], valid),
      balance.v2_communication_loss(*choice, b.v2_comm_alpha, *limits, valid),
    ]
  return math.fsum(parts) / len(scores_BTE)
