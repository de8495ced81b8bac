"""The benchmark of compile times, on a small pipeline."""

import dataclasses

import pytest

from benchmarks import pipeline_compile


def test_bad_flags_are_one_line(capsys):
  for flag, message in (
    ('--microbatches=8,x', "--microbatches='8,x' must be like 16,32"),
    ('--steps=0', '--steps=0 must be at least 1'),
  ):
    with pytest.raises(SystemExit) as ended:
      pipeline_compile.main([flag])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize('dense', [True, False])
def test_a_step_is_compiled_and_run(dense):
  """Of dense layers alone, or of the whole model."""
  cfg = pipeline_compile.make_config(2, '1f1b', 2, 2)
  if dense:
    net = dataclasses.replace(cfg.model, num_dense_layers=2)
    net = dataclasses.replace(net, mtp=dataclasses.replace(net.mtp, depth=0))
    cfg = dataclasses.replace(cfg, model=net)
  row = pipeline_compile.measure(cfg, num_steps=1)
  assert row['microbatches'] == 2 and row['branches'] > 4
  assert row['lines'] > 1000 and row['temporary_MB'] > 0
  assert row['compile_seconds'] > 0 and row['step_cpu_seconds'] > 0
