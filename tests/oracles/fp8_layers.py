"""Backward passes that live on FP8 copies, in float64 (TR 3.3.3).

  SwiGLU     kept: gate and up in e4m3, tiles 1 x 128. In the backward pass the
             output silu(gate) up is computed again from the copies, and so are
             the gradients of gate and up.
  Attention  kept: queries, keys, values, the log-sum-exp of every query, and
             of the output only the 12-bit copy that the next Linear takes.
             delta = sum_u o du of the copy stands for sum_s p dp, so that
               p = exp(s - lse),  ds = p (dp - delta) scale.

From the facts alone. Letters: T queries, S keys (T = S, causal), M tokens, N
heads, H and R head dims without and with rotation (the key of the latter is
shared by all heads), U value head dim, F hidden.
"""

import numpy as np

from . import fp8_formats as formats


def sigmoid(x):
  return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def swiglu(gate_MF, up_MF, weight_M=None):
  """silu(gate) up, times the routing weight of the row where there is one."""
  out_MF = gate_MF * sigmoid(gate_MF) * up_MF
  return out_MF if weight_M is None else out_MF * weight_M[:, None]


def swiglu_backward(gate_MF, up_MF, dout_MF, weight_M=None):
  """(dgate_MF, dup_MF, dweight_M or None)."""
  gate_MF, up_MF, dout_MF = map(np.float64, (gate_MF, up_MF, dout_MF))
  sigmoid_MF = sigmoid(gate_MF)
  silu_MF = gate_MF * sigmoid_MF
  slope_MF = sigmoid_MF + silu_MF * (1 - sigmoid_MF)
  dweight_M = None
  if weight_M is not None:
    dweight_M = np.sum(dout_MF * silu_MF * up_MF, axis=1)
    dout_MF = dout_MF * weight_M[:, None]
  return dout_MF * up_MF * slope_MF, dout_MF * silu_MF, dweight_M


def swiglu_cached(
  gate_MF, up_MF, dout_MF, weight_M=None, scaling=formats.PLAIN
):
  """The backward pass from copies in e4m3.

  Returns:
    the output as computed again, then what `swiglu_backward` gives.
  """
  gate_MF = formats.fake(gate_MF, formats.ROW, scaling)
  up_MF = formats.fake(up_MF, formats.ROW, scaling)
  again_MF = swiglu(gate_MF, up_MF, weight_M)
  return again_MF, *swiglu_backward(gate_MF, up_MF, dout_MF, weight_M)


def _logits(q_nope_TNH, q_rope_TNR, k_nope_SNH, k_rope_SR, scale):
  """logits_NTS, minus infinity above the diagonal."""
  logits_NTS = np.einsum('tnh,snh->nts', q_nope_TNH, k_nope_SNH)
  logits_NTS = logits_NTS + np.einsum('tnr,sr->nts', q_rope_TNR, k_rope_SR)
  seen_TS = np.tri(len(q_nope_TNH), len(k_rope_SR), dtype=bool)
  return np.where(seen_TS, logits_NTS * scale, -np.inf)


def attention(q_nope_TNH, q_rope_TNR, k_nope_SNH, k_rope_SR, v_SNU, scale):
  """(o_TNU, lse_NT): causal attention and the log of the softmax's sum."""
  logits_NTS = _logits(q_nope_TNH, q_rope_TNR, k_nope_SNH, k_rope_SR, scale)
  top_NT = np.max(logits_NTS, axis=-1)
  powers_NTS = np.exp(logits_NTS - top_NT[..., None])
  lse_NT = top_NT + np.log(np.sum(powers_NTS, axis=-1))
  probs_NTS = np.exp(logits_NTS - lse_NT[..., None])
  return np.einsum('nts,snu->tnu', probs_NTS, v_SNU), lse_NT


def e5m6_output(o_TNU):
  """The copy that is kept: tiles 1 x 128 run over a token's heads in a row."""
  return formats.e5m6_copy(o_TNU.reshape(len(o_TNU), -1)).reshape(o_TNU.shape)


def attention_backward(qkv, lse_NT, o_TNU, do_TNU, scale):
  """Gradients from log-sum-exp and an output that may be a rounded copy.

  Args:
    qkv: (q_nope_TNH, q_rope_TNR, k_nope_SNH, k_rope_SR, v_SNU).
  Returns:
    the gradients of the five; that of k_rope_SR is the sum over heads.
  """
  q_nope_TNH, q_rope_TNR, k_nope_SNH, k_rope_SR, v_SNU = qkv
  logits_NTS = _logits(*qkv[:4], scale)
  probs_NTS = np.exp(logits_NTS - lse_NT[..., None])
  dprobs_NTS = np.einsum('tnu,snu->nts', do_TNU, v_SNU)
  delta_NT = np.einsum('tnu,tnu->nt', o_TNU, do_TNU)
  ds_NTS = probs_NTS * (dprobs_NTS - delta_NT[..., None]) * scale
  return (
    np.einsum('nts,snh->tnh', ds_NTS, k_nope_SNH),
    np.einsum('nts,sr->tnr', ds_NTS, k_rope_SR),
    np.einsum('nts,tnh->snh', ds_NTS, q_nope_TNH),
    np.einsum('nts,tnr->sr', ds_NTS, q_rope_TNR),
    np.einsum('nts,tnu->snu', probs_NTS, do_TNU),
  )
