"""When each action of a schedule runs without a common clock.

Each rank keeps its order and starts its next action as soon as its operands
have arrived, as a process or a thread would; `ticks` has times with
a common clock. Ints and Fractions give exact results.
"""

import dataclasses
import math

from dsv3_jax import errors
from dsv3_jax.parallel.schedules import actions, validate
from dsv3_jax.parallel.schedules.actions import Number, Schedule

PerStage = Number | tuple[Number, ...]
Rows = list[list[Number]]  # [rank][place in the rank's order]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
  """How long actions take: one number, or one for each stage.

  Attributes:
    f: forward of one micro-batch at one stage.
    b: its full backward.
    w: the weight half of it; the input half takes b - w.
    fb: an overlapped forward and backward, by the stage of the forward; None:
      f + b of the two stages.
    comm: from a rank to another, after the action ends.
  """

  f: PerStage = 1
  b: PerStage = 2
  w: PerStage = 1
  fb: PerStage | None = None
  comm: Number = 0

  def durations(self, schedule: Schedule) -> Rows:
    """The time of every action, without that of sending its result.

    Raises:
      InputError: a time is negative or not finite, f, b or fb is 0, w > b, or
        there are not as many times as stages.
    """
    f, b, w = (self._by_stage(name, schedule.stages) for name in 'fbw')
    self._by_stage('comm', 1)
    for stage, (full, half) in enumerate(zip(b, w, strict=True)):
      if half > full:
        raise errors.InputError(
          f'w={half} must be <= b={full} (stage {stage}): b is the full '
          'backward, w its weight half'
        )
    overlapped = (
      None if self.fb is None else self._by_stage('fb', schedule.stages)
    )
    backward_times = {
      actions.BACKWARD: b,
      actions.INPUT: [full - half for full, half in zip(b, w, strict=True)],
      actions.WEIGHT: w,
    }
    rows = []
    for order in schedule.orders:
      row = []
      for action in order:
        forward, backward = action.forward, action.backward
        if forward is None:
          row.append(backward_times[action.kind][backward.stage])
        elif backward is None:
          row.append(f[forward.stage])
        elif overlapped is None:
          row.append(f[forward.stage] + b[backward.stage])
        else:
          row.append(overlapped[forward.stage])
      rows.append(row)
    return rows

  def _by_stage(self, name: str, stages: int) -> list[Number]:
    value = getattr(self, name)
    values = list(value) if isinstance(value, tuple) else [value] * stages
    if len(values) != stages:
      raise errors.InputError(
        f'{name} has {len(values)} values: it must be one, or one for each of '
        f'the {stages} stages'
      )
    positive = name in ('f', 'b', 'fb')  # w and comm may be 0
    for time in values:
      if not (time >= 0 and math.isfinite(time) and (time or not positive)):
        raise errors.InputError(
          f'{name}={time} must be {">" if positive else ">="} 0 and finite'
        )
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
  """When every action starts and ends; the first starts at 0."""

  starts: Rows
  ends: Rows

  @property
  def total(self) -> Number:
    """The end of the last action."""
    return max(end for row in self.ends for end in row[-1:])

  @property
  def idle(self) -> list[Number]:
    """How long each rank is idle between 0 and `total`."""
    busy = [
      sum(end - start for start, end in zip(*rows, strict=True))
      for rows in zip(self.starts, self.ends, strict=True)
    ]
    return [self.total - time for time in busy]

  @property
  def bubble(self) -> Number:
    """The largest idle time of a rank.

    It is the same on all ranks if stages are equal and fb = f + b. If fb is
    shorter, ranks with more overlapped actions have less work, and the report's
    formula is that of the middle ranks, which have the largest bubble.
    """
    return max(self.idle)


def simulate(schedule: Schedule, times: Times) -> Timeline:
  """Runs a schedule, every action as early as possible.

  Raises:
    InputError: times are not legal (`Times.durations`).
    ValueError: work is missing or misplaced (`validate.check_work`), or ranks
      wait for one another (deadlock).
  """
  table = validate.check_work(schedule)
  return run(schedule, table, times.durations(schedule), times.comm)


def run(
  schedule: Schedule,
  table: list[list[validate.Link]],
  durations: Rows,
  comm: Number,
) -> Timeline:
  """`simulate` with the schedule's links and the duration of every action."""
  arrivals = [None] * (2 * schedule.stages * schedule.microbatches)
  makers = [-1] * len(arrivals)
  waiting: dict[int, list[int]] = {}
  starts, ends = [[] for _ in table], [[] for _ in table]
  ready_ranks = list(range(schedule.ranks))
  while ready_ranks:
    rank = ready_ranks.pop()
    row, lengths, begun, ended = (
      rows[rank] for rows in (table, durations, starts, ends)
    )
    clock = ended[-1] if ended else 0
    for place in range(len(ended), len(row)):
      need, results = row[place]
      missing, start = None, clock
      for result in need:
        arrival = arrivals[result]
        if arrival is None:
          missing = result
          break
        if makers[result] != rank:
          arrival += comm
        if arrival > start:
          start = arrival
      if missing is not None:
        waiting.setdefault(missing, []).append(rank)
        break
      clock = start + lengths[place]
      begun.append(start)
      ended.append(clock)
      for result in results:
        arrivals[result], makers[result] = clock, rank
        if result in waiting:
          ready_ranks += waiting.pop(result)
  if waiting:
    raise ValueError(_describe_deadlock(schedule, table, waiting, ends))
  return Timeline(starts=starts, ends=ends)


def _describe_deadlock(
  schedule: Schedule,
  table: list[list[validate.Link]],
  waiting: dict[int, list[int]],
  ends: Rows,
) -> str:
  """Describes which ranks wait for one another."""
  wanted = {rank: result for result, ranks in waiting.items() for rank in ranks}
  makers = {
    result: rank
    for rank, row in enumerate(table)
    for _, results in row
    for result in results
  }
  rank, seen, waits = min(wanted), set(), []
  while rank not in seen:
    seen.add(rank)
    action = schedule.orders[rank][len(ends[rank])]
    result = wanted[rank]
    waits.append(
      f'rank {rank} cannot start {action} (its action {len(ends[rank])}) '
      f'before {validate.describe(schedule, result)} on rank {makers[result]}'
    )
    rank = makers[result]
  return f'deadlock: {"; ".join(waits)}'


def peak_live(schedule: Schedule) -> list[int]:
  """The most activations that each rank holds at a time.

  An activation is what one micro-batch saves at one stage for its backward. It
  lives from the start of its forward to the end of its full backward or, if
  that is split, of its weight half. While a forward and a backward overlap,
  both their activations live. The peak depends on the order of actions only.
  """
  peaks = []
  for order in schedule.orders:
    live = peak = 0
    for action in order:
      if action.forward is not None:
        live += 1
        peak = max(peak, live)
      if action.backward is not None and action.kind != actions.INPUT:
        live -= 1
    peaks.append(peak)
  return peaks
