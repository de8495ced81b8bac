"""Which tokens a grammar allows behind those of a request."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32


class Matcher:
  """The state of a grammar after a request's tokens.

  failed: a step would take too long; the answer ends here, incomplete.
  """

  def __init__(self, state: Any, eos_id: int, vocab_size: int):
    """Args: state: an `llguidance.LLMatcher` before the first token."""
    self._state, self._eos_id, self._vocab_size = state, eos_id, vocab_size
    self._num_consumed = 0
    self.failed = False

  def allowed(self, tokens: Sequence[int]) -> UInt32[np.ndarray, 'v']:
    """One bit for each id: whether it may come behind these tokens.

    Args:
      tokens: all generated so far; fewer than before after a preemption.
    """
    if len(tokens) < self._num_consumed:
      self._state.reset()
      self._num_consumed = 0
    new = list(tokens[self._num_consumed :])
    self._num_consumed = len(tokens)
    if not new or self._state.consume_tokens(new):
      bits_v = np.frombuffer(self._state.compute_bitmask(), np.uint32)
      if bits_v.any() and not self._state.is_error():
        return bits_v
    self.failed = True
    bits_v = np.zeros(-(-self._vocab_size // 32), np.uint32)
    bits_v[self._eos_id // 32] = 1 << self._eos_id % 32
    return bits_v
