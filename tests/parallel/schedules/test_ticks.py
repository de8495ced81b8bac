"""Tables of ticks: by hand, by rule, and what a common clock costs."""

import fractions

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import simulate
from dsv3_jax.parallel.schedules import ticks as tick_tables
from tests.parallel.schedules import oracle, tables


def make(kind, stages, microbatches, **more):
  return schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches, **more
  )


def text(table):
  """Columns of a table as text, a string a rank."""
  return [
    ' '.join(str(action or '.') for action in row)
    for row in zip(*table, strict=True)
  ]


@pytest.mark.parametrize(
  ('sizes', 'rows'),
  [
    (
      ('1f1b', 2, 4),
      ['F0 F1 . B0 F2 B1 F3 B2 . B3', '. F0 B0 F1 B1 F2 B2 F3 B3 .'],
    ),
    (
      ('zb1p', 2, 2),
      ['F0 F1 . I0 W0 I1 W1', '. F0 I0 F1 I1 W0 W1'],
    ),
    (
      ('dualpipev', 2, 2),
      ['F0 F0 F1 B0 F1&B0 B1 I1 W1'],
    ),
  ],
)
def test_tables_written_by_hand(sizes, rows):
  assert text(tick_tables.to_ticks(make(*sizes))) == rows


@hypothesis.given(oracle.sizes(), st.booleans())
def test_a_table_holds_the_work_and_its_order(sizes, split):
  if sizes['kind'] in schedules.UNIDIRECTIONAL:
    sizes = sizes | {'split_backward': split}
  schedule = schedules.make_schedule(**sizes)
  table = tick_tables.to_ticks(schedule)
  assert any(table[0]) and any(table[-1])
  columns = [
    [(tick, row[rank]) for tick, row in enumerate(table) if row[rank]]
    for rank in range(schedule.ranks)
  ]
  orders = tuple(tuple(a for _, a in column) for column in columns)
  assert orders == schedule.orders
  starts = [[tick for tick, _ in column] for column in columns]
  ends = [[tick + 1 for tick in row] for row in starts]
  late = oracle.slack(schedule, starts, ends, 0)
  assert all(delay == 0 for row in late for delay in row)
  tables.check_table(schedule, table)


@hypothesis.given(st.data())
def test_a_spoilt_table_is_noticed(data):
  """An action moved to an idle place before what it needs, or off the table."""
  schedule = schedules.make_schedule(**data.draw(oracle.sizes(most_ranks=4)))
  table = [list(row) for row in tick_tables.to_ticks(schedule)]
  gaps = [
    (tick, rank)
    for tick, row in enumerate(table[1:], 1)
    for rank, action in enumerate(row)
    if action and not table[tick - 1][rank]
  ]
  freeze = lambda: tuple(map(tuple, table))
  if gaps:
    tick, rank = data.draw(st.sampled_from(gaps))
    table[tick - 1][rank], table[tick][rank] = table[tick][rank], None
    with pytest.raises(ValueError, match=f'rank {rank} starts .* arrives at'):
      tables.check_table(schedule, freeze())
    table[tick - 1][rank], table[tick][rank] = None, table[tick - 1][rank]
  tables.check_table(schedule, freeze())
  rank = data.draw(st.integers(0, schedule.ranks - 1))
  busy = [tick for tick, row in enumerate(table) if row[rank]]
  table[data.draw(st.sampled_from(busy))][rank] = None
  with pytest.raises(ValueError, match=r'missing|queue'):
    tables.check_table(schedule, freeze())


@hypothesis.given(st.data())
def test_each_tick_lasts_as_long_as_its_longest_action(data):
  schedule = schedules.make_schedule(**data.draw(oracle.sizes()))
  f, i, w = (data.draw(st.integers(1, 5)) for _ in 'fiw')
  times = simulate.Times(f=f, b=i + w, w=w, comm=data.draw(st.integers(0, 2)))
  table = tick_tables.to_ticks(schedule)
  lasts = {'F': f, 'B': i + w, 'I': i, 'W': w, 'FB': f + i + w}
  timeline = tick_tables.timeline(schedule, table, times)
  ticks = [max(lasts[a.kind] for a in row if a) for row in table]
  assert timeline.total == sum(ticks) + (len(table) - 1) * times.comm
  assert timeline.total >= simulate.simulate(schedule, times).total
  late = oracle.slack(schedule, timeline.starts, timeline.ends, times.comm)
  assert all(delay >= 0 for row in late for delay in row)


@pytest.mark.parametrize('ranks', [1, 2, 5, 8])
def test_halves_of_equal_length_lose_nothing(ranks):
  """Where every action takes one unit, ticks are the asynchronous clock."""
  schedule = make('zb1p', ranks, 2 * ranks)
  table = tick_tables.to_ticks(schedule)
  assert (
    tick_tables.timeline(schedule, table, simulate.Times()).bubble == ranks - 1
  )


def test_costs_of_the_common_clock():
  """Bubbles of 8 stages that were known before: 0.030 becomes 0.059."""
  schedule = make('dualpipe', 8, 64)
  free = simulate.simulate(schedule, simulate.Times())
  tied = tick_tables.timeline(
    schedule, tick_tables.to_ticks(schedule), simulate.Times()
  )
  assert round(free.bubble / free.total, 3) == 0.030
  assert round(tied.bubble / tied.total, 3) == 0.059
  shares = []
  for split in (False, True):
    schedule = make('1f1b', 8, 16, split_backward=split)
    tied = tick_tables.timeline(
      schedule, tick_tables.to_ticks(schedule), simulate.Times()
    )
    shares.append(fractions.Fraction(tied.bubble, tied.total))
  assert shares[1] < fractions.Fraction(1, 4) < shares[0]
