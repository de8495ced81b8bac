"""Logit bias and penalties of a request, from its tokens so far.

Penalties as in OpenAI's API and vLLM: those for presence and frequency count
generated tokens only; the repetition penalty counts the prompt's too. It comes
first, then all that is added.
"""

from collections.abc import Sequence

import numpy as np

from dsv3_jax.inference import request as requests
from dsv3_jax.inference import sampling


class Adjuster:
  """The adjustments of one request's next token.

  offset_V, repeated_V: see `sampling.LogitAdjustments`.
  """

  def __init__(self, request: requests.Request, vocab_size: int):
    self._request = request
    self.offset_V = np.zeros(vocab_size, np.float32)
    self.repeated_V = np.zeros(vocab_size, bool)
    self._reset()

  def _reset(self) -> None:
    params = self._request.sampling
    self.offset_V[:], self.repeated_V[:] = 0.0, False
    for token, bias in params.logit_bias:
      self.offset_V[token] += bias
    self.repeated_V[self._request.prompt] = params.repetition_penalty != 1.0
    self._num_seen, self._present = 0, set()

  def update(self) -> None:
    """Counts the tokens that the request has got since."""
    request, params = self._request, self._request.sampling
    if not params.has_penalty:
      return
    num_tokens = len(request.all_tokens) - len(request.prompt)
    if num_tokens < self._num_seen:  # a preemption took some away
      self._reset()
    for token in request.all_tokens[len(request.prompt) + self._num_seen :]:
      if token not in self._present:
        self._present.add(token)
        self.offset_V[token] -= params.presence_penalty
        self.repeated_V[token] = params.repetition_penalty != 1.0
      self.offset_V[token] -= params.frequency_penalty
    self._num_seen = num_tokens


def stack(
  chosen: Sequence[requests.Request],
  rows: Sequence[int],
  num_rows: int,
  vocab_size: int,
) -> sampling.LogitAdjustments | None:
  """Arrays for a step; None if no request has adjustments.

  Args:
    rows: of each request. num_rows: of the step.
  """
  if not any(request.sampling.adjusts_logits for request in chosen):
    return None
  adjustments = sampling.LogitAdjustments(
    np.zeros((num_rows, vocab_size), np.float32),
    np.zeros((num_rows, vocab_size), bool),
    np.ones(num_rows, np.float32),
  )
  for b, request in zip(rows, chosen, strict=True):
    if not request.sampling.adjusts_logits:
      continue
    if request.adjuster is None:
      request.adjuster = Adjuster(request, vocab_size)
    request.adjuster.update()
    adjustments.offset_BV[b] = request.adjuster.offset_V
    adjustments.repeated_BV[b] = request.adjuster.repeated_V
    adjustments.repetition_B[b] = request.sampling.repetition_penalty
  return adjustments
