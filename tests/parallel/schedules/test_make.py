"""Orders against tables written by hand; formulas at every legal size."""

import re

import hypothesis
import pytest

from dsv3_jax import errors
from dsv3_jax.parallel.schedules import dualpipe, simulate
from dsv3_jax.parallel.schedules import make as schedules
from tests.parallel.schedules import oracle

_MOST_RANKS, _MOST_MICROBATCHES = 16, 64


def legal(kind, ranks, microbatches):
  """The report's and the released schedule's rules."""
  return {
    'gpipe': True,
    '1f1b': True,
    'interleaved': microbatches % ranks == 0,
    'zb1p': microbatches >= ranks,
    'dualpipe': ranks % 2 == microbatches % 2 == 0
    and microbatches >= 2 * ranks,
    'dualpipev': microbatches >= 2 * ranks,
  }[kind]


def formulas(kind, r, m, v):
  """Bubble, most live activations of each rank, all work of a rank.

  With f = i = w = 1, so b = 2 and fb = 3.
  """
  ranks = range(r)
  return {
    'gpipe': ((r - 1) * (1 + 2), [m for _ in ranks], 3 * m),
    '1f1b': ((r - 1) * (1 + 2), [min(m, r - rank) for rank in ranks], 3 * m),
    'interleaved': (
      (r - 1) * (1 + 2),
      [min(m * v, r * v + r - 1 - 2 * rank) for rank in ranks],
      3 * m * v,
    ),
    'zb1p': ((r - 1) * (1 + 2 - 2), [r for _ in ranks], 3 * m),
    'dualpipe': ((r // 2 - 1) * (3 + 2 - 3), [r + 1 for _ in ranks], 3 * m),
    'dualpipev': (
      (r - 1) * (3 + 2 - 3),
      [2 * r + 1 for _ in ranks],
      3 * m * 2,
    ),
  }[kind]


@pytest.mark.parametrize(
  ('kind', 'chunks', 'expected_sizes'),
  [
    pytest.param('gpipe', 1, 1024, marks=pytest.mark.nightly),
    pytest.param('1f1b', 1, 1024, marks=pytest.mark.nightly),
    ('interleaved', 2, 211),
    ('interleaved', 3, 211),
    ('interleaved', 4, 211),
    ('zb1p', 1, 904),
    ('dualpipe', 1, 192),
    pytest.param('dualpipev', 2, 768, marks=pytest.mark.nightly),
  ],
)
def test_formulas_hold_exactly_at_every_legal_size(
  kind, chunks, expected_sizes
):
  seen = 0
  for ranks in range(1, _MOST_RANKS + 1):
    for microbatches in range(1, _MOST_MICROBATCHES + 1):
      if not legal(kind, ranks, microbatches):
        continue
      seen += 1
      schedule = schedules.make_schedule(
        kind,
        stages=ranks * chunks,
        microbatches=microbatches,
        chunks=chunks if kind == 'interleaved' else None,
      )
      size = (kind, ranks, microbatches)
      assert schedule.ranks == ranks, size
      timeline = simulate.simulate(schedule, simulate.Times())
      bubble, live, work = formulas(kind, ranks, microbatches, chunks)
      assert timeline.idle == [bubble] * ranks, size
      assert timeline.total == work + bubble, size
      assert simulate.peak_live(schedule) == live, size
      assert schedules.closed_form_bubble(kind, ranks=ranks) == bubble, size
  assert seen == expected_sizes


@pytest.mark.parametrize('kind', schedules.KINDS)
def test_every_other_size_is_refused_and_the_nearest_are_legal(kind):
  chunks = {'interleaved': 2, 'dualpipev': 2}.get(kind, 1)
  refused = 0
  for ranks in range(1, 9):
    if kind == 'dualpipe' and ranks % 2:
      continue  # stages: below
    for microbatches in range(-1, 33):
      sizes = {'kind': kind, 'stages': ranks * chunks}
      if microbatches > 0 and legal(kind, ranks, microbatches):
        schedules.check_sizes(**sizes, microbatches=microbatches)
        continue
      refused += 1
      with pytest.raises(
        errors.InputError, match=f'microbatches={microbatches} must be'
      ) as error:
        schedules.make_schedule(**sizes, microbatches=microbatches)
      near = re.search('under .*: (.*) (is|are) the nearest', str(error.value))
      named = [int(word) for word in near.group(1).split(' and ')]
      assert all(legal(kind, ranks, size) for size in named)
      between = range(min(*named, microbatches), max(*named, microbatches) + 1)
      assert not [
        size
        for size in between
        if size > 0 and size not in named and legal(kind, ranks, size)
      ]
  assert refused >= 16


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (('2f2b', 4, 8), "kind='2f2b' must be one of: gpipe, 1f1b"),
    (
      ('dualpipe', 8, 12),
      'microbatches=12 must be even and >= 2 * stages = 16 under '
      'dualpipe: 16 is the nearest',
    ),
    (
      ('dualpipe', 8, 19),
      'even and >= 2 * stages = 16 under dualpipe: 18 and 20 are the nearest',
    ),
    (
      ('dualpipe', 7, 16),
      'stages=7 must be a multiple of 2 under dualpipe: 6 and 8 are',
    ),
    (('dualpipev', 5, 16), 'multiple of 2 under dualpipev: 4 and 6 are'),
    (('gpipe', 0, 1), 'stages=0 must be >= 1 under gpipe: 1 is'),
    (('interleaved', 8, 8, 3), 'a multiple of 3 under interleaved: 6 and 9'),
    (('interleaved', 8, 9), 'multiple of stages / chunks = 4 under interl'),
    (('interleaved', 8, 8, 1), 'chunks=1 must be >= 2'),
    (('1f1b', 8, 8, 2), 'chunks=2 is for interleaved, not for 1f1b'),
    (('zb1p', 8, 7), 'microbatches=7 must be >= stages = 8 under zb1p: 8 is'),
  ],
)
def test_what_is_said(sizes, message):
  kind, stages, microbatches, *chunks = sizes
  with pytest.raises(errors.InputError, match=re.escape(message)):
    schedules.check_sizes(kind, stages, microbatches, *chunks)


