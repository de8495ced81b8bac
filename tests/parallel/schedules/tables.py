"""Checks of schedules and of layers split into stages, for tests only."""

from collections.abc import Sequence

import jax

from dsv3_jax.parallel.pipeline import split_backward
from dsv3_jax.parallel.schedules import actions, validate
from dsv3_jax.parallel.schedules import ticks as tick_tables


def check_table(schedule, table):
  """Raises ValueError unless the table is a legal one of the schedule's work.

  The table's orders may differ from the schedule's.
  """
  ordered, ticks = tick_tables.orders(schedule, table)
  validate.check_work(ordered)
  ends = [[tick + 1 for tick in row] for row in ticks]
  check_times(ordered, ticks, ends)


def check_times(
  schedule: actions.Schedule,
  starts: Sequence[Sequence],
  ends: Sequence[Sequence],
  comm: actions.Number = 0,
) -> None:
  """No action starts before its rank is free and what it needs has arrived.

  Args:
    starts: of every action, [rank][place in the order].
    ends: likewise.
    comm: from the end of an action to when another rank has its results.

  Raises:
    ValueError: some action starts too early; says which and why.
  """
  table = validate.links(schedule)
  maker, ready_at = {}, {}
  for rank, row in enumerate(table):
    for (_, results), end in zip(row, ends[rank], strict=True):
      for result in results:
        maker[result], ready_at[result] = rank, end
  for rank, (order, row) in enumerate(zip(schedule.orders, table, strict=True)):
    free = 0
    for action, (need, _), start, end in zip(
      order, row, starts[rank], ends[rank], strict=True
    ):
      if start < free:
        raise ValueError(
          f'rank {rank} starts {action} at {start}, before {free}, when the '
          'action before it ends'
        )
      free = end
      for result in need:
        arrival = ready_at[result] + (comm if maker[result] != rank else 0)
        if start < arrival:
          raise ValueError(
            f'rank {rank} starts {action} at {start}, but '
            f'{validate.describe(schedule, result)} arrives at {arrival}'
          )


def stage_costs(layer_ranges, costs):
  """What each stage costs; a layer costs 1."""
  total = [end - first for first, end in layer_ranges]
  total[0] += costs.embedding
  total[-1] += costs.head + costs.mtp
  return tuple(total)


def split_chain(functions, params, consts):
  """The parts of each stage of a chain, for arguments of these shapes."""
  x, split_stages = (), []
  for function, w, const in zip(functions, params, consts, strict=True):
    split_stages.append(split_backward.split_stage(function, w, x, const))
    x, _ = jax.eval_shape(function, w, x, const)
  return split_stages
