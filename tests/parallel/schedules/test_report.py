"""What is said and drawn about a schedule."""

import collections
import fractions
import pathlib
import re
import subprocess
import sys

import pytest

from dsv3_jax.parallel.schedules import layer_partition, plot, report, simulate
from dsv3_jax.parallel.schedules import make as schedules
from tests.parallel.schedules import tables

_ROOT = pathlib.Path(__file__).resolve().parents[3]


def played(kind, stages, microbatches, times=None, **more):
  schedule = schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches, **more
  )
  return report.simulate_clocks(schedule, times or simulate.Times())


def test_text_of_a_table():
  simulated = played('1f1b', 2, 4)
  assert report.text_table(simulated.schedule, simulated.table) == (
    'rank  0 | F0 F1 .  B0 F2 B1 F3 B2 .  B3\n'
    'rank  1 | .  F0 B0 F1 B1 F2 B2 F3 B3 .'
  )
  simulated = played('dualpipev', 2, 2)  # letters: the stages of a rank
  assert report.text_table(simulated.schedule, simulated.table) == (
    'rank  0 | F0a F0b F1a B0b F1b&B0a B1b I1a W1a'
  )
  simulated = played(
    'dualpipe', 2, 4
  )  # none: micro-batches differ by direction
  assert report.text_table(simulated.schedule, simulated.table).splitlines()[
    0
  ] == ('rank  0 | F0 F2 F1 B2 F3&B0 B3 I1 W1')


def test_summary():
  simulated = report.summary(played('1f1b', 4, 8))
  assert simulated.splitlines() == [
    '1f1b: 4 stages on 4 ranks, 8 micro-batches',
    'total 33, bubble 9 (27.3%), by formula 9',
    'live activations a rank at most 4 3 2 1, parameters 1x',
    'in ticks: 22, total 40, bubble 40.0%',
  ]
  uneven = report.summary(
    played('gpipe', 2, 1, simulate.Times(f=(1, 2), comm=1))
  )
  assert 'total 9, bubble 6 (66.7%)\n' in uneven  # no formula
  assert 'at most 9, parameters 2x' in report.summary(played('dualpipe', 8, 20))


def test_json():
  simulated = report.as_json(played('dualpipe', 4, 8))
  rows = simulated.pop('table')
  assert simulated == {
    'kind': 'dualpipe', 'stages': 4, 'ranks': 4, 'microbatches': 8,
    'total': 26.0, 'bubble': 2.0, 'bubble_fraction': 2 / 26,
    'closed_form_bubble': 2.0, 'idle': [2.0] * 4,
    'peak_live_activations': [5] * 4, 'parameter_copies': [2] * 4,
    'model_copies': 2,
    'lockstep': {
      'ticks': 16, 'total': 26.0, 'bubble': 2.0, 'bubble_fraction': 2 / 26,
    },
  }  # fmt: skip
  assert rows[0] == {
    'rank': 0, 'tick': 0, 'kind': 'F', 'start': 0.0, 'end': 1.0,
    'forward': {'stage': 0, 'microbatch': 0, 'direction': 0},
  }  # fmt: skip
  pairs = [row for row in rows if row['kind'] == 'FB' and row['rank'] == 0]
  assert pairs[0]['forward'] == {'stage': 0, 'microbatch': 3, 'direction': 0}
  assert pairs[0]['backward'] == {'stage': 3, 'microbatch': 5, 'direction': 1}
  assert len(rows) == len({(row['rank'], row['tick']) for row in rows})
  split = report.as_json(played('1f1b', 4, 8, split_backward=True))
  assert split['closed_form_bubble'] == split['bubble'] == 6.0
  times = simulate.Times(comm=1)
  assert (
    report.as_json(played('1f1b', 4, 8, times))['closed_form_bubble'] is None
  )


