"""The training step with simulated FP8 beside BF16."""

import dataclasses

import pytest

from benchmarks import fp8_step


def test_the_models_differ_in_precision_only():
  bf16, fp8 = (fp8_step.make_config(name) for name in ('bf16', 'fp8'))
  assert bf16.precision == 'bf16' and fp8.precision == 'fp8'
  assert dataclasses.replace(fp8, precision='bf16') == bf16
  net = bf16.model
  assert net.d_model >= 512 and net.num_layers == 2 and net.mtp.depth == 1
  assert (net.moe.num_experts, net.moe.top_k, net.moe.d_ff) == (8, 2, 256)


def test_ratios_are_to_bf16():
  seconds = {'bf16': [1.0, 2.0, 3.0], 'fp8': [4.0, 3.0, 5.0]}
  rows = {row['precision']: row for row in fp8_step.to_rows(seconds, 1024)}
  assert rows['bf16']['ratio_of_medians'] == 1.0
  assert rows['fp8']['ratio_of_medians'] == 2.0
  assert rows['fp8']['ratio_of_minima'] == 3.0
  assert rows['fp8']['tokens_per_second'] == 256.0


@pytest.mark.nightly
def test_every_precision_trains_in_turn():
  seconds = fp8_step.measure(rounds=2, runlocal=True)
  assert set(seconds) == {'f32', 'bf16', 'fp8'}
  assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


@pytest.mark.nightly
def test_two_precisions_train_a_dense_layer_in_turn(monkeypatch):
  real = fp8_step.make_config

  def make_config(*args):
    cfg = real(*args)
    net = dataclasses.replace(cfg.model, num_layers=1, num_dense_layers=1)
    net = dataclasses.replace(net, mtp=dataclasses.replace(net.mtp, depth=0))
    return dataclasses.replace(cfg, model=net)

  monkeypatch.setattr(fp8_step, 'make_config', make_config)
  monkeypatch.setattr(fp8_step, 'PRECISIONS', ('bf16', 'fp8'))
  seconds = fp8_step.measure(rounds=1, runlocal=True)
  assert list(seconds) == ['bf16', 'fp8']
  assert all(len(times) == 1 and min(times) > 0 for times in seconds.values())


def test_no_rounds_are_bad_input(capsys):
  with pytest.raises(SystemExit) as ended:
    fp8_step.main(['--rounds=0'])
  assert ended.value.code == 2
  assert '--rounds=0 must be at least 1' in capsys.readouterr().err
