"""Numbers about a run, and the files that they go to."""

import math
import struct

import pytest

from dsv3_jax.distributed import sharding
from dsv3_jax.training import metrics
from tests import settings


def test_bits_per_byte():
  assert metrics.bits_per_byte(8.0 * math.log(2.0), 4) == pytest.approx(2.0)


def test_throughput_leaves_out_the_first_step_and_pauses(monkeypatch):
  clock = iter([10.0, 12.0, 100.0, 101.0])
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(clock))
  meter = metrics.Throughput(flops_per_token=5.0, peak_flops=1000.0)
  assert meter.read() == {}
  meter.add(64)  # compiles; the clock starts at 10
  meter.add(100)
  meter.add(100)
  assert meter.read() == {'tokens_per_second': 100.0, 'mfu': 0.5}  # at 12
  meter.restart()  # at 100
  meter.add(50)
  assert meter.read()['tokens_per_second'] == 50.0


def record(step):
  return {
    'loss': 5.0 / step,
    'mtp_loss': 6.0 / step,
    'max_violation': 1.0 / step,
  }


def test_an_ended_run_logs_its_last_evaluation_once(tmp_path):
  for again, left in ((False, ['train', 'eval']), (True, ['train'])):
    writer = metrics.MetricWriter(tmp_path, 0)
    writer.write('train', 3, 30, record(3))
    writer.write('eval', 3, 30, {'bits_per_byte': 1.5})
    writer.close()
    metrics.MetricWriter(tmp_path, 3, again=again).close()
    kinds = [line['kind'] for line in metrics.read_metrics(tmp_path)]
    assert kinds == left


@pytest.mark.parametrize('count', [1, 4])
def test_peak_is_of_all_devices(count):
  mesh = sharding.make_mesh(settings.small(parallel__data=count).parallel)
  assert metrics.peak_flops(2e12, mesh) == 2e12 * count
  # Devices of a CPU share its cores: more of them are not faster.
  assert 1e9 < metrics.peak_flops(0.0, mesh) < 1e13


def test_plot(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in (1, 2, 3):
    writer.write('train', step, step * 10, record(step))
  scores = {'loss_nats_per_token': 2.0, 'bits_per_byte': 1.5}
  writer.write('eval', 3, 30, scores)
  writer.close()
  metrics.plot_loss(tmp_path)
  head = (tmp_path / 'loss.png').read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  assert struct.unpack('>II', head[16:]) == (8 * 120, 6 * 120)
