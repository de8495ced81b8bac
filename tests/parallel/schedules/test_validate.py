"""Every way to spoil a legal schedule is noticed; the message says which."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax.parallel.schedules import actions, simulate, validate
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import ticks as tick_tables
from tests.parallel.schedules import oracle, tables


def make(kind, stages=4, microbatches=8, **more):
  return schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches, **more
  )


def spoilt(legal, rank, change):
  """The schedule with `change` made to the list of a rank's actions."""
  order = list(legal.orders[rank])
  change(order)
  orders = list(legal.orders)
  orders[rank] = tuple(order)
  return dataclasses.replace(legal, orders=tuple(orders))


def place(order, kind, nth=0):
  """Where the nth action of a kind stands."""
  return [i for i, action in enumerate(order) if action.kind == kind][nth]


def drop(kind, nth=0):
  return lambda order: order.pop(place(order, kind, nth))


def twice(kind, nth=0):
  return lambda order: order.append(order[place(order, kind, nth)])


def swap(first, second):
  """Exchanges the places of two actions, each a kind and a number."""

  def change(order):
    a, b = place(order, *first), place(order, *second)
    order[a], order[b] = order[b], order[a]

  return change


def put(kind, action, nth=0):
  def change(order):
    order[place(order, kind, nth)] = action

  return change


@pytest.mark.parametrize(
  ('kind', 'rank', 'change', 'message'),
  [
    # A micro-batch is missing.
    ('gpipe', 1, drop('F', 3), 'the forward of micro-batch 3 at stage 1'),
    ('1f1b', 2, drop('B', 5), 'the input gradient of micro-batch 5 at stage 2'),
    ('dualpipe', 0, drop('FB'), 'is missing'),
    ('dualpipev', 1, drop('F'), 'is missing'),
    ('interleaved', 0, drop('F', 15), 'micro-batch 7 at stage 2 is missing'),
    # A micro-batch comes twice.
    ('gpipe', 0, twice('F'), '0 at stage 0 is made twice: by rank 0'),
    ('1f1b', 3, twice('B', 2), 'input gradient of micro-batch 2 at stage 3'),
    ('dualpipe', 2, twice('FB'), 'is made twice'),
    ('zb1p', 1, twice('I'), 'ends with its queue not empty: W0 of stage 1'),
    # A weight half without its input half, or before it, or twice.
    ('zb1p', 0, drop('I', 2), 'rank 0 runs W2 of stage 0, but no I2 of that'),
    ('zb1p', 0, swap(('I', 4), ('W', 4)), 'runs W4 of stage 0, but no I4'),
    ('dualpipe', 1, drop('I'), 'runs W7 of stage 2, but no I7 of that stage'),
    ('dualpipev', 0, swap(('I', 0), ('W', 0)), 'runs W0 of stage 3, but no I0'),
    ('zb1p', 2, twice('W', 7), 'runs W7 of stage 2, but no I7'),
    ('1f1b', 2, put('B', actions.backward('W', 2, 0)), 'stage 2, but no I0'),
    # The queue is not empty at the end.
    ('zb1p', 3, drop('W', 7), 'rank 3 ends with its queue not empty: W7'),
    ('dualpipe', 3, drop('W', 2), 'rank 3 ends with its queue not empty: W7'),
    ('1f1b', 0, put('B', actions.backward('I', 0, 0)), 'not empty: W0 of'),
    # An action where it does not belong, or that is none.
    ('1f1b', 0, put('F', actions.forward(1, 0)), 'stage 1, which it does'),
    ('dualpipe', 0, put('F', actions.forward(3, 0)), 'does not hold'),
    ('gpipe', 0, put('F', actions.forward(0, 8)), 'which does not exist'),
    ('gpipe', 0, put('F', actions.forward(-1, 0)), 'which does not exist'),
    ('gpipe', 0, put('B', actions.Action(kind='B')), 'a malformed action'),
    (
      'gpipe', 0,
      put('B', actions.Action(kind='X', backward=actions.task(0, 0))),
      'a malformed action',
    ),
    (
      'dualpipe', 0,
      put('FB', actions.Action(kind='FB', forward=actions.task(0, 3))),
      'a malformed action',
    ),
    # Dependencies that no time can meet.
    (
      'gpipe', 3, swap(('F', 7), ('B', 0)),
      'deadlock: rank 0 cannot start B7 .*; rank 3 cannot start B7 .its action '
      '7. before the forward of micro-batch 7 at stage 3 on rank 3',
    ),
    ('1f1b', 3, swap(('F', 0), ('B', 0)), 'rank 3 cannot start B0'),
    ('zb1p', 2, swap(('F', 7), ('I', 7)), 'deadlock: .*rank 2 cannot start I7'),
    ('dualpipe', 0, swap(('F', 0), ('FB', 0)), 'deadlock'),
    # Rank 0 wants a gradient before it has sent what the gradient is of.
    (
      '1f1b', 0, swap(('F', 3), ('B', 1)),
      'deadlock: rank 0 cannot start B1 .*; rank 1 cannot start F3 .*rank 0',
    ),
  ],
)  # fmt: skip
def test_what_is_spoilt_is_named(kind, rank, change, message):
  legal = make(kind)
  simulate.simulate(legal, simulate.Times())
  bad = spoilt(legal, rank, change)
  for refuses in (
    lambda: simulate.simulate(bad, simulate.Times()),
    lambda: tick_tables.to_ticks(bad),
  ):
    with pytest.raises(ValueError, match=message):
      refuses()


