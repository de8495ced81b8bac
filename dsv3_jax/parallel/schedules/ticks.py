"""A schedule in ticks: one action a rank a tick, for one SPMD program.

A loop over ticks runs such a table on all ranks at once. A result is sent when
its tick ends and can be used in the next tick. A tick lasts as long as its
longest action.
"""

import dataclasses

from dsv3_jax.parallel.schedules import simulate, validate
from dsv3_jax.parallel.schedules.actions import Action, Schedule

TickTable = tuple[tuple[Action | None, ...], ...]  # [tick][rank]; None is idle


def to_ticks(schedule: Schedule) -> TickTable:
  """The table in which every action runs as early as its order allows.

  Raises:
    ValueError: the schedule is not legal.
  """
  links = validate.check_work(schedule)
  ones = [[1] * len(order) for order in schedule.orders]
  ticks = simulate.run(schedule, links, ones, comm=0)
  table: list[list[Action | None]] = [
    [None] * schedule.ranks for _ in range(ticks.total)
  ]
  for rank, (order, starts) in enumerate(
    zip(schedule.orders, ticks.starts, strict=True)
  ):
    for action, tick in zip(order, starts, strict=True):
      table[tick][rank] = action
  return tuple(map(tuple, table))


def timeline(
  schedule: Schedule, table: TickTable, times: simulate.Times
) -> simulate.Timeline:
  """When the table's actions run if each tick lasts as long as its longest one.

  `times.comm` passes after every tick but the last.
  """
  ordered, ticks = orders(schedule, table)
  durations = times.durations(ordered)
  longest = [0] * len(table)
  for row, lengths in zip(ticks, durations, strict=True):
    for tick, length in zip(row, lengths, strict=True):
      longest[tick] = max(longest[tick], length)
  begins = [0]
  for length in longest:
    begins.append(begins[-1] + length + times.comm)
  starts = [[begins[tick] for tick in row] for row in ticks]
  ends = [
    [start + length for start, length in zip(*rows, strict=True)]
    for rows in zip(starts, durations, strict=True)
  ]
  return simulate.Timeline(starts=starts, ends=ends)


def orders(
  schedule: Schedule, table: TickTable
) -> tuple[Schedule, list[list[int]]]:
  """The schedule with the table's orders, and the tick of each action."""
  placed = [
    [(tick, row[rank]) for tick, row in enumerate(table) if row[rank]]
    for rank in range(schedule.ranks)
  ]
  orders = tuple(tuple(action for _, action in row) for row in placed)
  ticks = [[tick for tick, _ in row] for row in placed]
  return dataclasses.replace(schedule, orders=orders), ticks
