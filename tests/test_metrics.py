"""Numbers about a run, and the files that they go to."""

import json
import math
import struct

import jax.numpy as jnp
import pytest

from dsv3_jax import metrics


def test_max_violation_by_hand():
  """(5 - 2) / 2 and (2 - 2) / 2; the mean of both."""
  load_LE = jnp.float32([[5, 1, 1, 1], [2, 2, 2, 2]])
  assert metrics.max_violation(load_LE) == 0.75
  assert metrics.max_violation(jnp.zeros((2, 4))) == 0.0


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


def test_resume_drops_what_comes_again(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in (1, 2, 3):
    writer.write('train', step, step * 10, record(step))
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"kind": "tra')  # cut by a kill
  assert [x['step'] for x in metrics.read_metrics(tmp_path)] == [1, 2, 3]
  writer = metrics.MetricWriter(tmp_path, 2)
  writer.write('train', 3, 30, record(30))
  writer.close()
  lines = metrics.read_metrics(tmp_path)
  assert [x['step'] for x in lines] == [1, 2, 3]
  assert lines[2]['loss'] == 5.0 / 30
  assert all(json.loads(line) for line in path.read_text().splitlines())
  assert len(list(tmp_path.glob('events.out.tfevents.*'))) >= 1


def test_plot(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in (1, 2, 3):
    writer.write('train', step, step * 10, record(step))
  told = {'loss_nats_per_token': 2.0, 'bits_per_byte': 1.5}
  writer.write('eval', 3, 30, told)
  writer.close()
  metrics.plot_loss(tmp_path)
  head = (tmp_path / 'loss.png').read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  assert struct.unpack('>II', head[16:]) == (8 * 120, 6 * 120)
