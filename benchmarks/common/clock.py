"""Times functions in turns, so that drift of the device affects all equally.

Device work is asynchronous: a sample has enough calls to be long enough, and
ends when the result of the last is ready. A variant has several sets of inputs
and runs all of them in one call, so that no cache holds its next one.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Times(NamedTuple):
  """Seconds of one product: of all samples, and how many there were."""

  median: float
  minimum: float
  tenth: float
  ninetieth: float
  samples: int

  def row(self) -> dict[str, float]:
    """For a report; the spread is from the 10th to the 90th percentile."""
    return {
      'milliseconds_median': self.median * 1e3,
      'milliseconds_minimum': self.minimum * 1e3,
      'spread_percent': (self.ninetieth - self.tenth) / self.median * 1e2,
      'samples': self.samples,
    }


@dataclasses.dataclass(frozen=True)
class Clock:
  """Length and number of samples. seconds: of all variants together.

  sample_seconds: least length of a sample. rounds: least and most of them.
  """

  seconds: float
  sample_seconds: float
  rounds: tuple[int, int]

  def time(
    self, variants: dict[Any, Callable[[], Any]], units: dict[Any, int]
  ) -> dict[Any, Times]:
    """Times each variant; one call does its `units` equal pieces of work.

    Every variant has been called (it is compiled). The order rotates from
    round to round.
    """
    calls = {name: self._calls(run) for name, run in variants.items()}
    samples = {name: [] for name in variants}
    names, end = list(variants), time.perf_counter() + self.seconds
    for turn in range(self.rounds[1]):
      if turn >= self.rounds[0] and time.perf_counter() > end:
        break
      at = turn % len(names)
      for name in names[at:] + names[:at]:
        seconds = _seconds(variants[name], calls[name])
        samples[name].append(seconds / (calls[name] * units[name]))
    return {name: summary(seconds) for name, seconds in samples.items()}

  def _calls(self, run: Callable[[], Any]) -> int:
    """Calls of a sample, from two after one that does not count."""
    if not self.sample_seconds:
      return 1
    _seconds(run, 1)
    once = _seconds(run, 2) / 2
    return max(1, min(1000, int(np.ceil(self.sample_seconds / once))))


GPU = Clock(seconds=1.0, sample_seconds=0.01, rounds=(10, 50))
CPU = Clock(seconds=1.0, sample_seconds=0.0, rounds=(3, 10))
DRY = Clock(seconds=0.0, sample_seconds=0.0, rounds=(2, 2))


def default() -> Clock:
  return CPU if jax.default_backend() == 'cpu' else GPU


def summary(seconds: Sequence[float]) -> Times:
  """Of samples, in any order."""
  tenth, ninetieth = np.percentile(seconds, [10, 90])
  return Times(
    statistics.median(seconds),
    min(seconds),
    float(tenth),
    float(ninetieth),
    len(seconds),
  )


def _seconds(run: Callable[[], Any], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    out = run()
  jax.block_until_ready(out)
  return time.perf_counter() - start
