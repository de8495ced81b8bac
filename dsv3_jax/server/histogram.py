"""Histograms as Prometheus has them: counts of values up to each bound."""

import bisect
import itertools
from collections.abc import Sequence


class Histogram:
  """Counts values by upper bounds; written by one thread, read by others.

  sum: of all values.
  """

  def __init__(self, bounds: Sequence[float | int]):
    """Args: bounds: increasing; infinity follows them."""
    self._bounds = list(bounds)
    self._counts = [0] * (len(bounds) + 1)
    self.sum = 0.0

  def observe(self, value: float | int) -> None:
    self._counts[bisect.bisect_left(self._bounds, value)] += 1
    self.sum += value

  def buckets(self) -> list[tuple[str, int]]:
    """Each bound, as Prometheus spells it, and how many values it covers."""
    names = [*map(str, self._bounds), '+Inf']
    return list(zip(names, itertools.accumulate(self._counts), strict=True))
