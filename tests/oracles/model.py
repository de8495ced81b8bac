"""The whole network on one row, in float64 (TR 2, Figures 2 and 3).

  x = x + MLA(RMSNorm(x));  x = x + FFN(RMSNorm(x));  logits = RMSNorm(x) head
  module k: h'_i = [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k-1})] W_eh, one block,
  its own output norm, the shared head; i = 1..T-k keeps its position.

Weights are nested dicts of arrays:
  embed_VD, head_DV, final_norm_D
  layers: list of {attn_norm_D, ffn_norm_D, mla, ffn}
    mla: see mla.py
    ffn: {w_gate_DF, w_up_DF, w_down_FD}, or {router_DE, bias_E,
      experts: {w_gate_EDF, w_up_EDF, w_down_EFD},
      shared: {w_gate_DF, w_up_DF, w_down_FD} or None}
  mtp: list of {enorm_D, hnorm_D, eh_proj_2DD, block, norm_D}

Which hidden state feeds the next module ('hidden'):
  'post_norm': h^0 is the output of the final norm, h^k that of module k's norm
  'pre_norm': h^0 and h^k are the last block's output, before that norm
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from . import mla, moe, rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the equations need beyond the weights."""

  eps: float
  latent_eps: float  # of the norms of c_q and c
  freqs: np.ndarray
  scale: float
  rope_factor: float
  num_groups: int
  top_groups: int
  top_k: int
  score_func: str
  norm_topk: bool
  route_scale: float
  hidden: str
  kept: Callable = np.asarray  # as of `mla.mla_naive`


def settings_of(config):
  """`Settings` from an object with a model configuration's attributes.

  YaRN is on when max_seq_len exceeds rope.original_seq_len (TR 4.3).
  """
  dim, rotary = config.mla.qk_rope_head_dim, config.rope
  active = config.max_seq_len > rotary.original_seq_len
  freqs = rope.frequencies(dim, rotary.theta)
  if active:
    freqs = rope.yarn_frequencies(
      dim,
      rotary.theta,
      rotary.original_seq_len,
      rotary.factor,
      rotary.beta_fast,
      rotary.beta_slow,
    )
  scale, rope_factor = rope.softmax_scale(
    config.mla.qk_nope_head_dim + dim,
    rotary.factor,
    rotary.mscale,
    rotary.mscale_all_dim,
    active,
  )
  return Settings(
    eps=config.norm_eps,
    latent_eps=config.latent_norm_eps,
    freqs=freqs,
    scale=scale,
    rope_factor=rope_factor,
    num_groups=config.moe.num_groups,
    top_groups=config.moe.top_groups,
    top_k=config.moe.top_k,
    score_func=config.moe.score_func,
    norm_topk=config.moe.norm_topk,
    route_scale=config.moe.route_scale,
    hidden=config.mtp.hidden,
  )


def ffn(x_TD, weights, settings):
  """(out_TD, routing): dense SwiGLU, routing None, or DeepSeekMoE (eq. 12)."""
  if 'router_DE' not in weights:
    out_TD = moe.swiglu(
      x_TD, weights['w_gate_DF'], weights['w_up_DF'], weights['w_down_FD']
    )
    return out_TD, None
  ids_TK, gates_TK, load_E = moe.route(
    x_TD,
    weights['router_DE'],
    weights.get('bias_E'),
    settings.num_groups,
    settings.top_groups,
    settings.top_k,
    settings.score_func,
    settings.norm_topk,
    settings.route_scale,
  )
  out_TD = moe.moe_ffn(
    x_TD, ids_TK, gates_TK, weights['experts'], weights['shared']
  )
  routing = {
    'scores_TE': moe.scores(x_TD, weights['router_DE'], settings.score_func),
    'ids_TK': ids_TK,
    'gates_TK': gates_TK,
    'load_E': load_E,
  }
  return out_TD, routing


def block(x_TD, weights, settings, positions_T, segments_T):
  """One transformer block: (out_TD, routing or None)."""
  normed_TD = mla.rms_norm(x_TD, weights['attn_norm_D'], settings.eps)
  attended_TD, _ = mla.mla_naive(
    normed_TD,
    weights['mla'],
    positions_T,
    segments_T,
    settings.freqs,
    settings.scale,
    settings.latent_eps,
    settings.rope_factor,
    settings.kept,
  )
  x_TD = x_TD + attended_TD
  normed_TD = mla.rms_norm(x_TD, weights['ffn_norm_D'], settings.eps)
  out_TD, routing = ffn(normed_TD, weights['ffn'], settings)
  return x_TD + out_TD, routing


def forward(weights, tokens_T, settings, positions_T=None, segments_T=None):
  """Logits of the main model and of every MTP module (TR 2.1, 2.2).

  Args:
    tokens_T: t_1..t_T; module k, counted from 1, uses t_{1+k}..t_T of them.
    positions_T: for RoPE; None: 0..T-1.
    segments_T: None, or attention stays within equal segments.
  Returns:
    logits_TV; a list of logits [T - k, V]; and for every MoE block in order,
    modules last, a dict of layer (number from 0; module k has the number of
    main layers + k - 1), scores_TE, ids_TK, gates_TK, load_E.
  """
  tokens_T = np.asarray(tokens_T, np.int64)
  if positions_T is None:
    positions_T = np.arange(len(tokens_T))
  x_TD = np.asarray(weights['embed_VD'], np.float64)[tokens_T]
  routings = []

  def run_block(x_TD, block_weights, layer):
    count = len(x_TD)
    segments = None if segments_T is None else segments_T[:count]
    out_TD, routing = block(
      x_TD, block_weights, settings, positions_T[:count], segments
    )
    if routing is not None:
      routings.append({'layer': layer} | routing)
    return out_TD

  for layer, layer_weights in enumerate(weights['layers']):
    x_TD = run_block(x_TD, layer_weights, layer)
  normed_TD = mla.rms_norm(x_TD, weights['final_norm_D'], settings.eps)
  logits_TV = normed_TD @ weights['head_DV']
  mtp_logits = []
  for k, module in enumerate(weights['mtp'], start=1):
    hidden_TD = {'post_norm': normed_TD, 'pre_norm': x_TD}[settings.hidden]
    x_TD = mtp_input(
      hidden_TD, weights['embed_VD'], tokens_T, module, k, settings.eps
    )
    x_TD = run_block(x_TD, module['block'], len(weights['layers']) + k - 1)
    normed_TD = mla.rms_norm(x_TD, module['norm_D'], settings.eps)
    mtp_logits.append(normed_TD @ weights['head_DV'])
  return logits_TV, mtp_logits, routings


def mtp_input(hidden_TD, embed_VD, tokens_T, module, depth, eps):
  """Module k's block input at positions 1..T-k (eq. 21, embedding first).

  Args:
    hidden_TD: h^{k-1}, at least T - k rows of it.
    depth: k, from 1.
  """
  count = len(tokens_T) - depth
  rows = []
  for i in range(count):
    embedded_D = embed_VD[tokens_T[i + depth]]
    left_D = mla.rms_norm(embedded_D, module['enorm_D'], eps)
    right_D = mla.rms_norm(hidden_TD[i], module['hnorm_D'], eps)
    rows.append(np.concatenate([left_D, right_D]) @ module['eh_proj_2DD'])
  return np.array(rows)
