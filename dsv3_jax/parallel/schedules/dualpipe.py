"""DualPipe and DualPipeV (TR 3.2.1; the released schedule's eight steps).

A rank runs two chunks. Under DualPipe micro-batches enter at both ends, and
each rank holds a stage for either direction. Under DualPipeV all enter at rank
0, go to the last rank and turn there, so that rank r holds stages r and
2 ranks - 1 - r. On each rank both are the same eight loops with other counts.

*Phase* 0 is the chunk that a micro-batch reaches first on a rank: that of the
nearer end's direction under DualPipe, that of the way down under DualPipeV.
"""

from collections.abc import Iterable, Iterator

from dsv3_jax.parallel.schedules import actions
from dsv3_jax.parallel.schedules.actions import Action

Orders = tuple[tuple[Action, ...], ...]


def dualpipe(ranks: int, microbatches: int) -> Orders:
  """Rank r holds stage r of direction 0 and ranks - 1 - r of direction 1.

  Args:
    ranks: even, as many as stages.
    microbatches: of both directions; even and >= 2 ranks.
  """
  half = microbatches // 2
  orders = []
  for r in range(ranks):
    near = min(r, ranks - 1 - r)
    steps = eight_steps(ranks // 2, near, half - ranks + near + 1)
    starts = (0, half) if r < ranks // 2 else (half, 0)
    orders.append(_number(steps, (near, ranks - 1 - near), starts))
  return tuple(orders)


def dualpipev(ranks: int, microbatches: int) -> Orders:
  """Rank r holds stages r and 2 ranks - 1 - r; microbatches >= 2 ranks."""
  orders = []
  for r in range(ranks):
    steps = eight_steps(ranks, r, microbatches - 2 * ranks + r + 1)
    orders.append(_number(steps, (r, 2 * ranks - 1 - r), (0, 0)))
  return tuple(orders)


def eight_steps(depth: int, near: int, pairs: int) -> Iterator[str]:
  """A rank's actions, as kinds with phases: F0, B1, I0, W, F0&B1, F1&B0.

  Args:
    depth: ranks from an end to the turn (the middle under DualPipe).
    near: this rank's distance from its end, 0 to depth - 1.
    pairs: rounds of step 4.
  """
  to_turn = depth - near - 1
  for _ in range(2 * to_turn):  # step 1
    yield 'F0'
  for _ in range(near + 1):  # step 2
    yield 'F0'
    yield 'F1'
  for _ in range(to_turn):  # step 3
    yield 'I1'
    yield 'W'
    yield 'F1'
  for i in range(pairs):  # step 4
    if i == 0 and to_turn == 0:  # not overlapped: others wait for F0
      yield 'F0'
      yield 'B1'
    else:
      yield 'F0&B1'
    yield 'F1&B0'
  for _ in range(to_turn):  # step 5
    yield 'B1'
    yield 'F1&B0'
  for i in range(near + 1):  # step 6: input halves from the middle on
    half = (near + 1) // 2
    yield 'I1' if i > half or (i == half and near % 2 == 1) else 'B1'
    yield 'I0' if i >= half else 'B0'
  for _ in range(to_turn):  # step 7
    yield 'W'
    yield 'I0'
  for _ in range(near + 1):  # step 8
    yield 'W'


def _number(
  steps: Iterable[str], stages: tuple[int, int], starts: tuple[int, int]
) -> tuple[Action, ...]:
  """Gives each step its micro-batches, in ascending order for each chunk.

  W runs the oldest weight half in the queue.

  Args:
    stages: of phase 0 and 1.
    starts: the first micro-batch of each.
  """
  ahead, back = list(starts), list(starts)
  queue: list[tuple[int, int]] = []
  order = []
  for step in steps:  # no calls: a sweep spends most of its time here
    if step == 'W':
      order.append(actions.backward(actions.WEIGHT, *queue.pop(0)))
      continue
    phase = int(step[1])
    if step[0] == actions.FORWARD:
      first = (stages[phase], ahead[phase])
      ahead[phase] += 1
      if len(step) == 2:
        order.append(actions.forward(*first))
        continue
      phase = 1 - phase
    second = (stages[phase], back[phase])
    back[phase] += 1
    if len(step) > 2:
      order.append(actions.overlapped(*first, *second))
    else:
      order.append(actions.backward(step[0], *second))
      if step[0] == actions.INPUT:
        queue.append(second)
  return tuple(order)
