"""Checks of schedules and cuts that only tests make."""

import jax

from dsv3_jax.parallel.pipeline import split_backward
from dsv3_jax.parallel.schedules import ticks as tick_tables
from dsv3_jax.parallel.schedules import validate


def check_table(schedule, table, latency=1):
  """Raises ValueError unless the table is a legal one of the schedule's work.

  It may keep other orders than the schedule's.
  """
  played, ticks = tick_tables.orders(schedule, table)
  validate.check_work(played)
  ends = [[tick + 1 for tick in row] for row in ticks]
  validate.check_times(played, ticks, ends, latency - 1)


def stage_costs(cuts, costs):
  """What each stage of a cut of equal layers costs."""
  total = [costs.layer * (end - first) for first, end in cuts]
  total[0] += costs.embedding
  total[-1] += costs.head + costs.mtp
  return tuple(total)


def split_chain(functions, params, consts):
  """The parts of each stage of a chain, for arguments of these shapes."""
  x, found = (), []
  for function, w, const in zip(functions, params, consts, strict=True):
    found.append(split_backward.split_stage(function, w, x, const))
    x, _ = jax.eval_shape(function, w, x, const)
  return found
