"""Where the wall time of a run goes, over all of its restarts.

  step        training steps that the run still has
  input       waits for data that no step on the devices hid
  compile     the first call of the step
  save        host time of checkpoints; what is written beside steps is hidden
  evaluation  held-out text, samples
  restore     from the last record of an ended process to the first step
  lost        steps after the checkpoint that a restart began from

Goodput is the share of `step`; `save`, `restore` and `lost` are the terms of
`dsv3_jax.planning.goodput`. `goodput.json` in the workdir holds the sums and
when they were written, so that a killed run loses its place and not its time.
"""

import json
import pathlib
import time
from collections.abc import Callable

from dsv3_jax import errors

PARTS = ('step', 'input', 'compile', 'save', 'evaluation', 'restore', 'lost')
_FILE = 'goodput.json'


class Goodput:
  """Seconds of each part; time belongs to the part entered last."""

  def __init__(self, clock: Callable[[], float] = time.time):
    """Begins in `restore`.

    Args:
      clock: seconds since a fixed time, the same for all processes of a run.
    """
    self._clock, self._since, self._part = clock, clock(), 'restore'
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._steps_at: dict[str, float] = {}  # `step` when a step was saved
    self._path: pathlib.Path | None = None

  def resume(self, workdir: pathlib.Path, step: int | None) -> None:
    """Adds the time of earlier starts; from now on `write` writes.

    Args:
      step: the checkpoint that the run goes on from, or None.

    Raises:
      InputError: the record is damaged.
    """
    self._path = workdir / _FILE
    if not self._path.exists():
      return
    written, before, steps_at = _read(self._path)
    kept = steps_at.get(str(step), 0.0)
    before['lost'] += before['step'] - kept
    before['step'] = kept
    # A clock that was set back would give less than none.
    before['restore'] += max(0.0, self._since - written)
    for part in PARTS:
      self._seconds[part] += before[part]
    # Later steps are no longer the run's.
    self._steps_at = {k: v for k, v in steps_at.items() if v <= kept}

  def enter(self, part: str, hidden: bool = False) -> None:
    """Ends a part and begins another.

    Args:
      hidden: a step ran on the devices throughout the part that ends.
    """
    now = self._clock()
    ended = 'step' if hidden else self._part
    self._seconds[ended] += max(0.0, now - self._since)
    self._since, self._part = now, part

  def saved(self, step: int) -> None:
    """Remembers how many seconds of steps a checkpoint keeps."""
    self._steps_at[str(step)] = self._seconds['step']

  def write(self) -> dict[str, float]:
    """Writes the sums; returns them and the share of steps."""
    self.enter(self._part)
    if self._path is not None:
      record = {'time': self._since, 'seconds': self._seconds}
      record['step_seconds_at'] = self._steps_at
      scratch = self._path.with_name(f'.{_FILE}')
      scratch.write_text(json.dumps(record) + '\n', encoding='utf-8')
      scratch.replace(self._path)
    total = sum(self._seconds.values())
    share = self._seconds['step'] / total if total else 0.0
    sums = {f'{part}_seconds': x for part, x in self._seconds.items()}
    return {'goodput': share} | sums


def _read(path: pathlib.Path) -> tuple[float, dict, dict]:
  """When a record was written, its seconds, and those of saved steps."""
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    seconds = {part: float(record['seconds'][part]) for part in PARTS}
    steps_at = {k: float(v) for k, v in record['step_seconds_at'].items()}
    return float(record['time']), seconds, steps_at
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.InputError(
      f'{path} is damaged: remove it, and time is counted anew'
    ) from error
