"""Figures of a schedule, and its table as text or as JSON."""

import dataclasses
import string
from typing import Any

from dsv3_jax.parallel.schedules import actions, simulate
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import ticks as tick_tables
from dsv3_jax.parallel.schedules.actions import Action, Schedule
from dsv3_jax.parallel.schedules.simulate import Timeline, Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedSchedule:
  """A schedule with its times without a common clock and in ticks."""

  schedule: Schedule
  formula: actions.Number | None
  timeline: Timeline
  table: tick_tables.TickTable
  ticks: Timeline


def simulate_clocks(schedule: Schedule, times: Times) -> SimulatedSchedule:
  """Simulates a schedule without a common clock and in ticks."""
  timeline = simulate.simulate(schedule, times)
  table = tick_tables.to_ticks(schedule)
  return SimulatedSchedule(
    schedule=schedule,
    formula=_formula(schedule, times),
    timeline=timeline,
    table=table,
    ticks=tick_tables.timeline(schedule, table, times),
  )


def _formula(schedule: Schedule, times: Times) -> actions.Number | None:
  """The bubble by formula; None where stages differ or sending takes time."""
  durations = {name: getattr(times, name) for name in ('f', 'b', 'w', 'fb')}
  if times.comm or any(isinstance(x, tuple) for x in durations.values()):
    return None
  halves = any(a.kind == actions.WEIGHT for a in schedule.orders[0])
  return schedules.closed_form_bubble(
    schedule.kind, ranks=schedule.ranks, split_backward=halves, **durations
  )


def as_json(simulated: SimulatedSchedule) -> dict[str, Any]:
  """What `dsv3 schedule --json` prints; times in the units of --f, --b, --w."""
  schedule, timeline, ticks = (
    simulated.schedule,
    simulated.timeline,
    simulated.ticks,
  )
  formula = simulated.formula
  return {
    'kind': schedule.kind,
    'stages': schedule.stages,
    'ranks': schedule.ranks,
    'microbatches': schedule.microbatches,
    'total': float(timeline.total),
    'bubble': float(timeline.bubble),
    'bubble_fraction': _fraction(timeline),
    'closed_form_bubble': None if formula is None else float(formula),
    'idle': [float(time) for time in timeline.idle],
    'peak_live_activations': simulate.peak_live(schedule),
    'parameter_copies': schedules.parameter_copies(schedule),
    'model_copies': len(schedule.homes),
    'lockstep': {  # in ticks; scripts read this key
      'ticks': len(simulated.table),
      'total': float(ticks.total),
      'bubble': float(ticks.bubble),
      'bubble_fraction': _fraction(ticks),
    },
    'table': _rows(simulated),
  }


def _fraction(timeline: Timeline) -> float:
  return float(timeline.bubble / timeline.total)


def _rows(simulated: SimulatedSchedule) -> list[dict[str, Any]]:
  """The actions, rank by rank in order, with the times of both clocks."""
  rows = []
  schedule, timeline = simulated.schedule, simulated.timeline
  for rank, order in enumerate(schedule.orders):
    ticks = [i for i, row in enumerate(simulated.table) if row[rank]]
    when = (ticks, timeline.starts[rank], timeline.ends[rank])
    for action, tick, start, end in zip(order, *when, strict=True):
      row = {'rank': rank, 'tick': tick, 'kind': action.kind}
      row |= {'start': float(start), 'end': float(end)}
      for name in ('forward', 'backward'):
        if (task := getattr(action, name)) is not None:
          row[name] = {
            'stage': task.stage,
            'microbatch': task.microbatch,
            'direction': schedule.direction(task.microbatch),
          }
      rows.append(row)
  return rows


def summary(simulated: SimulatedSchedule) -> str:
  """The figures in four lines."""
  schedule, timeline, ticks = (
    simulated.schedule,
    simulated.timeline,
    simulated.ticks,
  )
  formula = simulated.formula
  by_formula = '' if formula is None else f', by formula {float(formula):.6g}'
  peaks = simulate.peak_live(schedule)
  live = ' '.join(map(str, peaks if len(set(peaks)) > 1 else peaks[:1]))
  return '\n'.join(
    [
      f'{schedule.kind}: {schedule.stages} stages on {schedule.ranks} ranks, '
      f'{schedule.microbatches} micro-batches',
      f'total {float(timeline.total):.6g}, bubble '
      f'{float(timeline.bubble):.6g} ({_fraction(timeline):.1%}){by_formula}',
      f'live activations a rank at most {live}, parameters '
      f'{schedules.parameter_copies(schedule)[0]}x',
      f'in ticks: {len(simulated.table)}, total '
      f'{float(ticks.total):.6g}, bubble {_fraction(ticks):.1%}',
    ]
  )


def text_table(schedule: Schedule, table: tick_tables.TickTable) -> str:
  """A line a rank, a column a tick: F3, B3, I3, W3, F4&B1; a dot is idle.

  Where a rank has several stages of a direction, letters distinguish them: F3a
  is at its first stage, F3b at its second.
  """
  columns = [
    [_cell(schedule, rank, action) for rank, action in enumerate(tick)]
    for tick in table
  ]
  widths = [max(map(len, column)) for column in columns]
  lines = []
  for rank in range(schedule.ranks):
    cells = [
      column[rank].ljust(width)
      for column, width in zip(columns, widths, strict=True)
    ]
    lines.append(f'rank {rank:2} | {" ".join(cells)}'.rstrip())
  return '\n'.join(lines)


def _cell(schedule: Schedule, rank: int, action: Action | None) -> str:
  if action is None:
    return '.'
  held = schedule.held(rank)
  letters = string.ascii_lowercase if len(held) > len(schedule.homes) else ''
  labels = []
  for name in ('forward', 'backward'):
    if (task := getattr(action, name)) is not None:
      kind = {actions.OVERLAPPED: name[0].upper()}.get(action.kind, action.kind)
      chunk = held.index(task.stage)
      labels.append(f'{kind}{task.microbatch}{letters[chunk : chunk + 1]}')
  return '&'.join(labels)
