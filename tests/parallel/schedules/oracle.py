"""What a schedule has to do, said again without the code under test.

Events are ('F' | 'I' | 'W', stage, micro-batch); a full backward is I and W.
"""

import hypothesis.strategies as st

from dsv3_jax.parallel.schedules import make as schedules


def events(action):
  """The events that an action brings about."""
  happening = []
  if action.forward is not None:
    happening.append(('F', action.forward.stage, action.forward.microbatch))
  if action.backward is not None:
    halves = {'I': 'I', 'W': 'W'}.get(action.kind, 'IW')
    task = action.backward
    happening += [(half, task.stage, task.microbatch) for half in halves]
  return happening


def before(event, stages):
  """The events that one event comes after."""
  what, stage, microbatch = event
  if what == 'F':
    return [('F', stage - 1, microbatch)] if stage else []
  if what == 'W':
    return [('I', stage, microbatch)]
  earlier = [('F', stage, microbatch)]
  if stage < stages - 1:
    earlier.append(('I', stage + 1, microbatch))
  return earlier


def work(schedule):
  """Every event that a step consists of."""
  return sorted(
    (what, stage, microbatch)
    for what in 'FIW'
    for stage in range(schedule.stages)
    for microbatch in range(schedule.microbatches)
  )


def slack(schedule, starts, ends, comm):
  """How much later than needed each action starts, [rank][place].

  Negative: before its rank is free or what it needs has come.
  """
  happened = {}
  for rank, order in enumerate(schedule.orders):
    for action, end in zip(order, ends[rank], strict=True):
      for event in events(action):
        happened[event] = rank, end
  rows = []
  for rank, order in enumerate(schedule.orders):
    free, row = 0, []
    for place, action in enumerate(order):
      mine, ready = events(action), free
      for event in mine:
        for earlier in before(event, schedule.stages):
          if earlier not in mine:
            there, end = happened[earlier]
            ready = max(ready, end + (comm if there != rank else 0))
      row.append(starts[rank][place] - ready)
      free = ends[rank][place]
    rows.append(row)
  return rows


def runnable(schedule):
  """Whether all actions can be done, each rank keeping its order."""
  left = [list(order) for order in schedule.orders]
  done = set()
  moved = True
  while moved:
    moved = False
    for order in left:
      if order:
        mine = events(order[0])
        wanted = {e for event in mine for e in before(event, schedule.stages)}
        if wanted <= done.union(mine):
          done.update(mine)
          order.pop(0)
          moved = True
  return not any(left)


def brief(order, several=False):
  """An order as text, such as 'F0 F1a&B2b'; letters if there are `several`."""
  stages = sorted({stage for action in order for _, stage, _ in events(action)})
  cells = []
  for action in order:
    parts = []
    for kind, task in (('F', action.forward), ('B', action.backward)):
      if task is not None:
        kind = action.kind if len(action.kind) == 1 else kind
        letter = 'abcd'[stages.index(task.stage)] if several else ''
        parts.append(f'{kind}{task.microbatch}{letter}')
    cells.append('&'.join(parts))
  return ' '.join(cells)


@st.composite
def sizes(draw, kinds=schedules.KINDS, most_ranks=6, most_more=8):
  """Arguments of `make.make_schedule`, legal ones."""
  kind = draw(st.sampled_from(kinds))
  ranks = draw(st.integers(1, most_ranks))
  more = draw(st.integers(0, most_more))
  if kind == 'dualpipe':
    stages, microbatches = 2 * ranks, 4 * ranks + 2 * more
  elif kind == 'dualpipev':
    stages, microbatches = 2 * ranks, 2 * ranks + more
  elif kind == 'interleaved':
    chunks = draw(st.integers(2, 4))
    sizes = {'stages': ranks * chunks, 'chunks': chunks}
    return {'kind': kind, 'microbatches': ranks * (1 + more % 3)} | sizes
  elif kind == 'zb1p':
    stages, microbatches = ranks, ranks + more
  else:
    stages, microbatches = ranks, 1 + more
  return {'kind': kind, 'stages': stages, 'microbatches': microbatches}
