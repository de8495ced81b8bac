"""What a run logs and keeps at every step is what the schedules prescribe."""

import jax
import numpy as np
import pytest

from dsv3_jax.distributed import sharding
from dsv3_jax.training import loop
from dsv3_jax.training import step as steps
from tests import tiny_run, tolerances
from tests.oracles import optim as oracle

STEPS = 14
AFTER = [tiny_run.tokens_after(n) for n in range(STEPS + 1)]
DECAY = 0.75
LR = {
  'peak': 0.02,
  'warmup_steps': 3,
  'constant_tokens': AFTER[6],
  'decay_tokens': AFTER[10] - AFTER[6],
  'decay_lr': 0.005,
  'hold_tokens': AFTER[12] - AFTER[10],
  'final_lr': 0.001,
}
# Borders at a step's first token, and one token before and after one.
MTP_WEIGHT = {'first': 0.3, 'first_tokens': AFTER[5], 'then': 0.1}
BIAS_RATE = {'first': 0.01, 'first_tokens': AFTER[9] - 1, 'then': 0.0}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The config of a run in FP8, its lines, and the arrays of every step."""
  folder = tmp_path_factory.mktemp('schedules')
  changes = {'checkpoint.every_steps': 1, 'checkpoint.keep': STEPS}
  changes |= {'optim.ema_decay': DECAY, 'sample.prompts': ()}
  changes |= {'precision': 'fp8_block_dgrad'}
  named = {'lr': LR, 'mtp_weight': MTP_WEIGHT, 'bias_rate': BIAS_RATE}
  for name, fields in named.items():
    changes |= {f'optim.{name}.{key}': x for key, x in fields.items()}
  changes['train.total_tokens'] = AFTER[-1]
  cfg = tiny_run.make(
    folder, **{name.replace('.', '__'): x for name, x in changes.items()}
  )
  loop.run(cfg, folder / 'run')
  lines = tiny_run.read_metrics(folder / 'run')
  arrays = [
    tiny_run.committed(cfg, folder / 'run', n + 1)[0] for n in range(STEPS)
  ]
  return cfg, lines, arrays


def test_each_step_logs_the_schedules_values(run):
  cfg, lines, _ = run
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert [line['tokens'] for line in lines] == AFTER[1:]
  ramp = (cfg.train.batch_size_start, cfg.train.batch_size)
  ramp += (cfg.train.batch_ramp_tokens, cfg.train.batch_size_step)
  for step, (line, before) in enumerate(zip(lines, AFTER, strict=False)):
    rows = oracle.batch_size(before, *ramp)
    assert line['tokens'] == before + rows * cfg.data.seq_len
    want = {
      'lr': oracle.learning_rate(step, before, **LR),
      'mtp_weight': oracle.step_schedule(before, *MTP_WEIGHT.values()),
      'bias_rate': oracle.step_schedule(before, *BIAS_RATE.values()),
    }
    got = {name: line[name] for name in want}
    assert got == {k: float(np.float32(x)) for k, x in want.items()}, step
  used = lambda name: {line[name] for line in lines}
  assert len(used('lr')) >= 9 and len(used('mtp_weight')) == 2
  assert used('bias_rate') == {float(np.float32(0.01)), 0.0}


def test_each_step_moves_the_bias_by_its_rate(run):
  """Up or down by gamma, or not at all; the first step from zero."""
  _, _, arrays = run
  biases = [
    np.concatenate(
      [x.ravel() for x in jax.tree.leaves(tree['train']['router'])]
    )
    for tree in arrays
  ]
  biases = [np.zeros_like(biases[0]), *biases]
  for step, before in enumerate(AFTER[:-1]):
    gamma = oracle.step_schedule(before, *BIAS_RATE.values())
    moved = np.abs(biases[step + 1] - biases[step])
    moves = np.isclose(moved, gamma, rtol=1e-5)
    assert np.all(moves | (moved == 0.0)), step
    assert np.mean(moves) > 0.5 if gamma else not np.any(moved), step


def test_the_average_is_replayed_from_the_parameters_of_every_step(run):
  cfg, _, arrays = run
  mesh = sharding.make_mesh(cfg.parallel)
  state = steps.Trainer(cfg, mesh).init(jax.random.key(cfg.seed))
  want = exact(state['params'])
  for tree in arrays:
    want = oracle.ema(want, exact(tree['train']['params']), DECAY)
    tolerances.assert_trees_close(exact(tree['ema']), want)
  last = exact(arrays[-1]['train']['params'])
  moved = [np.max(np.abs(want[name] - x)) for name, x in last.items()]
  assert max(moved) > 1e-3  # an average, not the parameters


def exact(tree):
  """The leaves by name, in float64."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves
  }