def make(kind, stages, microbatches, **more):
  return schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches, **more
  )


@pytest.mark.parametrize(
  ('sizes', 'rows'),
  [
    (('gpipe', 2, 3), ['F0 F1 F2 B2 B1 B0', 'F0 F1 F2 B2 B1 B0']),
    (
      ('1f1b', 2, 4),
      ['F0 F1 B0 F2 B1 F3 B2 B3', 'F0 B0 F1 B1 F2 B2 F3 B3'],
    ),
    (('1f1b', 3, 1), ['F0 B0', 'F0 B0', 'F0 B0']),
    (
      ('interleaved', 4, 4),
      [
        'F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a',
        'F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a',
      ],
    ),
    (
      ('zb1p', 3, 4),
      [
        'F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3',
        'F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3',
        'F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3',
      ],
    ),
    (
      # The eight steps; counts on the first two ranks 2 1 1 1 1 1 1 1 and
      # 0 2 0 2 0 2 0 2. The last two ranks mirror them.
      ('dualpipe', 4, 8),
      [
        'F0 F1 F2 F4 I4 W4 F5 F3&B5 F6&B0 B6 F7&B1 B7 I2 W2 I3 W3',
        'F0 F4 F1 F5 F2 B4 F6&B0 F3&B5 F7&B1 B6 B2 I7 I3 W7 W3',
        'F4 F0 F5 F1 F6 B0 F2&B4 F7&B1 F3&B5 B2 B6 I3 I7 W3 W7',
        'F4 F5 F6 F0 I0 W0 F1 F7&B1 F2&B4 B2 F3&B5 B3 I6 W6 I7 W7',
      ],
    ),
    (
      ('dualpipev', 4, 4),
      [
        'F0a F1a F2a F0b I0b W0b F1b F3a&B1b F2b&B0a B2b F3b&B1a B3b I2a '
        'W2a I3a W3a',
        'F0a F0b F1a F1b F2a B0b F2b&B0a F3a&B1b F3b&B1a B2b B2a I3b I3a '
        'W3b W3a',
      ],
    ),
  ],
)
def test_tables_written_by_hand(sizes, rows):
  schedule = make(*sizes)
  letters = sizes[0] in ('interleaved', 'dualpipev')
  assert [oracle.brief(order, letters) for order in schedule.orders] == rows


