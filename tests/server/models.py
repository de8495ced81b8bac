"""Models for tests of the server that say what a test wants."""

import numpy as np

from tests.inference import counting

VOCAB = 330


class Choosing(counting.Runner):
  """As `counting.Runner`; with a grammar, one of the tokens it allows."""

  def extend(self, rows, caches, arrays):
    self._adjustments = arrays.adjustments
    return super().extend(rows, caches, arrays)

  prefill = extend

  def decode(self, rows, caches, arrays):
    self._adjustments = arrays.adjustments
    return super().decode(rows, caches, arrays)

  def _output(self, rows, caches, b, places):
    self._row = b
    return super()._output(rows, caches, b, places)

  def following(self, row):
    allowed_v = self._adjustments.allowed_Bv[self._row]
    if not self._adjustments.is_constrained_B[self._row]:
      return super().following(row)
    bits_V = np.unpackbits(allowed_v.view(np.uint8), bitorder='little')
    ids = np.flatnonzero(bits_V)
    mixed = 2_654_435_761 * (int(np.sum(row)) + 31 * len(row))
    return int(ids[(mixed >> 8) % len(ids)])


class Saying(counting.Runner):
  """Says `ids` behind a prompt of `prompt_length` tokens, then the end."""

  def __init__(self, eos_id, **options):
    super().__init__(VOCAB, room=900, **options)
    self.ids, self.prompt_length, self._eos_id = [], 0, eos_id

  def following(self, row):
    at = len(row) - self.prompt_length
    return self.ids[at] if 0 <= at < len(self.ids) else self._eos_id
