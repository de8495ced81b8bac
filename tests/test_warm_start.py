"""Long-context phases: from another run's weights, rows over `context`."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import config, errors, metrics, sharding, train, warm_start
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from experiments import long_context, v3_671b
from tests import tiny_run

_KEPT = ('data.source', 'data.cache_dir', 'data.valid_fraction')
_KEPT += ('eval.max_bytes', 'model.d_model', 'sample.max_new_tokens')
_KEPT += ('train.log_every',)


def first_run(folder):
  """The recipe's `runlocal`, smaller, for two steps."""
  source = v3_671b.get_config('runlocal')
  changes = tiny_run.overrides(folder, steps=2) | {'model.num_layers': 2}
  with source.unlocked():
    source.update_from_flattened_dict(changes)
  return config.from_config_dict(source)


def phase(folder, init_from, num_steps=1, **changes):
  """The 32K phase's `runlocal`, of the same model."""
  source = long_context.get_config('32k,runlocal')
  found = tiny_run.overrides(folder)
  found = {name: found[name] for name in _KEPT} | {'model.num_layers': 2}
  found['checkpoint.init_from'] = str(init_from)
  found['train.total_tokens'] = num_steps * 4 * source.data.seq_len
  found |= {name.replace('__', '.'): x for name, x in changes.items()}
  with source.unlocked():
    source.update_from_flattened_dict(found)
  return config.from_config_dict(source)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_phase_starts_from_a_run_and_goes_on_without_it(tmp_path):
  first = first_run(tmp_path)
  train.run(first, tmp_path / 'first')
  cfg = phase(tmp_path, tmp_path / 'first')
  assert cfg.model.yarn and cfg.parallel.context == 2

  # What it starts with, here in a pipeline: the other's weights to the bit.
  axes = dataclasses.replace(cfg.parallel, pipe=2, context=1, schedule='1f1b')
  piped = dataclasses.replace(cfg, parallel=axes)
  trainer = steps.Trainer(piped, sharding.make_mesh(axes))
  leaves = warm_start.read(piped, tmp_path / 'first')
  fresh = trainer.init(jax.random.key(0))
  state = trainer.to_model(warm_start.start(trainer, fresh, leaves))
  kept = store.Store(tmp_path / 'first' / 'checkpoints', keep=1)
  arrays = kept.open(kept.latest())
  kept.close()
  assert np.any(state['router']['moe'])
  for part in ('params', 'router'):
    for path, leaf in jax.tree_util.tree_leaves_with_path(state[part]):
      name = ('train', part, *(key.key for key in path))
      np.testing.assert_array_equal(leaf, arrays[name][:], err_msg=str(name))
  assert not any(np.any(x) for x in jax.tree.leaves(state['opt']))

  train.run(cfg, tmp_path / 'second')
  shutil.rmtree(tmp_path / 'first')
  longer = phase(tmp_path, tmp_path / 'first', num_steps=2)
  train.run(longer, tmp_path / 'second')
  lines = metrics.read_metrics(tmp_path / 'second')
  told = [line for line in lines if line['kind'] == 'train']
  assert [line['step'] for line in told] == [1, 2]
  with pytest.raises(errors.InputError, match=r'init_from=.*first.*cannot be'):
    train.run(longer, tmp_path / 'third')
  assert not (tmp_path / 'third').exists()

  other = phase(tmp_path, tmp_path / 'second', model__d_model=16)
  said = re.escape('init_from=') + '.*embed.*32], wanted .*16]: model must be'
  with pytest.raises(errors.InputError, match=said):
    train.run(other, tmp_path / 'third')
  assert not (tmp_path / 'third').exists()
