"""Prepared rows in a job of two processes, which one goes on with."""

import json

import pytest

from dsv3_jax.cli import main as cli
from tests import limits, tiny_run
from tests.distributed import test_processes as jobs


@pytest.mark.nightly
# How ml_collections loads an experiment, when asked in this process.
@pytest.mark.filterwarnings('ignore:the load_module')
def test_two_processes_and_then_one_read_the_stream(tmp_path):
  """The losses of on-the-fly reading, to the bit."""
  settings = tiny_run.overrides(tmp_path, 8) | {
    'parallel.data': 2,
    'train.microbatch_size': 4,
    'train.batch_size': 8,
    'train.batch_size_start': 8,
    'train.batch_ramp_tokens': 0,
    'train.total_tokens': 6 * jobs.STEP_TOKENS,
    'train.peak_flops': 1e12,
    'model.mtp.depth': 0,
    'sample.prompts': (),
  }
  path = tmp_path / 'experiment.py'
  path.write_text(jobs.EXPERIMENT.format(text=json.dumps(settings)))
  config, rows = f'--config={path}', tmp_path / 'rows'
  calm, mixed = tmp_path / 'calm', tmp_path / 'mixed'
  assert cli.main(['train', config, f'--workdir={calm}']) == 0
  assert cli.main(['prepare', config, f'--output={rows}']) == 0

  there = f'--config.data.prepared={rows}'
  shorter = f'--config.train.total_tokens={3 * jobs.STEP_TOKENS}'
  child = jobs.train(path, mixed, there, shorter, PROCESSES='2', DEVICES='1')
  output, _ = child.communicate(timeout=limits.HANG)
  assert child.returncode == 0, output
  assert cli.main(['train', config, f'--workdir={mixed}', there]) == 0
  want = tiny_run.read_metrics(calm)
  assert [line['step'] for line in want] == list(range(1, 7))
  assert tiny_run.read_metrics(mixed) == want
