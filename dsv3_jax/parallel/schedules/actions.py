"""Pipeline schedules: tasks, actions, and an order of actions on each rank.

A *stage* is one of the pieces into which the layers are split, numbered in the
order of the forward pass. A *task* is one micro-batch at one stage. A rank
holds one stage or several and runs its actions in a fixed order.

A schedule gives the order of actions; `simulate` gives their times. Planning
uses this module, so it does not import JAX.
"""

import dataclasses
import fractions
import functools

Number = int | float | fractions.Fraction  # a time

FORWARD = 'F'
BACKWARD = 'B'  # full: gradients of the input and of the weights
INPUT = 'I'  # the input half of a backward; the previous stage waits for it
WEIGHT = 'W'  # the weight half; no other action waits for it
OVERLAPPED = 'FB'  # a forward and a full backward of two stages, overlapped


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
  """One micro-batch at one stage."""

  stage: int
  microbatch: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Action:
  """One step of a rank, of one of the kinds above.

  F has a `forward` task, B, I and W a `backward` task, FB both.
  """

  kind: str
  forward: Task | None = None
  backward: Task | None = None

  def __str__(self) -> str:
    if self.kind == OVERLAPPED:
      return f'F{self.forward.microbatch}&B{self.backward.microbatch}'
    return f'{self.kind}{(self.forward or self.backward).microbatch}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The actions of each rank, in order.

  Attributes:
    kind: one of `make.KINDS`.
    microbatches: of all directions together, numbered from 0.
    homes: `homes[direction][stage]` is the rank that holds the stage for the
      micro-batches of that direction. With two directions the first half
      of the micro-batches goes in direction 0, the second half in direction 1.
    orders: `orders[rank]` are the rank's actions, first to last.
  """

  kind: str
  microbatches: int
  homes: tuple[tuple[int, ...], ...]
  orders: tuple[tuple[Action, ...], ...]

  @property
  def ranks(self) -> int:
    return len(self.orders)

  @property
  def stages(self) -> int:
    return len(self.homes[0])

  def direction(self, microbatch: int) -> int:
    """0 or, for the second half of the micro-batches under DualPipe, 1."""
    return microbatch * len(self.homes) // self.microbatches

  def held(self, rank: int) -> tuple[int, ...]:
    """The stages of a rank, by direction and not sorted."""
    return tuple(
      stage
      for home in self.homes
      for stage, stage_rank in enumerate(home)
      if stage_rank == rank
    )


# Cached: actions are immutable, and schedules repeat them often.
@functools.cache
def task(stage: int, microbatch: int) -> Task:
  return Task(stage=stage, microbatch=microbatch)


@functools.cache
def forward(stage: int, microbatch: int) -> Action:
  return Action(kind=FORWARD, forward=task(stage, microbatch))


@functools.cache
def backward(kind: str, stage: int, microbatch: int) -> Action:
  """An action of kind B, I or W."""
  return Action(kind=kind, backward=task(stage, microbatch))


@functools.cache
def overlapped(
  forward_stage: int,
  forward_microbatch: int,
  backward_stage: int,
  backward_microbatch: int,
) -> Action:
  """A forward at one stage overlapped with a full backward at another."""
  return Action(
    kind=OVERLAPPED,
    forward=task(forward_stage, forward_microbatch),
    backward=task(backward_stage, backward_microbatch),
  )
