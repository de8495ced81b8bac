"""Multi-head latent attention in float64 (TR 2.1.1, eqs. 1-11).

  c_q = RMSNorm(W_DQ x),  [q_nope ; q_rope] = W_UQ c_q,  q_rope rotated
  [c ; k_rope] = W_DKV x, c normed, k_rope rotated and not normed
  k = [W_UK c ; k_rope],  v = W_UV c
  o = W_O concat_n softmax(q_n . k_n * scale) v_n

Absorbed: q_nope . (W_UK c) = (W_UK^T q_nope) . c, and W_UV is applied after
the probabilities, so that a step reads only the cached c and k_rope.

Weights are a dict: w_dq_DQ, q_norm_Q, w_uq_QNX (without a query latent only
w_q_DNX), w_dkv_DY, kv_norm_C, w_uk_CNH, w_uv_CNU, w_o_NUD.
Letters: T tokens, S cached tokens, D model, N heads, H no-position head dim,
R rope head dim, X = H + R, U value head dim, Q and C latents, Y = C + R.
"""

import math

import numpy as np

from . import rope


def rms_norm(x, weight, eps):
  """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
  x = np.asarray(x, np.float64)
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def softmax(x):
  """Of a vector, shifted by its maximum."""
  powers = np.exp(x - np.max(x))
  return powers / np.sum(powers)


def _queries(x_TD, weights, positions_T, freqs, eps, rope_factor):
  """(q_nope_TNH, q_rope_TNR rotated), eqs. 6-9."""
  head_dim = weights['w_uk_CNH'].shape[2]
  if 'w_q_DNX' in weights:
    q_TNX = np.einsum('td,dnx->tnx', x_TD, weights['w_q_DNX'])
  else:
    c_q_TQ = rms_norm(x_TD @ weights['w_dq_DQ'], weights['q_norm_Q'], eps)
    q_TNX = np.einsum('tq,qnx->tnx', c_q_TQ, weights['w_uq_QNX'])
  q_rope_TNR = rope.rotate_interleaved(
    q_TNX[:, :, head_dim:], positions_T, freqs, rope_factor
  )
  return q_TNX[:, :, :head_dim], q_rope_TNR


def _latents(x_TD, weights, positions_T, freqs, eps, rope_factor):
  """What is cached: (c_TC after its norm, k_rope_TR rotated), eqs. 1-3."""
  latent_dim = weights['kv_norm_C'].shape[0]
  kv_TY = x_TD @ weights['w_dkv_DY']
  c_TC = rms_norm(kv_TY[:, :latent_dim], weights['kv_norm_C'], eps)
  k_rope_TR = rope.rotate_interleaved(
    kv_TY[:, latent_dim:], positions_T, freqs, rope_factor
  )
  return c_TC, k_rope_TR


def mla_naive(
  x_TD,
  weights,
  positions_T,
  segments_T,
  freqs,
  scale,
  eps,
  rope_factor=1.0,
  kept=np.asarray,
):
  """Causal attention over one row, keys and values expanded (eqs. 1-11).

  Args:
    x_TD: the block's normed input.
    segments_T: None, or integers: a token sees its own segment only. Order is
      that of the row, whatever the positions are.
    freqs, scale, rope_factor: from `rope`.
    kept: what the cache makes of the normed latents, which queries then see.
  Returns:
    out_TD and the cache (c_TC, k_rope_TR).
  """
  x_TD = np.asarray(x_TD, np.float64)
  args = (x_TD, weights, positions_T, freqs, eps, rope_factor)
  q_nope_TNH, q_rope_TNR = _queries(*args)
  c_TC, k_rope_TR = _latents(*args)
  c_TC = kept(c_TC)
  k_nope_TNH = np.einsum('tc,cnh->tnh', c_TC, weights['w_uk_CNH'])
  v_TNU = np.einsum('tc,cnu->tnu', c_TC, weights['w_uv_CNU'])
  num_tokens, num_heads, _ = q_nope_TNH.shape
  out_TD = np.zeros((num_tokens, weights['w_o_NUD'].shape[2]))
  for i in range(num_tokens):
    seen = [
      j
      for j in range(i + 1)
      if segments_T is None or segments_T[j] == segments_T[i]
    ]
    for n in range(num_heads):
      q_X = np.concatenate([q_nope_TNH[i, n], q_rope_TNR[i, n]])
      logits = np.zeros(len(seen))
      for s, j in enumerate(seen):
        k_X = np.concatenate([k_nope_TNH[j, n], k_rope_TR[j]])
        logits[s] = np.dot(q_X, k_X) * scale
      probs = softmax(logits)
      o_U = sum(p * v_TNU[j, n] for p, j in zip(probs, seen, strict=True))
      out_TD[i] += o_U @ weights['w_o_NUD'][n]
  return out_TD, (c_TC, k_rope_TR)


def mla_absorbed_step(
  x_D,
  weights,
  c_SC,
  k_rope_SR,
  position,
  freqs,
  scale,
  eps,
  rope_factor=1.0,
):
  """One token's attention over the latent cache (TR 2.1.1, absorbed form).

  Args:
    c_SC, k_rope_SR: the cache of the tokens before; S may be 0. This token's
      own entry is appended before attending.
    position: of this token, for RoPE.
  Returns:
    out_D and the grown cache (c, k_rope) with S + 1 rows.
  """
  x_1D = np.asarray(x_D, np.float64)[None]
  args = (x_1D, weights, np.array([position]), freqs, eps, rope_factor)
  q_nope_1NH, q_rope_1NR = _queries(*args)
  c_1C, k_rope_1R = _latents(*args)
  c_SC = np.concatenate([c_SC, c_1C])
  k_rope_SR = np.concatenate([k_rope_SR, k_rope_1R])
  out_D = np.zeros(weights['w_o_NUD'].shape[2])
  for n in range(q_nope_1NH.shape[1]):
    q_C = weights['w_uk_CNH'][:, n] @ q_nope_1NH[0, n]
    logits_S = np.zeros(len(c_SC))
    for s in range(len(c_SC)):
      dot = math.fsum(q_C * c_SC[s])
      dot += math.fsum(q_rope_1NR[0, n] * k_rope_SR[s])
      logits_S[s] = dot * scale
    o_C = softmax(logits_S) @ c_SC
    o_U = o_C @ weights['w_uv_CNU'][:, n]
    out_D += o_U @ weights['w_o_NUD'][n]
  return out_D, (c_SC, k_rope_SR)
