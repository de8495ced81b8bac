"""DualPipe and DualPipeV (TR 3.2.1; the released schedule's eight steps).

A rank runs two chunks. Under DualPipe micro-batches enter at both ends, and
each rank holds a stage for either direction. Under DualPipeV the pipeline is
folded at the last rank: all micro-batches enter at rank 0, and rank r holds
stages r and 2 ranks - 1 - r. Each half of DualPipe's ranks works like the ranks
of DualPipeV, with the middle as its fold. So both schedules are the same eight
loops with other counts.

A rank's *phase* 0 is one of its chunks, phase 1 the other. Under DualPipe phase
0 is the stage of the micro-batches that enter at the nearer end. Under
DualPipeV it is the stage before the fold.
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
  per_direction = microbatches // 2
  orders = []
  for r in range(ranks):
    from_end = min(r, ranks - 1 - r)
    rounds = per_direction - ranks + from_end + 1
    steps = eight_steps(ranks // 2, from_end, rounds)
    firsts = (0, per_direction) if r < ranks // 2 else (per_direction, 0)
    orders.append(_number(steps, (from_end, ranks - 1 - from_end), firsts))
  return tuple(orders)


def dualpipev(ranks: int, microbatches: int) -> Orders:
  """Rank r holds stages r and 2 ranks - 1 - r; microbatches >= 2 ranks."""
  orders = []
  for r in range(ranks):
    steps = eight_steps(ranks, r, microbatches - 2 * ranks + r + 1)
    orders.append(_number(steps, (r, 2 * ranks - 1 - r), (0, 0)))
  return tuple(orders)


def eight_steps(
  ranks_to_fold: int, from_end: int, rounds: int
) -> Iterator[str]:
  """A rank's actions, as kinds with phases: F0, B1, I0, W, F0&B1, F1&B0.

  Args:
    ranks_to_fold: number of ranks from an end to the fold, both included: half
      of DualPipe's ranks, all of DualPipeV's.
    from_end: this rank's distance from its end, 0 to ranks_to_fold - 1.
    rounds: how often step 4 is repeated.
  """
  from_fold = ranks_to_fold - 1 - from_end
  # Warm-up: the near direction, both, then the first gradients of the far one.
  for _ in range(2 * from_fold):  # step 1
    yield 'F0'
  for _ in range(from_end + 1):  # step 2
    yield 'F0'
    yield 'F1'
  for _ in range(from_fold):  # step 3
    yield 'I1'
    yield 'W'
    yield 'F1'
  # Steady state: each forward overlaps a backward of the other direction.
  for i in range(rounds):  # step 4
    if i == 0 and from_fold == 0:
      # Other actions wait for this F0. Overlapped with B1 it would end later.
      yield 'F0'
      yield 'B1'
    else:
      yield 'F0&B1'
    yield 'F1&B0'
  # Drain: the last forwards, the backwards left, and W where a rank would wait.
  for _ in range(from_fold):  # step 5
    yield 'B1'
    yield 'F1&B0'
  # Step 6 begins with full backwards. It splits those of its second half.
  first_split = (from_end + 1) // 2
  for i in range(from_end + 1):
    split = i > first_split or (i == first_split and from_end % 2 == 1)
    yield 'I1' if split else 'B1'
    yield 'I0' if i >= first_split else 'B0'
  for _ in range(from_fold):  # step 7
    yield 'W'
    yield 'I0'
  for _ in range(from_end + 1):  # step 8
    yield 'W'


def _number(
  steps: Iterable[str], stages: tuple[int, int], firsts: tuple[int, int]
) -> tuple[Action, ...]:
  """Gives each step its micro-batches, in ascending order for each chunk.

  W runs the oldest weight half in the queue.

  Args:
    stages: of phase 0 and 1.
    firsts: the first micro-batch of each phase.
  """
  next_forward, next_backward = list(firsts), list(firsts)
  queue: list[tuple[int, int]] = []
  order = []
  # Simulating many sizes spends most of its time in this loop. It therefore
  # calls no helpers.
  for step in steps:
    if step == 'W':
      order.append(actions.backward(actions.WEIGHT, *queue.pop(0)))
      continue
    phase = int(step[1])
    if step[0] == actions.FORWARD:
      forward = (stages[phase], next_forward[phase])
      next_forward[phase] += 1
      if len(step) == 2:
        order.append(actions.forward(*forward))
        continue
      phase = 1 - phase  # F0&B1, F1&B0: the backward is of the other phase
    backward = (stages[phase], next_backward[phase])
    next_backward[phase] += 1
    if len(step) > 2:
      order.append(actions.overlapped(*forward, *backward))
    else:
      order.append(actions.backward(step[0], *backward))
      if step[0] == actions.INPUT:
        queue.append(backward)
  return tuple(order)
