"""A schedule as arrays of numbers: the table that one SPMD program runs.

`compile_schedule` turns a schedule into int32 arrays. For every tick and rank
they say which branch to run, on which micro-batch, and in which slots of the
rank's buffers its operands are. A slot is reused once its value has been read.
Each buffer thus has as many slots as it holds values at a time. The arrays are
inputs of the compiled step, so a batch ramp changes them without recompiling.

A buffer has one more slot, the last, for arrivals that no stage reads.

Dims of the arrays: tick, rank or direction, field. P counts ranks.
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

# Fields of each tick and rank: the branch, then the micro-batch, direction and
# slots of its forward (f_) and its backward (b_). Slots: f_in, the activation
# that F reads; residuals, what F saves for the backward pass; b_grad, the
# gradient of the output, from the next stage or the head; b_carry, what I saves
# for W.
FIELDS = (
  'branch',
  'f_microbatch',
  'f_direction',
  'f_in',
  'f_residuals',
  'b_microbatch',
  'b_direction',
  'b_residuals',
  'b_grad',
  'b_carry',
)
# Fields of each tick and direction: the micro-batch whose forward (f) or
# backward (b) runs at the first or the last stage, for embedding and head.
VOCAB_FIELDS = ('first_f', 'last_f', 'first_b', 'last_b')
# The buffer for each payload of a `Transfer`.
BUFFERS = {'y': 'in', 'dx': 'grad'}


class Transfer(NamedTuple):
  """What goes from each rank to the one `hop` ranks on, every tick.

  payload: 'y' (activations) or 'dx' (their gradients). hop: +1, -1, or 0 from a
  rank to itself, at the fold of DualPipeV.
  """

  payload: str
  hop: int


class StagePass(NamedTuple):
  """One pass through one of the rank's stages.

  action_kind: 'F', 'B', or a half of B: 'I' or 'W'. chunk: which of the rank's
  stages, in the order of the forward pass. stage_kind: index into
  `PipelineProgram.kinds`.
  """

  action_kind: str
  chunk: int
  stage_kind: int


class TickBranch(NamedTuple):
  """What a rank runs in a tick, without operands; (None, None) is idle."""

  forward: StagePass | None
  backward: StagePass | None

  @property
  def overlapped(self) -> bool:
    """Whether it is a forward and a backward, which share the buffers."""
    return self.forward is not None and self.backward is not None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PipelineProgram:
  """A schedule as arrays.

  Attributes:
    kinds: the kinds of stages that occur; stages of one kind run the same code.
    branches: all that occur; branch 0 is idle.
    transfers: all that are used.
    slots: number of slots of each buffer.
    fields_tick_rank: `FIELDS`, then the slot for what arrives by each transfer,
      then the slot for the head's gradient of each direction.
    vocab_fields_tick_direction: `VOCAB_FIELDS`, -1 where no stage runs.
  """

  schedule: Schedule
  kinds: tuple
  branches: tuple[TickBranch, ...]
  transfers: tuple[Transfer, ...]
  slots: dict[str, int]
  fields_tick_rank: np.ndarray
  vocab_fields_tick_direction: np.ndarray


def compile_schedule(
  schedule: Schedule,
  kind_of: tuple[object, ...],
  known: tuple[TickBranch, ...] = (TickBranch(None, None),),
) -> PipelineProgram:
  """The arrays of a schedule.

  Args:
    kind_of: the kind of each stage, such as a `stage_compute.StageKind`.
    known: branches of an already compiled program; they keep their numbers.
  """
  kinds = tuple(dict.fromkeys(kind_of))
  numbers = [kinds.index(kind) for kind in kind_of]
  events = _Events(schedule, tick_tables.to_ticks(schedule))
  branches = list(known)
  shape = (events.ticks, schedule.ranks, len(FIELDS))
  fields = np.zeros(shape, np.int32)
  transfers = _transfers(schedule)
  slots = _Slots(events, transfers)
  for tick, rank, action in events.all():
    row = fields[tick, rank]
    branch = _branch(events, action, numbers)
    if branch not in branches:
      branches.append(branch)
    row[FIELDS.index('branch')] = branches.index(branch)
    for name, value in slots.operands(action).items():
      row[FIELDS.index(name)] = value
  arrivals = slots.arrivals()
  return PipelineProgram(
    schedule=schedule,
    kinds=kinds,
    branches=tuple(branches),
    transfers=transfers,
    slots=slots.counts,
    fields_tick_rank=np.concatenate([fields, arrivals], axis=-1),
    vocab_fields_tick_direction=events.vocab_fields(),
  )


def _branch(
  events: '_Events', action: Action, numbers: list[int]
) -> TickBranch:
  def stage_pass(action_kind, task):
    if task is None:
      return None
    return StagePass(action_kind, events.chunk(task), numbers[task.stage])

  overlapped = action.kind == actions.OVERLAPPED
  return TickBranch(
    stage_pass(actions.FORWARD, action.forward),
    stage_pass(
      actions.BACKWARD if overlapped else action.kind, action.backward
    ),
  )


@functools.cache
def chunks(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
  """The stages of each rank, ascending.

  Ascending also under DualPipe, so that both halves of its ranks run the same
  branches.
  """
  return tuple(
    tuple(sorted(schedule.held(rank))) for rank in range(schedule.ranks)
  )


class _Events:
  """When each task's forward, backward (or input half) and weight half run."""

  def __init__(self, schedule: Schedule, table: tick_tables.TickTable):
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

  def vocab_fields(self) -> np.ndarray:
    """See `VOCAB_FIELDS`."""
    directions = len(self.schedule.homes)
    fields = np.full((self.ticks, directions, len(VOCAB_FIELDS)), -1, np.int32)
    last = self.schedule.stages - 1
    for name, when in (('f', self.forward), ('b', self.backward)):
      for task, tick in when.items():
        direction = self.schedule.direction(task.microbatch)
        if task.stage == 0:
          fields[tick, direction, VOCAB_FIELDS.index(f'first_{name}')] = (
            task.microbatch
          )
        if task.stage == last:
          fields[tick, direction, VOCAB_FIELDS.index(f'last_{name}')] = (
            task.microbatch
          )
    return fields


