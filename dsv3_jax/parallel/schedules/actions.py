"""Pipeline schedules: tasks, actions, and an order of actions on each rank.

A *stage* is one of the pieces into which the layers are split, numbered in the
order of the forward pass. A *task* is one micro-batch at one stage. A rank
holds one stage or several and runs its actions in a fixed order.

A schedule gives the order of actions, not their times: `simulate` does.
Planning uses this module, so it does not import JAX.
"""

import dataclasses
import fractions
import functools

Number = int | float | fractions.Fraction  # a time

FORWARD = 'F'
BACKWARD = 'B'  # full: gradients of the input and of the weights
INPUT = 'I'  # the input half of a backward, which the previous stage needs
WEIGHT = 'W'  # the weight half, which no other action needs
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
      micro-batches of that direction. With two directions the second half of
      the micro-batches goes in the other.
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
    """The stages of a rank; a stage's index here is its chunk."""
    return tuple(
      stage
      for home in self.homes
      for stage, there in enumerate(home)
      if there == rank
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
  ahead: int, ahead_microbatch: int, back: int, back_microbatch: int
) -> Action:
  """A forward at stage `ahead` overlapped with a backward at stage `back`."""
  return Action(
    kind=OVERLAPPED,
    forward=task(ahead, ahead_microbatch),
    backward=task(back, back_microbatch),
  )
