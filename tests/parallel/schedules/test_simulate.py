"""Times against hand-made timelines, the report's numbers, and bounds."""

import fractions
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax import errors
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import simulate
from tests.parallel.schedules import oracle

Fraction = fractions.Fraction
_TIME = st.fractions(Fraction(1, 8), 6, max_denominator=8)


def make(kind, stages, microbatches, **more):
  return schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches, **more
  )


def uniform(data):
  """Times of equal stages."""
  f, i, w = (data.draw(_TIME) for _ in 'fiw')
  return {'f': f, 'b': i + w, 'w': w}


def uneven(data, stages):
  """Each stage has its own times; pairs are f + b, or anything."""
  per_stage = st.lists(_TIME, min_size=stages, max_size=stages).map(tuple)
  f, i, w = (data.draw(per_stage) for _ in 'fiw')
  return simulate.Times(
    f=f,
    b=tuple(x + y for x, y in zip(i, w, strict=True)),
    w=w,
    fb=data.draw(per_stage | st.none()),
    comm=data.draw(_TIME),
  )


def test_1f1b_on_two_ranks_by_hand():
  timeline = simulate.simulate(make('1f1b', 2, 4), simulate.Times())
  # F0 F1 B0 F2 B1 F3 B2 B3 and F0 B0 F1 B1 F2 B2 F3 B3
  assert timeline.starts == [
    [0, 1, 4, 6, 7, 9, 10, 13],
    [1, 2, 4, 5, 7, 8, 10, 11],
  ]
  assert timeline.ends == [
    [1, 2, 6, 7, 9, 10, 12, 15],
    [2, 4, 5, 7, 8, 10, 11, 13],
  ]
  assert (timeline.total, timeline.idle, timeline.bubble) == (15, [3, 3], 3)


def test_uneven_stages_and_sending_by_hand():
  """One micro-batch down and up: 1 + 0.5 + 2 + 5 + 0.5 + 3."""
  times = simulate.Times(f=(1, 2), b=(3, 5), comm=0.5)
  timeline = simulate.simulate(make('gpipe', 2, 1), times)
  assert timeline.starts == [[0, 9], [1.5, 3.5]]
  assert timeline.total == 12
  assert timeline.idle == [8, 5]
  assert timeline.bubble == 8


def test_the_turn_of_a_v_sends_nothing():
  """One rank, two stages: all is there at once, whatever sending takes."""
  slow = simulate.Times(comm=100)
  assert simulate.simulate(make('dualpipev', 2, 2), slow).bubble == 0


def test_halves_take_what_is_left_of_the_backward():
  times = simulate.Times(f=2, b=5, w=1)
  timeline = simulate.simulate(make('zb1p', 1, 1), times)  # F I W
  assert timeline.ends == [[2, 6, 7]]


@pytest.mark.parametrize(('kind', 'ranks'), [('dualpipe', 8), ('dualpipev', 4)])
@pytest.mark.parametrize('microbatches', [16, 20, 40])
def test_unequal_times_of_the_replay(kind, ranks, microbatches):
  """F 1.13, input half 1.99, W 0.48: 12.76, where the formula says 13.89."""
  f, b, w = (
    Fraction('1.13'),
    Fraction('1.99') + Fraction('0.48'),
    Fraction('0.48'),
  )
  times = simulate.Times(f=f, b=b, w=w)
  timeline = simulate.simulate(make(kind, 8, microbatches), times)
  assert timeline.idle == [Fraction('12.76')] * ranks
  formula = schedules.closed_form_bubble(kind, ranks=ranks, f=f, b=b, w=w)
  assert formula == Fraction('13.89')


@pytest.mark.parametrize(
  ('stages', 'microbatches'), [(4, 8), (8, 20), (8, 40), (16, 64)]
)
@pytest.mark.parametrize('fb', [Fraction(5, 2), 2, 3])
def test_shorter_pairs(stages, microbatches, fb):
  """The formula is the middle ranks' bubble; towards the ends it is smaller."""
  times = simulate.Times(fb=fb)
  timeline = simulate.simulate(make('dualpipe', stages, microbatches), times)
  half = stages // 2
  formula = (half - 1) * (fb + 2 - 3)
  # Ranks 0, 1, ... have n, n + 1, ... pairs, the middle n + half - 2.
  fewer = [max(half - 2 - near, 0) for near in range(half)]
  near_idle = [formula - (3 - fb) * count for count in fewer]
  assert timeline.idle == near_idle + near_idle[::-1]
  assert timeline.bubble == formula


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data(), oracle.sizes())
def test_where_formulas_are_exact(data, sizes):
  """For equal stages and free sending; a pair takes max(f, b) to f + b."""
  given = uniform(data)
  f, b, w = given['f'], given['b'], given['w']
  fb = data.draw(st.sampled_from([None, max(f, b), (f + b + max(f, b)) / 2]))
  schedule = schedules.make_schedule(**sizes)
  bubble = simulate.simulate(schedule, simulate.Times(fb=fb, **given)).bubble
  kind, ranks, half = sizes['kind'], schedule.ranks, b - w
  formula = schedules.closed_form_bubble(kind, ranks=ranks, fb=fb, **given)
  if ranks == 1 or (kind == 'dualpipe' and ranks == 2):
    assert bubble == formula == 0
  elif kind in schedules.UNIDIRECTIONAL:
    assert bubble == formula == (ranks - 1) * (f + b)
  elif kind == 'zb1p':
    assert (bubble == formula) == (w <= f and w <= half)
    assert bubble >= formula
  elif half >= w:
    assert (bubble > formula) == (f > half)
    assert (bubble < formula) == (f < half)
  elif f >= half:
    assert bubble > formula