def test_what_is_drawn():
  """Each action in true time; a pair is a forward above a backward."""
  simulated = played('dualpipe', 4, 8, simulate.Times(f=1, b=2.5, w=1, fb=3))
  boxes = plot.boxes(simulated)
  areas = collections.Counter()
  for box in boxes:
    area = (box.right - box.left) * (box.bottom - box.top)
    areas[int(box.top)] += area
    assert box.top + box.bottom == pytest.approx(2 * int(box.top) + 1) or (
      box.bottom - box.top == 0.5
    )
  busy = [simulated.timeline.total - idle for idle in simulated.timeline.idle]
  assert [areas[rank] for rank in range(4)] == pytest.approx(busy)
  halves = [box for box in boxes if box.bottom - box.top == 0.5 and box.top < 1]
  assert [(b.kind, b.chunk, b.microbatch, b.top) for b in halves[:2]] == [
    ('F', 0, 3, 0.0),
    ('B', 1, 5, 0.5),
  ]
  assert (halves[0].left, halves[0].right) == (halves[1].left, halves[1].right)
  drawn = collections.Counter((b.kind, b.chunk) for b in boxes)
  assert drawn['F', 0] == drawn['F', 1] == 4 * 4


@pytest.mark.parametrize(
  'sizes',
  [('dualpipe', 8, 20), ('gpipe', 1, 1), ('interleaved', 6, 3)],
)
def test_a_picture_is_written(tmp_path, sizes):
  path = tmp_path / 'table.png'
  plot.save(played(*sizes), path)
  head = path.read_bytes()[:24]
  assert head.startswith(b'\x89PNG')
  width, height = (int.from_bytes(head[i : i + 4]) for i in (16, 20))
  assert width > 1000 and height > 150


def test_numbers_are_written_where_they_fit():
  """All of them at 8 x 20; none in a sliver."""
  boxes = plot.boxes(played('dualpipe', 8, 20))
  assert plot.labels(boxes, 16.0) == [str(box.microbatch) for box in boxes]
  assert not any(plot.labels(boxes, 1.0))


def test_tables_need_no_jax():
  code = (
    'import sys\n'
    'from dsv3_jax.parallel.schedules import layer_partition\n'
    'from dsv3_jax.parallel.schedules import report\n'
    'assert "numpy" not in sys.modules and "matplotlib" not in sys.modules\n'
    'assert not [name for name in sys.modules if name.startswith("jax")]\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_numbers_of_the_guide():
  """Each row of docs/pipelines.md against the command in it."""
  text = (_ROOT / 'docs' / 'pipelines.md').read_text(encoding='utf-8')
  pattern = r'\| `(--kind=[^`]*)` \|' + r' ([\d.]+)(?: halves)? \|' * 5
  rows = re.findall(pattern, text)
  assert len(rows) == 12
  for flags, *numbers in rows:
    given = dict(flag[2:].split('=') for flag in flags.split() if '=' in flag)
    times = {
      name: fractions.Fraction(given.pop(name))
      for name in ('f', 'b', 'w', 'fb')
      if name in given
    }
    simulated = played(
      given.pop('kind'),
      int(given.pop('stages', 8)),
      32,
      simulate.Times(**times),
      split_backward='--split' in flags,
    )
    assert not given
    live = max(simulate.peak_live(simulated.schedule))
    expected = (
      simulated.timeline.total,
      simulated.timeline.bubble,
      simulated.formula,
    )
    expected = [*expected, live, simulated.ticks.total]
    assert [fractions.Fraction(number) for number in numbers] == expected, flags
  rows = re.findall(r'\| `--kind=(\w+)` \| (\d+) \| ([\d.]+) \|\n', text)
  assert len(rows) == 2
  cost = tables.stage_costs(
    layer_partition.split_layers(61, 16, layer_partition.Costs()),
    layer_partition.Costs(),
  )
  for kind, *numbers in rows:
    for per_stage, number in zip((cost, sum(cost) / 16), numbers, strict=True):
      double = (
        tuple(2 * c for c in cost) if per_stage is cost else 2 * per_stage
      )
      times = simulate.Times(f=per_stage, b=double, w=per_stage)
      total = played(kind, 16, 120, times).timeline.total
      assert f'{float(total):.6g}' == number, kind
