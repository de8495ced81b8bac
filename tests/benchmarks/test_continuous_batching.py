"""The benchmark of requests that share steps, on a tiny model."""

import pytest

from benchmarks import continuous_batching
from tests import settings


@pytest.mark.nightly
def test_both_ways_answer_all():
  cfg = settings.small(
    precision='f32',
    model__max_seq_len=64,
    model__rope__original_seq_len=64,
    model__num_layers=2,
  )
  alone, shared = continuous_batching.measure(cfg, 3, 1, 16)
  assert (alone['at_a_time'], shared['at_a_time']) == (1, 3)
  assert alone['ratio'] == 1.0 and shared['equal'] > 0.9
  assert shared['steps'] < alone['steps']
  # The same tokens in both ways.
  tokens = [row['tokens_per_s'] * row['seconds'] for row in (alone, shared)]
  assert tokens[0] == pytest.approx(tokens[1])


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--requests=0', '--requests=0 must be at least 1'),
    ('--longest=3', '--longest=3 must be at least 8'),
  ],
)
def test_wrong_flags_are_one_line(capsys, flag, message):
  with pytest.raises(SystemExit) as stopped:
    continuous_batching.main([flag])
  assert stopped.value.code == 2 and message in capsys.readouterr().err
