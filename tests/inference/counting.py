"""A model that only counts: the next token is a sum of all before it.

It has a cache of tokens instead of latents, so that a wrong page is a wrong
token; it takes `seconds` a step, and fails when told to.
"""

import dataclasses
import time

import numpy as np

from dsv3_jax.inference import steps
from tests import settings

VOCAB = 23


class Steps(steps.Steps):
  """Has no parameters."""

  def __init__(self, vocab=VOCAB, seconds=0.0, room=400):
    cfg = settings.small()
    net = dataclasses.replace(cfg.model, vocab_size=vocab, max_seq_len=room)
    self.cfg = dataclasses.replace(cfg, model=net)  # instead of the real one
    self.seconds, self.fails, self.calls = seconds, False, 0

  def empty_caches(self, count, size):
    return np.full((count, size), -1)

  def copy(self, copies, caches):
    for source, target in copies:
      caches[target] = caches[source]
    return caches

  def extend(self, rows, caches, draws):
    if self.fails:
      raise RuntimeError('out of order')
    time.sleep(self.seconds)
    self.calls += 1
    size = caches.shape[1]
    next_B = np.zeros(len(rows.last_B), np.int64)
    for b, index_T in enumerate(rows.index_BT):
      for token, at in zip(rows.tokens_BT[b], index_T, strict=True):
        if at >= 0:
          caches[rows.table_Bb[b, at // size], at % size] = token
    for b, last in enumerate(rows.last_B):
      end = rows.index_BT[b, last] + 1
      if end:
        row = caches[rows.table_Bb[b]].reshape(-1)[:end]
        next_B[b] = self.following(row)
    return next_B, caches

  prefill = extend

  def following(self, row):
    return following(row, self.cfg.model.vocab_size)


def following(tokens, vocab=VOCAB):
  return (7 * int(np.sum(tokens)) + len(tokens)) % vocab


def continued(prompt, count, vocab=VOCAB):
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(following(tokens, vocab))
  return tokens[len(prompt) :]