@hypothesis.given(st.data())
def test_any_loss_or_repetition_is_noticed(data):
  legal = schedules.make_schedule(
    **data.draw(oracle.sizes(most_ranks=3, most_more=4))
  )
  rank = data.draw(st.integers(0, legal.ranks - 1))
  at = data.draw(st.integers(0, len(legal.orders[rank]) - 1))
  to = data.draw(st.integers(0, len(legal.orders[rank])))
  lost = spoilt(legal, rank, lambda order: order.pop(at))
  more = spoilt(legal, rank, lambda order: order.insert(to, order[at]))
  for bad in (lost, more):
    with pytest.raises(ValueError, match=r'missing|twice|queue'):
      validate.check_work(bad)


@hypothesis.given(st.data())
def test_an_exchange_is_refused_where_nobody_could_run_it(data):
  """Two actions of a rank change places."""
  legal = schedules.make_schedule(
    **data.draw(oracle.sizes(most_ranks=3, most_more=4))
  )
  rank = data.draw(st.integers(0, legal.ranks - 1))
  last = len(legal.orders[rank]) - 1
  a, b = (data.draw(st.integers(0, last)) for _ in 'ab')

  def exchange(order):
    order[a], order[b] = order[b], order[a]

  changed = spoilt(legal, rank, exchange)
  try:
    simulate.simulate(changed, simulate.Times())
    refused = False
  except ValueError:
    refused = True
  hypothesis.event(f'refused: {refused}')
  assert refused == (not oracle.runnable(changed))


@hypothesis.given(st.data())
def test_any_earlier_start_is_noticed(data):
  """In the earliest timeline nothing can start earlier."""
  legal = schedules.make_schedule(**data.draw(oracle.sizes(most_ranks=4)))
  times = simulate.Times(comm=data.draw(st.integers(0, 2)))
  timeline = simulate.simulate(legal, times)
  starts, ends = timeline.starts, timeline.ends
  tables.check_times(legal, starts, ends, times.comm)
  places = [
    (rank, i)
    for rank, row in enumerate(starts)
    for i, start in enumerate(row)
    if start > 0
  ]
  rank, i = data.draw(st.sampled_from(places))
  starts[rank][i] -= 1
  with pytest.raises(
    ValueError,
    match=rf'rank {rank} starts .* at {starts[rank][i]}, b(ut|efore)',
  ):
    tables.check_times(legal, starts, ends, times.comm)


def test_two_actions_at_once_are_noticed():
  legal = make('gpipe', 1, 2)
  with pytest.raises(ValueError, match='rank 0 starts F1 at 0, before 1, when'):
    tables.check_times(legal, [[0, 0, 2, 4]], [[1, 1, 4, 6]])


def test_an_arrival_that_is_missed_is_named():
  legal = make('gpipe', 2, 1)
  starts, ends = [[0, 6], [1, 2]], [[1, 8], [2, 4]]
  tables.check_times(legal, starts, ends)
  with pytest.raises(
    ValueError,
    match='rank 1 starts F0 at 1, but the forward of micro-batch 0 at stage 0 '
    'arrives at 2',
  ):
    tables.check_times(legal, starts, ends, comm=1)
