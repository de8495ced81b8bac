"""Long-context phases: from another run's weights, rows over `context`."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import store
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import sharding
from dsv3_jax.training import init_from, loop, metrics, run_dir
from dsv3_jax.training import step as steps
from experiments import long_context, v3_671b
from tests import tiny_run

_KEPT = ('data.source', 'data.cache_dir', 'data.valid_fraction')
_KEPT += ('eval.max_bytes', 'model.d_model', 'train.log_every')


def write_first(folder):
  """A workdir of the recipe's `runlocal`, smaller: weights, but no training."""
  source = v3_671b.get_config('runlocal')
  changes = tiny_run.overrides(folder) | {'model.num_layers': 2}
  changes |= {'optim.ema_decay': 0.0}
  with source.unlocked():
    source.update_from_flattened_dict(changes)
  cfg = config.from_config_dict(source)
  state = jax.jit(functools.partial(steps.init_state, cfg))(jax.random.key(7))
  router_biases = {'moe': jnp.ones_like(state['router']['moe'])}
  state |= {'router': state['router'] | router_biases}
  kept = store.Store(folder / 'first' / 'checkpoints', keep=1)
  kept.save(3, {'train': state, 'ema': {}}, {})
  kept.close()
  run_dir.write_config(cfg, folder / 'first')
  texts = [p.read_text()[:500] for p in (folder / 'corpus').glob('*.txt')]
  tokenizers.train(texts, 400).save(folder / 'first' / 'tokenizer.json')
  return jax.device_get(state)


def phase(folder, init_from, num_steps=1, **changes):
  """The 32K phase's `runlocal`, of the same model."""
  source = long_context.get_config('32k,runlocal')
  overrides = tiny_run.overrides(folder)
  overrides = {name: overrides[name] for name in _KEPT} | {
    'model.num_layers': 2
  }
  overrides['checkpoint.init_from'] = str(folder / init_from)
  overrides['train.total_tokens'] = num_steps * 4 * source.data.seq_len
  overrides['sample.prompts'] = ()
  overrides |= {name.replace('__', '.'): x for name, x in changes.items()}
  with source.unlocked():
    source.update_from_flattened_dict(overrides)
  return config.from_config_dict(source)


@pytest.mark.slow
def test_a_phase_starts_with_weights_and_biases_alone(tmp_path):
  """Under another schedule: to the bit; moments and step are fresh."""
  want = write_first(tmp_path)
  cfg = phase(tmp_path, 'first')
  assert cfg.model.yarn and cfg.parallel.context == 2
  axes = dataclasses.replace(cfg.parallel, pipe=2, context=1, schedule='1f1b')
  cfg = dataclasses.replace(cfg, parallel=axes)
  trainer = steps.Trainer(cfg, sharding.make_mesh(axes))
  leaves = init_from.read(cfg, tmp_path / 'first')
  fresh = trainer.init(jax.random.key(0))
  state = jax.device_get(init_from.start(trainer, fresh, leaves))
  state = jax.device_get(trainer.to_model(state))
  for part in ('params', 'router'):
    assert steps.same_bits(state[part], want[part]), part
  assert not any(np.any(x) for x in jax.tree.leaves(state['opt']))

  other = phase(tmp_path, 'first', model__d_model=16)
  message = r"init_from='.*first'.*w_dkv is \[1, 32, 40\], wanted \[1, 16, 40\]"
  with pytest.raises(errors.InputError, match=message):
    loop.run(other, tmp_path / 'second')
  with pytest.raises(errors.InputError, match=r"init_from='.*none'.*cannot be"):
    loop.run(phase(tmp_path, 'none'), tmp_path / 'second')
  assert not (tmp_path / 'second').exists()


@pytest.mark.nightly
def test_a_phase_goes_on_without_the_run_before(tmp_path):
  """Rows of 512 tokens over two devices; the tokenizer comes along."""
  write_first(tmp_path)
  first, second = tmp_path / 'first', tmp_path / 'second'
  text = (first / 'tokenizer.json').read_text()
  loop.run(phase(tmp_path, 'first'), second)
  assert (second / 'tokenizer.json').read_text() == text
  shutil.rmtree(first)
  loop.run(phase(tmp_path, 'first', num_steps=2), second)
  lines = metrics.read_metrics(second)
  train_steps = [line['step'] for line in lines if line['kind'] == 'train']
  assert train_steps == [1, 2]


def test_a_workdir_that_cannot_be_read_is_named_with_its_setting(tmp_path):
  folder = tmp_path / 'first'
  cfg = tiny_run.make(tmp_path, checkpoint__init_from=str(folder))
  with pytest.raises(
    errors.InputError, match=r"init_from='.*first' cannot be read: name a work"
  ):
    init_from.start_directory(cfg, tmp_path / 'new')
  folder.mkdir()
  run_dir.write_config(cfg, folder)
  assert init_from.start_directory(cfg, tmp_path / 'new') == folder
  with pytest.raises(
    errors.InputError, match=r"^checkpoint\.init_from='.*first': .*first"
  ):
    init_from.read(cfg, folder)
