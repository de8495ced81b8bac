"""A model that only counts: the next token is a sum of all before it.

It has a cache of tokens instead of latents, so that a wrong block is a wrong
token. It takes `seconds` a step, waits while `may_run` is clear, and raises
while `fails` is set.
"""

import dataclasses
import threading
import time

import numpy as np

from dsv3_jax.inference import forward, model_runner, sampling
from tests import limits, settings

VOCAB = 23


class Runner(model_runner.ModelRunner):
  """Has no parameters; a third of its speculative tokens is wrong."""

  def __init__(
    self, vocab=VOCAB, seconds=0.0, room=400, num_speculative_tokens=0
  ):
    cfg = settings.small()
    net = dataclasses.replace(cfg.model, vocab_size=vocab, max_seq_len=room)
    self.cfg = dataclasses.replace(cfg, model=net)  # instead of the real one
    self.seconds, self.fails, self.calls = seconds, False, 0
    self.num_speculative_tokens = num_speculative_tokens
    self.may_run = threading.Event()
    self.may_run.set()

  def empty_caches(self, count, size):
    return np.full((count, size), -1)

  def copy_blocks(self, copies, caches):
    for source, target in copies:
      caches[target] = caches[source]
    return caches

  def extend(self, rows, caches, arrays):
    self._write(rows, caches)
    outputs = [
      self._output(rows, caches, b, [last])
      for b, last in enumerate(rows.last_B)
    ]
    new, *rest = map(np.array, zip(*outputs, strict=True))
    return forward.StepOutput(new, *rest, self.logprobs(new)), caches

  prefill = extend

  def score(self, rows, caches, arrays):
    output, caches = self.extend(rows, caches, arrays)
    next_BT = np.roll(rows.tokens_BT, -1, axis=1)
    at_B = np.arange(len(next_BT))
    next_BT[at_B, rows.last_B] = np.maximum(rows.after_B, 0)
    return output._replace(prompt_logprobs=self.logprobs(next_BT)), caches

  def decode(self, rows, caches, arrays):
    self._write(rows, caches)
    width = rows.tokens_BT.shape[1]
    outputs = [
      self._output(rows, caches, b, range(width))
      for b in range(len(rows.last_B))
    ]
    new, *rest = map(np.array, zip(*outputs, strict=True))
    return forward.StepOutput(new, *rest, self.logprobs(new)), caches

  def logprobs(self, tokens_Bt):
    """A token's is an eighth of its id below 0; others follow by halves."""
    count_K = np.arange(sampling.TOP_LOGPROBS)
    chosen_Bt = -tokens_Bt / 8
    return sampling.Logprobs(
      chosen_Bt,
      np.full_like(tokens_Bt, 7),
      chosen_Bt[..., None] - count_K / 2,
      (tokens_Bt[..., None] + count_K) % self.cfg.model.vocab_size,
    )

  def _write(self, rows, caches):
    if self.fails:
      raise RuntimeError('out of order')
    assert self.may_run.wait(limits.HANG)
    time.sleep(self.seconds)
    self.calls += 1
    size = caches.shape[1]
    for b, index_T in enumerate(rows.index_BT):
      for token, at in zip(rows.tokens_BT[b], index_T, strict=True):
        if at >= 0:
          caches[rows.table_Bb[b, at // size], at % size] = token

  def _output(self, rows, caches, b, places):
    """New tokens of a row, how many are accepted, and speculative tokens."""
    index_T, vocab = rows.index_BT[b], self.cfg.model.vocab_size
    blocks_b = rows.table_Bb[b][rows.table_Bb[b] < len(caches)]
    row = caches[blocks_b].reshape(-1)
    new = [self.following(row[: index_T[t] + 1]) for t in places]
    count = 1
    for t in range(1, len(places)):
      if index_T[t] < 0 or rows.tokens_BT[b, t] != new[t - 1]:
        break
      count += 1
    end = index_T[places[count - 1]] + 1
    speculative, known = [], [*row[:end], new[count - 1]]
    for _ in range(self.num_speculative_tokens):
      is_wrong = sum(known) % 3 == 0
      speculative.append((self.following(known) + is_wrong) % vocab)
      known.append(speculative[-1])
    return new, count, speculative

  def following(self, row):
    return following(row, self.cfg.model.vocab_size)


def following(tokens, vocab=VOCAB):
  return (7 * int(np.sum(tokens)) + len(tokens)) % vocab


def continued(prompt, count, vocab=VOCAB):
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(following(tokens, vocab))
  return tokens[len(prompt) :]