def _transfers(schedule: Schedule) -> tuple[Transfer, ...]:
  """Transfers between the ranks of neighbouring stages, both ways."""
  transfers = []
  for home in schedule.homes:
    for here, there in itertools.pairwise(home):
      hop = _hop(here, there, schedule.ranks)
      transfers += [Transfer('y', hop), Transfer('dx', -hop)]
  return tuple(dict.fromkeys(transfers))


def _hop(here: int, there: int, ranks: int) -> int:
  """From the last rank to the first is one hop of a ring."""
  return (there - here + 1) % ranks - 1 if ranks > 2 else there - here


class _Slots:
  """The slot of each value in its buffer, from the ticks in which it lives."""

  def __init__(self, events: _Events, transfers: tuple[Transfer, ...]):
    self._events, self._transfers = events, transfers
    last = events.schedule.stages - 1
    lives = {}  # buffer -> rank -> [(begin, end, task)]

    def live(buffer, task, begin, end):
      at = lives.setdefault(buffer, {}).setdefault(events.home(task), [])
      at.append((begin, end, task))

    for task, tick in events.forward.items():
      backward = events.backward[task]
      # In a tick the backward runs first, so a forward can reuse its slot.
      live('residuals', task, tick, backward)
      if task.stage < last:
        after = actions.task(task.stage + 1, task.microbatch)
        live('in', after, tick, events.forward[after])
        live('grad', task, events.backward[after], backward)
      else:
        live('head', task, tick, backward)
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
    """Fields of an action, without its branch."""
    events, fields = self._events, {}
    direction = events.schedule.direction
    if (task := action.forward) is not None:
      first = task.stage == 0
      fields |= {
        'f_microbatch': task.microbatch,
        'f_direction': direction(task.microbatch),
        'f_in': 0 if first else self._slot['in', task],
        'f_residuals': self._slot['residuals', task],
      }
    if (task := action.backward) is not None:
      fields |= {
        'b_microbatch': task.microbatch,
        'b_direction': direction(task.microbatch),
      }
      if action.kind != actions.WEIGHT:
        last = task.stage == events.schedule.stages - 1
        fields['b_residuals'] = self._slot['residuals', task]
        fields['b_grad'] = self._slot['head' if last else 'grad', task]
      if action.kind in (actions.INPUT, actions.WEIGHT):
        fields['b_carry'] = self._slot['carry', task]
    return fields

  def arrivals(self) -> np.ndarray:
    """[ticks, P, transfers + directions]: slots of what arrives."""
    events, schedule = self._events, self._events.schedule
    directions, last = len(schedule.homes), schedule.stages - 1
    width = len(self._transfers) + directions
    slots = np.zeros((events.ticks, schedule.ranks, width), np.int32)
    for at, transfer in enumerate(self._transfers):
      slots[..., at] = self.counts.get(BUFFERS[transfer.payload], 0)
    slots[..., len(self._transfers) :] = self.counts['head']
    for task, tick in events.forward.items():
      here = events.home(task)
      if task.stage == last:
        direction = schedule.direction(task.microbatch)
        slot = self._slot['head', task]
        slots[tick, here, len(self._transfers) + direction] = slot
        continue
      after = actions.task(task.stage + 1, task.microbatch)
      transfer = self._transfer('y', here, events.home(after))
      slots[tick, events.home(after), transfer] = self._slot['in', after]
    for task, tick in events.backward.items():
      if task.stage:
        before = actions.task(task.stage - 1, task.microbatch)
        transfer = self._transfer('dx', events.home(task), events.home(before))
        slots[tick, events.home(before), transfer] = self._slot['grad', before]
    return slots

  def _transfer(self, payload: str, here: int, there: int) -> int:
    hop = _hop(here, there, self._events.schedule.ranks)
    return self._transfers.index(Transfer(payload, hop))


def _colour(spans: list[tuple[int, int, actions.Task]]) -> dict:
  """A slot for each span [begin, end); overlapping spans get different ones."""
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
