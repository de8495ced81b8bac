"""Sleeping stages: bars and ranks at work at the same time."""

import pytest

from benchmarks import pipeline_bubble
from dsv3_jax.parallel.schedules import make as schedules


@pytest.mark.nightly
@pytest.mark.parametrize('kind', ['1f1b', 'dualpipe'])
def test_ranks_sleep_at_the_same_time(kind):
  row = pipeline_bubble.measure(kind, 2, 4, seconds=0.04, runs=2)
  assert 0.0 <= row['ideal'] <= row['in_ticks'] < 0.2
  # Far below 1/2, where one rank at a time would be; this one is no bar.
  for name in ('spmd', 'threaded'):
    assert row['ideal'] - 0.01 < row[name] < 0.4, row


def test_halves_cost_unidirectional_schedules_nothing_in_ticks():
  for kind in schedules.UNIDIRECTIONAL:
    stages = 16 if kind == 'interleaved' else 8
    sizes = {'stages': stages, 'microbatches': 32, 'split_backward': True}
    ideal, ticks = pipeline_bubble.simulated(
      schedules.make_schedule(kind, **sizes)
    )
    assert ideal == ticks


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--kinds=zb2p'], 'zb2p'),
    (['--ranks=3', '--kinds=dualpipe'], 'multiple of 2'),
    (['--milliseconds=0'], 'must be above 0'),
  ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
  with pytest.raises(SystemExit, match='2'):
    pipeline_bubble.main(flags)
  assert message in capsys.readouterr().err
