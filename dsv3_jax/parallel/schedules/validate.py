"""Checks a schedule, and lists what each action waits for (`links`).

`check_work` checks that every task runs once, on a rank that holds its stage.
`simulate.run` detects deadlocks.
"""

from dsv3_jax.parallel.schedules import actions
from dsv3_jax.parallel.schedules.actions import Action, Schedule

# Results are numbered. With n micro-batches, the forward of micro-batch m at
# stage s is s * n + m; the gradient of its input has stages * n more. A link
# holds the results that an action needs and those that it gives at its end.
Link = tuple[tuple[int, ...], tuple[int, ...]]

# Which tasks an action of each kind has: (forward, backward).
_SHAPES = {
  actions.FORWARD: (True, False),
  actions.BACKWARD: (False, True),
  actions.INPUT: (False, True),
  actions.WEIGHT: (False, True),
  actions.OVERLAPPED: (True, True),
}


def links(schedule: Schedule) -> list[list[Link]]:
  """The link of every action of every rank."""
  width, last = schedule.microbatches, schedule.stages - 1
  gradients = schedule.stages * width
  rows = []
  for order in schedule.orders:
    row = []
    # Simulating many sizes runs this loop millions of times. It therefore
    # calls no helpers.
    for action in order:
      need, results = (), ()
      if (task := action.forward) is not None:
        key = task.stage * width + task.microbatch
        results = (key,)
        if task.stage:
          need = (key - width,)
      if (task := action.backward) is not None:
        key = task.stage * width + task.microbatch
        if action.kind == actions.WEIGHT:
          need = (gradients + key,)
        else:
          results = (*results, gradients + key)
          need = (*need, key)
          if task.stage < last:
            need = (*need, gradients + key + width)
      row.append((need, results))
    rows.append(row)
  return rows


def describe(schedule: Schedule, result: int) -> str:
  """A result in words."""
  size = schedule.stages * schedule.microbatches
  stage, microbatch = divmod(result % size, schedule.microbatches)
  name = 'forward' if result < size else 'input gradient'
  return f'the {name} of micro-batch {microbatch} at stage {stage}'


def check_work(schedule: Schedule) -> list[list[Link]]:
  """Checks that every task has one forward and one backward or both halves.

  Returns:
    The schedule's `links`.

  Raises:
    ValueError: an action is malformed or runs where its stage is not held; a
      result is made twice or never; a weight half has no input half before it;
      weight gradients are left in a queue.
  """
  for rank, order in enumerate(schedule.orders):
    _check_places(schedule, rank, order)
    _check_queue(rank, order)
  makers: dict[int, int] = {}
  table = links(schedule)
  for rank, row in enumerate(table):
    for _, results in row:
      for result in results:
        if result in makers:
          raise ValueError(
            f'{describe(schedule, result)} is made twice: by rank '
            f'{makers[result]} and by rank {rank}'
          )
        makers[result] = rank
  for result in range(2 * schedule.stages * schedule.microbatches):
    if result not in makers:
      raise ValueError(f'{describe(schedule, result)} is missing')
  return table


def _check_places(
  schedule: Schedule, rank: int, order: tuple[Action, ...]
) -> None:
  homes, total = schedule.homes, schedule.microbatches
  for action in order:
    forward, backward = action.forward, action.backward
    if _SHAPES.get(action.kind) != (forward is not None, backward is not None):
      raise ValueError(f'rank {rank} has a malformed action: {action!r}')
    for task in (forward, backward):
      if task is None:
        continue
      stage, microbatch = task.stage, task.microbatch
      if not (0 <= microbatch < total and 0 <= stage < len(homes[0])):
        raise ValueError(f'rank {rank} runs {task}, which does not exist')
      if homes[microbatch * len(homes) // total][stage] != rank:
        raise ValueError(
          f'rank {rank} runs micro-batch {microbatch} at stage {stage}, '
          'which it does not hold'
        )


def _check_queue(rank: int, order: tuple[Action, ...]) -> None:
  """I queues a weight gradient; W takes it from the queue."""
  queue = {}
  for action in order:
    if action.kind == actions.INPUT:
      queue[action.backward.stage, action.backward.microbatch] = None
    elif action.kind == actions.WEIGHT:
      stage, microbatch = action.backward.stage, action.backward.microbatch
      if (stage, microbatch) not in queue:
        raise ValueError(
          f'rank {rank} runs W{microbatch} of stage {stage}, but no '
          f'I{microbatch} of that stage has queued it'
        )
      del queue[stage, microbatch]
  if queue:
    left = ', '.join(f'W{m} of stage {stage}' for stage, m in queue)
    raise ValueError(f'rank {rank} ends with its queue not empty: {left}')