def test_each_of_the_eight_steps_has_its_count():
  """Ranks 0 to 3 of DualPipe with 8 ranks and 20 micro-batches, H = 4.

  Steps 1 to 8 on rank hr: 2(3 - hr) F0; hr + 1 times F0 F1; 3 - hr times I W F;
  3 + hr times two pairs; 3 - hr times B and a pair; hr + 1 times two backwards;
  3 - hr times W I; hr + 1 times W.
  """
  for near, expected in enumerate(
    [
      ['F0'] * 6
      + ['F0', 'F1']
      + ['I1', 'W', 'F1'] * 3
      + ['F0&B1', 'F1&B0'] * 3
      + ['B1', 'F1&B0'] * 3
      + ['B1', 'I0']
      + ['W', 'I0'] * 3
      + ['W'],
      ['F0'] * 4
      + ['F0', 'F1'] * 2
      + ['I1', 'W', 'F1'] * 2
      + ['F0&B1', 'F1&B0'] * 4
      + ['B1', 'F1&B0'] * 2
      + ['B1', 'B0', 'I1', 'I0']
      + ['W', 'I0'] * 2
      + ['W'] * 2,
      ['F0'] * 2
      + ['F0', 'F1'] * 3
      + ['I1', 'W', 'F1']
      + ['F0&B1', 'F1&B0'] * 5
      + ['B1', 'F1&B0']
      + ['B1', 'B0', 'B1', 'I0', 'I1', 'I0']
      + ['W', 'I0']
      + ['W'] * 3,
      ['F0', 'F1'] * 4
      + ['F0', 'B1', 'F1&B0']
      + ['F0&B1', 'F1&B0'] * 5
      + ['B1', 'B0', 'B1', 'B0', 'I1', 'I0', 'I1', 'I0']
      + ['W'] * 4,
    ]
  ):
    assert list(dualpipe.eight_steps(4, near, 10 - 8 + near + 1)) == expected


def test_pairs_of_the_report():
  """97 to 103 overlapped pairs a rank, 16 ranks and 120 micro-batches."""
  counts = [
    sum(action.kind == 'FB' for action in order)
    for order in make('dualpipe', 16, 120).orders
  ]
  assert counts[:8] == counts[:7:-1]
  assert counts[:8] == [97, 98, 99, 100, 101, 102, 103, 103]


def test_where_stages_are():
  """Ranks hold what the report says, micro-batches enter where they should."""
  both = make('dualpipe', 4, 8)
  assert [both.held(rank) for rank in range(4)] == [
    (0, 3), (1, 2), (2, 1), (3, 0),
  ]  # fmt: skip
  assert [both.direction(m) for m in range(8)] == [0] * 4 + [1] * 4
  first = [order[0].forward for order in both.orders]
  assert [(t.stage, t.microbatch) for t in first] == [
    (0, 0), (1, 0), (1, 4), (0, 4),
  ]  # fmt: skip
  turned = make('dualpipev', 8, 8)
  assert [turned.held(r) for r in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
  chunked = make('interleaved', 6, 4, chunks=3)
  assert [chunked.held(rank) for rank in range(2)] == [(0, 2, 4), (1, 3, 5)]


@pytest.mark.parametrize(
  ('kind', 'copies'),
  [('gpipe', 1), ('1f1b', 1), ('interleaved', 1), ('zb1p', 1), ('dualpipe', 2),
   ('dualpipev', 2)],
)  # fmt: skip
def test_parameters_of_table_2(kind, copies):
  schedule = make(kind, 8, 16)
  assert schedules.parameter_copies(schedule) == [copies] * schedule.ranks


@hypothesis.given(oracle.sizes())
def test_orders_are_permutations_of_the_work(sizes):
  schedule = schedules.make_schedule(**sizes)
  done = [
    event
    for order in schedule.orders
    for a in order
    for event in oracle.events(a)
  ]
  assert sorted(done) == oracle.work(schedule)
  for rank, order in enumerate(schedule.orders):
    stages = {s for action in order for _, s, _ in oracle.events(action)}
    assert stages == set(schedule.held(rank))


@hypothesis.given(oracle.sizes(kinds=schedules.UNIDIRECTIONAL))
def test_splitting_keeps_the_order_and_the_memory(sizes):
  whole = schedules.make_schedule(**sizes)
  split = schedules.make_schedule(**sizes, split_backward=True)
  for before, after in zip(whole.orders, split.orders, strict=True):
    kinds = ''.join(action.kind for action in after)
    assert kinds.replace('IW', 'B') == ''.join(a.kind for a in before)
    flat = lambda order: [e for a in order for e in oracle.events(a)]
    assert flat(before) == flat(after)
  assert simulate.peak_live(whole) == simulate.peak_live(split)
  timeline = simulate.simulate(split, simulate.Times())
  assert timeline.bubble == (split.ranks - 1) * (1 + 2 - 1)


@pytest.mark.parametrize('kind', ['zb1p', 'dualpipe', 'dualpipev'])
def test_splitting_what_is_split_is_refused(kind):
  with pytest.raises(errors.InputError, match=f'{kind} splits its backwards'):
    make(kind, 4, 8, split_backward=True)
