"""Decoding over a paged latent cache in float64 (TR 2.1.1, absorbed form).

Token s of a row lies at place s % 64 of page table[s // 64]. The queries of a
row are its last tokens; each sees itself and what was before it:

  o = sum_s softmax_s((q_c . c_s + q_r . k_s) * scale) c_s

One token, one head, one query at a time. A query that sees nothing gives zeros
and the logarithm of an empty sum, -inf.
Letters: B rows, T queries of a row, N heads, C latent, R rotary.
"""

import numpy as np

PAGE = 64


def row_tokens(pages, table, length):
  """The row's own entries of [pages, 64, width], in order."""
  width = pages.shape[2]
  tokens = np.zeros((length, width))
  for s in range(length):
    tokens[s] = pages[table[s // PAGE], s % PAGE]
  return tokens


def attend(q_c, q_r, c_SC, k_SR, scale):
  """(o_C, lse) of one query of one head over the tokens that it sees."""
  if not len(c_SC):
    return np.zeros(c_SC.shape[1]), -np.inf
  scores = np.array(
    [
      (np.dot(q_c, c) + np.dot(q_r, k)) * scale
      for c, k in zip(c_SC, k_SR, strict=True)
    ]
  )
  largest = np.max(scores)
  powers = np.exp(scores - largest)
  o_C = np.zeros(c_SC.shape[1])
  for power, c in zip(powers, c_SC, strict=True):
    o_C += power / np.sum(powers) * c
  return o_C, largest + np.log(np.sum(powers))


def decode(q_BTNY, c_pages, k_rope_pages, tables, lengths, scale):
  """(o_BTNC, lse_BNT) in float64; the latent part of a query comes first."""
  q_BTNY = np.asarray(q_BTNY, np.float64)
  rows, queries, heads, _ = q_BTNY.shape
  latent = c_pages.shape[2]
  o_BTNC = np.zeros((rows, queries, heads, latent))
  lse_BNT = np.zeros((rows, heads, queries))
  for b, t, n in np.ndindex(rows, queries, heads):
    length = int(lengths[b])
    seen = max(length - queries + t + 1, 0)
    c_SC = row_tokens(c_pages, tables[b], length)[:seen]
    k_SR = row_tokens(k_rope_pages, tables[b], length)[:seen]
    q_c, q_r = q_BTNY[b, t, n, :latent], q_BTNY[b, t, n, latent:]
    o_BTNC[b, t, n], lse_BNT[b, n, t] = attend(q_c, q_r, c_SC, k_SR, scale)
  return o_BTNC, lse_BNT
