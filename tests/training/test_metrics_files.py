"""Metric files that are resumed, truncated or sparse."""

import json

import hypothesis
from hypothesis import strategies as st

from dsv3_jax.training import metrics


def write(workdir, resume_step, steps):
  writer = metrics.MetricWriter(workdir, resume_step)
  for step in steps:
    record = {'loss': 8.0 / step, 'mtp_loss': 0.0, 'max_violation': 0.1}
    writer.write('train', step, 100 * step, record)
  writer.close()


@hypothesis.given(size=st.integers(1, 400), resume=st.integers(0, 6))
@hypothesis.settings(max_examples=25)
def test_a_file_truncated_anywhere_goes_on_with_complete_lines(
  tmp_path_factory, size, resume
):
  workdir = tmp_path_factory.mktemp('truncated')
  write(workdir, 0, range(1, 6))
  path = workdir / 'metrics.jsonl'
  truncated = path.read_bytes()[:size]  # as a kill may leave it
  path.write_bytes(truncated)
  complete = truncated.count(b'\n')
  kept = [r['step'] for r in metrics.read_metrics(workdir)]
  assert kept == list(range(1, complete + 1))
  write(workdir, resume, [resume + 1])
  lines = path.read_text(encoding='utf-8').splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == [*range(1, min(complete, resume) + 1), resume + 1]
  # Nothing else was left behind, and nothing was written twice.
  names = {p.name for p in workdir.iterdir() if 'tfevents' not in p.name}
  assert names == {'metrics.jsonl'}


def test_a_line_says_what_was_written(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write('eval', 7, 14_800_000_000_001, {'loss_nats_per_token': 0.1})
  # At once, or a killed run would lose it.
  [line] = metrics.read_metrics(tmp_path)
  writer.close()
  assert line == {
    'kind': 'eval',
    'step': 7,
    'tokens': 14_800_000_000_001,
    'loss_nats_per_token': 0.1,
  }


def test_events_hold_the_same_numbers(tmp_path):
  from tensorboardX.proto import event_pb2  # slow: imports PyTorch

  write(tmp_path, 0, [1, 2])
  [path] = tmp_path.glob('events.out.tfevents.*')
  data, value_of = path.read_bytes(), {}
  while data:  # a record: length, its checksum, the event, its checksum
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    for value in event.summary.value:
      value_of[event.step, value.tag] = value.simple_value
    data = data[12 + size + 4 :]
  assert value_of[1, 'train/loss'] == 8.0 and value_of[2, 'train/loss'] == 4.0
  assert len(value_of) == 6


def test_there_may_be_nothing_to_read_or_little_to_draw(tmp_path):
  assert metrics.read_metrics(tmp_path) == []
  write(tmp_path, 0, [])
  for steps in ([], [1]):  # no line; one of a model without MTP, no evaluation
    write(tmp_path, 0, steps)
    metrics.plot_loss(tmp_path)
    head = (tmp_path / 'loss.png').read_bytes()[:24]
    assert head[12:16] == b'IHDR'
    size = [int.from_bytes(head[i : i + 4], 'big') for i in (16, 20)]
    assert size == [960, 720]
