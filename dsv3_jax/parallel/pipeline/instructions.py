"""A schedule in numbers: the table that one SPMD program runs.

`compile_schedule` turns a schedule into int32 arrays: for every tick and rank
which branch to run, on which chunk and micro-batch, and in which slots of the
rank's buffers its operands are. Slots are given out so that each buffer has as
many as are ever in use together. The arrays are inputs of the compiled step: a
batch ramp changes them and compiles nothing anew.

A buffer has one slot more, the last: what nobody wants is written there.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsv3_jax.parallel.schedules import actions
from dsv3_jax.parallel.schedules import ticks as tick_tables
from dsv3_jax.parallel.schedules.actions import Action, Schedule

# Of each tick and rank. in: activation that F reads. kept: what F leaves to the
# backward pass. grad: the output's gradient, of the next stage or of the head.
# carry: what I leaves to W. head: where the head puts its gradient.
FIELDS = (
  'branch',
  'f_microbatch',
  'f_direction',
  'f_in',
  'f_kept',
  'b_microbatch',
  'b_direction',
  'b_kept',
  'b_grad',
  'b_carry',
)
# Of each tick and direction: the micro-batch whose first or last stage runs.
GLOBALS = ('first_f', 'last_f', 'first_b', 'last_b')


class Lane(NamedTuple):
  """A way from rank to rank: 'y' (activations) or 'dx', +1, -1 or 0 ranks on.

  0 is the turn of a V: to the rank itself.
  """

  what: str
  hop: int


class Half(NamedTuple):
  """One pass through one of the rank's stages.

  part: 'F', 'B', 'I' or 'W'. chunk: which of the rank's stages, in the order of
  the forward pass. kind: index of `Program.kinds`.
  """

  part: str
  chunk: int
  kind: int


class Branch(NamedTuple):
  """What a rank does in a tick, up to numbers; (None, None) is idle."""

  forward: Half | None
  backward: Half | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
  """A schedule as arrays.

  kinds: of stages that differ in what they run, as given. branches: all that
  occur; branch 0 is idle. lanes: ways that are used. slots: of each buffer.
  fields_TRf: see `FIELDS`, then the slot for what arrives by each lane, then
  the slot for the head's gradient of each direction. globals_Tdg: see
  `GLOBALS`, -1 where none.
  """

  schedule: Schedule
  kinds: tuple
  branches: tuple[Branch, ...]
  lanes: tuple[Lane, ...]
  slots: dict[str, int]
  fields_TRf: np.ndarray
  globals_Tdg: np.ndarray


def compile_schedule(
  schedule: Schedule,
  kind_of: tuple[object, ...],
  known: tuple[Branch, ...] = (Branch(None, None),),
) -> Program:
  """The arrays of a schedule.

  Args:
    kind_of: for each stage what tells its program from that of others.
    known: branches to be numbered first: those of a compiled program.
  """
  kinds = tuple(dict.fromkeys(kind_of))
  numbers = [kinds.index(kind) for kind in kind_of]
  events = _Events(schedule, tick_tables.to_ticks(schedule))
  branches = list(known)
  shape = (events.ticks, schedule.ranks, len(FIELDS))
  fields = np.zeros(shape, np.int32)
  lanes = _lanes(schedule)
  slots = _Slots(events, lanes)
  for tick, rank, action in events.all():
    row = fields[tick, rank]
    branch = _branch(events, action, numbers)
    if branch not in branches:
      branches.append(branch)
    row[FIELDS.index('branch')] = branches.index(branch)
    for name, value in slots.operands(action).items():
      row[FIELDS.index(name)] = value
  arrivals = slots.arrivals()
  return Program(
    schedule=schedule,
    kinds=kinds,
    branches=tuple(branches),
    lanes=lanes,
    slots=slots.counts,
    fields_TRf=np.concatenate([fields, arrivals], axis=-1),
    globals_Tdg=events.globals(),
  )


def _branch(events: '_Events', action: Action, numbers: list[int]) -> Branch:
  def half(part, task):
    if task is None:
      return None
    return Half(part, events.chunk(task), numbers[task.stage])

  paired = action.kind == actions.PAIR
  return Branch(
    half(actions.FORWARD, action.forward),
    half(actions.BACKWARD if paired else action.kind, action.backward),
  )


@functools.cache
def chunks(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
  """The stages of each rank, ascending.

  So that both halves of DualPipe's ranks run the same branches.
  """
  return tuple(
    tuple(sorted(schedule.held(rank))) for rank in range(schedule.ranks)
  )


class _Events:
  """When each task's forward, backward (or input half) and weight half run."""

  def __init__(self, schedule: Schedule, table: tick_tables.Table):
    self.schedule, self.table, self.ticks = schedule, table, len(table)
    self.forward, self.backward, self.weight = {}, {}, {}
    for tick, _, action in self.all():
      if action.forward is not None:
        self.forward[action.forward] = tick
      if action.kind == actions.WEIGHT:
        self.weight[action.backward] = tick
      elif action.backward is not None:
        self.backward[action.backward] = tick

  def all(self) -> Iterable[tuple[int, int, Action]]:
    for tick, row in enumerate(self.table):
      for rank, action in enumerate(row):
        if action is not None:
          yield tick, rank, action

  def home(self, task: actions.Task) -> int:
    direction = self.schedule.direction(task.microbatch)
    return self.schedule.homes[direction][task.stage]

  def chunk(self, task: actions.Task) -> int:
    """The task's stage among those that its rank holds."""
    return chunks(self.schedule)[self.home(task)].index(task.stage)

  def globals(self) -> np.ndarray:
    """See `GLOBALS`."""
    ways = len(self.schedule.homes)
    found = np.full((self.ticks, ways, len(GLOBALS)), -1, np.int32)
    last = self.schedule.stages - 1
    for name, when in (('f', self.forward), ('b', self.backward)):
      for task, tick in when.items():
        way = self.schedule.direction(task.microbatch)
        if task.stage == 0:
          found[tick, way, GLOBALS.index(f'first_{name}')] = task.microbatch
        if task.stage == last:
          found[tick, way, GLOBALS.index(f'last_{name}')] = task.microbatch
    return found


