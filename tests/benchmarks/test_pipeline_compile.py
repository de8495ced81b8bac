"""The benchmark of compile times, on a small pipeline."""

import pytest

from benchmarks import pipeline_compile


def test_bad_flags_are_one_line(capsys):
  for flag, said in (
    ('--microbatches=8,x', "--microbatches='8,x' must be like 16,32"),
    ('--steps=0', '--steps=0 must be at least 1'),
  ):
    with pytest.raises(SystemExit) as ended:
      pipeline_compile.main([flag])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_more_microbatches_are_no_longer_program():
  rows = [
    pipeline_compile.measure(
      pipeline_compile.make_config(2, '1f1b', 2, count), num_steps=1
    )
    for count in (2, 4)
  ]
  assert rows[0]['lines'] == rows[1]['lines'] > 1000
  assert rows[0]['branches'] == rows[1]['branches']
  for row in rows:
    assert row['compile_seconds'] > 0 and row['step_cpu_seconds'] > 0