@hypothesis.given(st.data(), oracle.sizes(kinds=schedules.UNIDIRECTIONAL))
def test_split_backwards_and_their_formula(data, sizes):
  given = uniform(data)
  schedule = schedules.make_schedule(**sizes, split_backward=True)
  bubble = simulate.simulate(schedule, simulate.Times(**given)).bubble
  formula = schedules.closed_form_bubble(
    sizes['kind'], ranks=schedule.ranks, split_backward=True, **given
  )
  assert formula == (schedule.ranks - 1) * (
    given['f'] + given['b'] - given['w']
  )
  if sizes['kind'] == 'interleaved' and given['w'] > given['f']:
    assert bubble >= formula
  else:
    assert bubble == formula


@hypothesis.given(st.data())
def test_every_action_starts_when_it_can(data):
  """Uneven stages, slow sending: none too early, none later than needed."""
  schedule = schedules.make_schedule(**data.draw(oracle.sizes()))
  times = uneven(data, schedule.stages)
  timeline = simulate.simulate(schedule, times)
  late = oracle.slack(schedule, timeline.starts, timeline.ends, times.comm)
  assert all(delay == 0 for row in late for delay in row)


@hypothesis.given(st.data())
def test_total_is_at_least_the_critical_path(data):
  schedule = schedules.make_schedule(**data.draw(oracle.sizes()))
  times = uneven(data, schedule.stages)
  timeline = simulate.simulate(schedule, times)
  total = timeline.total
  for microbatch in {0, schedule.microbatches - 1}:
    home = schedule.homes[schedule.direction(microbatch)]
    hops = sum(a != b for a, b in itertools.pairwise(home))
    path = 2 * hops * times.comm
    if times.fb is None:
      path += sum(times.f) + sum(times.b) - sum(times.w)
    assert total >= path
  for rank, idle in enumerate(timeline.idle):
    spent = [
      end - start
      for start, end in zip(
        timeline.starts[rank], timeline.ends[rank], strict=True
      )
    ]
    assert idle == total - sum(spent) >= 0
    if times.fb is None:
      held = [(schedule.direction(m), m) for m in range(schedule.microbatches)]
      assert sum(spent) == sum(
        times.f[stage] + times.b[stage]
        for way, _ in held
        for stage in range(schedule.stages)
        if schedule.homes[way][stage] == rank
      )


@hypothesis.given(oracle.sizes())
def test_live_activations_counted_in_time(sizes):
  """Against a count over the clock: born at a start, dead at an end."""
  schedule = schedules.make_schedule(**sizes)
  timeline = simulate.simulate(schedule, simulate.Times())
  peaks = []
  for rank, order in enumerate(schedule.orders):
    born, dead = {}, {}
    for action, start, end in zip(
      order, timeline.starts[rank], timeline.ends[rank], strict=True
    ):
      for what, stage, microbatch in oracle.events(action):
        if what == 'F':
          born[stage, microbatch] = start
        if what == 'W':
          dead[stage, microbatch] = end
    peaks.append(
      max(
        sum(born[task] <= now < dead[task] for task in born)
        for now in born.values()
      )
    )
  assert simulate.peak_live(schedule) == peaks


@pytest.mark.parametrize(
  ('times', 'message'),
  [
    ({'f': -1}, 'f=-1 must be > 0 and finite'),
    ({'f': 0}, 'f=0 must be > 0'),
    ({'b': math.inf}, 'b=inf must be > 0 and finite'),
    ({'w': math.nan}, 'w=nan must be >= 0'),
    ({'comm': -0.5}, 'comm=-0.5 must be >= 0'),
    ({'fb': 0}, 'fb=0 must be > 0'),
    ({'w': 3}, r'w=3 must be <= b=2 \(stage 0\)'),
    ({'w': (1, 1, 3)}, r'w=3 must be <= b=2 \(stage 2\)'),
    ({'f': (1, 2)}, 'f has 2 values: it must be one, or one for each of the 3'),
    ({'fb': (1, 2, 3, 4)}, 'fb has 4 values'),
  ],
)
def test_times_that_are_none(times, message):
  with pytest.raises(errors.InputError, match=message):
    simulate.simulate(make('gpipe', 3, 2), simulate.Times(**times))


def test_a_formula_of_no_kind():
  with pytest.raises(errors.InputError, match=r"kind='x' must be one of"):
    schedules.closed_form_bubble('x', ranks=2)