def _lanes(schedule: Schedule) -> tuple[Lane, ...]:
  """Ways between the homes of neighbouring stages, forward and back."""
  found, ranks = [], schedule.ranks
  for home in schedule.homes:
    for here, there in itertools.pairwise(home):
      # From the last rank to the first is one hop of a ring.
      hop = (there - here + 1) % ranks - 1 if ranks > 2 else there - here
      found += [Lane('y', hop), Lane('dx', -hop)]
  return tuple(dict.fromkeys(found))


class _Slots:
  """Which slot of which buffer each value is in, from when to when."""

  def __init__(self, events: _Events, lanes: tuple[Lane, ...]):
    self._events, self._lanes = events, lanes
    last = events.schedule.stages - 1
    lives = {}  # buffer -> rank -> [(begin, end, task)]

    def live(buffer, task, begin, end):
      at = lives.setdefault(buffer, {}).setdefault(events.home(task), [])
      at.append((begin, end, task))

    for task, tick in events.forward.items():
      back = events.backward[task]
      live('kept', task, tick, back)  # backward halves run first
      if task.stage < last:
        after = actions.task(task.stage + 1, task.microbatch)
        live('in', after, tick, events.forward[after])
        live('grad', task, events.backward[after], back)
      else:
        live('head', task, tick, back)
    for task, tick in events.weight.items():
      live('carry', task, events.backward[task], tick + 1)
    self.counts, self._slot = {}, {}
    for buffer, ranks in lives.items():
      count = 0
      for spans in ranks.values():
        placed = _colour(spans)
        count = max(count, 1 + max(placed.values()))
        self._slot |= {(buffer, task): at for task, at in placed.items()}
      self.counts[buffer] = count

  def operands(self, action: Action) -> dict[str, int]:
    """Fields of an action but its branch."""
    events, found = self._events, {}
    way = events.schedule.direction
    if (task := action.forward) is not None:
      first = task.stage == 0
      found |= {
        'f_microbatch': task.microbatch,
        'f_direction': way(task.microbatch),
        'f_in': 0 if first else self._slot['in', task],
        'f_kept': self._slot['kept', task],
      }
    if (task := action.backward) is not None:
      found |= {
        'b_microbatch': task.microbatch,
        'b_direction': way(task.microbatch),
      }
      if action.kind != actions.WEIGHT:
        last = task.stage == events.schedule.stages - 1
        found['b_kept'] = self._slot['kept', task]
        found['b_grad'] = self._slot['head' if last else 'grad', task]
      if action.kind in (actions.INPUT, actions.WEIGHT):
        found['b_carry'] = self._slot['carry', task]
    return found

  def arrivals(self) -> np.ndarray:
    """[T, R, lanes + directions]: where what arrives at a tick's end goes."""
    events, schedule = self._events, self._events.schedule
    ways, last = len(schedule.homes), schedule.stages - 1
    width = len(self._lanes) + ways
    found = np.zeros((events.ticks, schedule.ranks, width), np.int32)
    for at, lane in enumerate(self._lanes):
      buffer = {'y': 'in', 'dx': 'grad'}[lane.what]
      found[..., at] = self.counts.get(buffer, 0)
    found[..., len(self._lanes) :] = self.counts['head']
    for task, tick in events.forward.items():
      here = events.home(task)
      if task.stage == last:
        way = schedule.direction(task.microbatch)
        slot = self._slot['head', task]
        found[tick, here, len(self._lanes) + way] = slot
        continue
      after = actions.task(task.stage + 1, task.microbatch)
      lane = self._lane('y', here, events.home(after))
      found[tick, events.home(after), lane] = self._slot['in', after]
    for task, tick in events.backward.items():
      if task.stage:
        before = actions.task(task.stage - 1, task.microbatch)
        lane = self._lane('dx', events.home(task), events.home(before))
        found[tick, events.home(before), lane] = self._slot['grad', before]
    return found

  def _lane(self, what: str, here: int, there: int) -> int:
    ranks = self._events.schedule.ranks
    hop = (there - here + 1) % ranks - 1 if ranks > 2 else there - here
    return self._lanes.index(Lane(what, hop))


def _colour(spans: list[tuple[int, int, actions.Task]]) -> dict:
  """A slot for each span [begin, end); those that overlap have different."""
  ends: list[int] = []
  placed = {}
  for begin, end, task in sorted(spans, key=lambda span: span[:2]):
    free = [slot for slot, until in enumerate(ends) if until <= begin]
    slot = free[0] if free else len(ends)
    if slot == len(ends):
      ends.append(0)
    ends[slot] = end
    placed[task] = slot
  return placed
