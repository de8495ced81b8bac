"""What a pipeline schedule is made of: tasks, actions, an order on each rank.

A *stage* is one of the pieces that the layers are cut into, numbered in the
order of the forward pass. A *task* is one micro-batch at one stage. A rank
holds one stage or several and works through its actions in a fixed order.

A schedule says who does what in which order, not when: `simulate` gives times.
No array lives here, so that planning needs no JAX.
"""

import dataclasses
import fractions
import functools

Number = int | float | fractions.Fraction  # a time

FORWARD = 'F'
BACKWARD = 'B'  # full: gradients of the input and of the weights
INPUT = 'I'  # the half of the backward pass that the previous stage waits for
WEIGHT = 'W'  # the other half, which nobody waits for
OVERLAPPED = 'FB'  # a forward and a full backward of two stages, overlapped


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
  """One micro-batch at one stage."""

  stage: int
  microbatch: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Action:
  """One thing that a rank does, of one of the kinds above.

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
  """Who does what, in which order.

  Attributes:
    kind: one of `schedule.KINDS`.
    microbatches: of all directions together, numbered from 0.
    homes: `homes[direction][stage]` is the rank that holds the stage for the
      micro-batches of that direction. With two directions the second half of
      the micro-batches goes the other way.
    orders: `orders[rank]` is what the rank does, first to last.
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
    """The stages of a rank; a stage's place in it is its chunk there."""
    return tuple(
      stage
      for home in self.homes
      for stage, there in enumerate(home)
      if there == rank
    )


# Actions are immutable and few: made once, since schedules repeat them often.
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
