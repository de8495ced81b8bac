"""The loop: ramp, guards, and what a run refuses."""

import dataclasses
import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import store
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.nn import model
from dsv3_jax.training import loop, lr_schedule
from dsv3_jax.training import step as steps
from tests import settings, tiny_run
from tests.nn import models


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


@pytest.mark.nightly
def test_batch_ramp_does_not_recompile(folder):
  """Two rows a step at first, four later: one program."""
  cfg = tiny_run.make(folder)
  compiled = []
  watch = lambda name, seconds, **kw: compiled.append(kw.get('fun_name'))
  jax.monitoring.register_event_duration_secs_listener(watch)
  try:
    loop.run(cfg, folder / 'ramp')
  finally:
    jax.monitoring.clear_event_listeners()
  rows = {line['tokens'] for line in tiny_run.read_metrics(folder / 'ramp')}
  gaps = set(np.diff(sorted(rows)).tolist())
  assert gaps == {2 * 32, 4 * 32}
  assert compiled.count('step') + compiled.count('jit(step)') <= 3
  assert any(name and 'step' in name for name in compiled)


def test_non_finite_loss_stops_before_the_optimizer(folder, monkeypatch):
  """The error has step and metrics; the last checkpoint stands."""
  cfg, workdir = tiny_run.make(folder, sample__prompts=()), folder / 'nan'
  loop.run(tiny_run.until(cfg, 5), workdir)
  want, _ = tiny_run.committed(cfg, workdir, 5)
  real = lr_schedule.lr_at
  broken = lambda lr, step, tokens: (
    float('nan') if step == 6 else real(lr, step, tokens)
  )
  monkeypatch.setattr(lr_schedule, 'lr_at', broken)
  with pytest.raises(loop.NonFiniteError) as caught:
    loop.run(cfg, workdir)
  step, values = caught.value.args
  assert step == 8  # step 7 wrote NaN weights, step 8's loss showed it
  assert not np.isfinite(values['loss'])
  assert store.Store(workdir / 'checkpoints', keep=10).steps() == [5]
  got, _ = tiny_run.committed(cfg, workdir, 5)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__tokenizer': 'big'}, 'model.vocab_size=512 must be >= 600'),
    ({'sample__prompts': ('def ' * 99,)}, 'sample.prompts: prompt 0 has'),
  ],
)
def test_refused_before_a_workdir_is_made(folder, tmp_path, changes, message):
  tiny_run.make(folder)  # writes the corpus
  if 'data__tokenizer' in changes:
    texts = [p.read_text() for p in (folder / 'corpus').glob('*.txt')]
    tokenizers.train(texts, 600).save(tmp_path / 'big.json')
    changes = {'data__tokenizer': str(tmp_path / 'big.json')}
  cfg = tiny_run.make(folder, **changes)
  with pytest.raises(errors.InputError, match=re.escape(message)):
    loop.run(cfg, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def chats(folder):
  """Conversations about files of the standard library; returns their path."""
  lines = []
  for path in sorted((folder / 'corpus').glob('*.txt')):
    turns = [('user', f'Write {path.stem}!'), ('assistant', path.read_text())]
    messages = [{'role': r, 'content': text[:500]} for r, text in turns]
    lines.append(json.dumps({'messages': messages}))
  (folder / 'chats.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  return str(folder / 'chats.jsonl')


@pytest.mark.nightly
@pytest.mark.parametrize('name', ['v3_671b', 'v3_16b', 'ablations.fp8'])
def test_every_experiment_runs_locally(folder, name):
  """Rematerialised on two devices; on chats with MTP; block-wise Dgrad."""
  source = importlib.import_module(f'experiments.{name}').get_config('runlocal')
  changes = tiny_run.overrides(folder, steps=3)
  if name == 'v3_671b':
    changes |= {'parallel.data': 2}
  elif name == 'v3_16b':
    changes |= {'data.source': chats(folder), 'data.isolate_samples': True}
    changes |= {'model.mtp.depth': 1, 'precision': 'bf16'}
  else:
    assert source.precision == 'fp8'
    changes |= {'precision': 'fp8_block_dgrad'}
  with source.unlocked():
    source.update_from_flattened_dict(changes)
  cfg = config.from_config_dict(source)
  if name != 'ablations.fp8':
    assert cfg.model.scan_layers and cfg.model.remat == 'report'
  final = loop.run(cfg, folder / name)
  assert 0 < final['loss_nats_per_token'] < 1.2 * np.log(cfg.model.vocab_size)
  assert len(tiny_run.read_metrics(folder / name)) == 3
  assert (folder / name / 'samples.txt').stat().st_size > 0


# The step alone.


@functools.cache
def compiled_step(**changes):
  """A step of a tiny model, its fresh state and a batch."""
  settings_ = {
    'precision': 'f32',
    'train__batch_size': 4,
    'train__batch_size_start': 4,
    'train__microbatch_size': 2,
    'train__spike_sigmas': 4.0,
    'optim__moments_dtype': 'float32',
  }
  cfg = settings.small(**(settings_ | changes))
  state = jax.jit(lambda: steps.init_state(cfg, jax.random.key(0)))()
  pair = [models.make_batch(cfg, [[13], [7, 6]], seed=s)[0] for s in (1, 2)]
  batch_nBT = jax.tree.map(lambda *xs: jnp.stack(xs), *pair)
  hyper = {'lr': 0.01, 'mtp_weight': 0.3, 'bias_rate': 0.5}
  hyper = {name: jnp.float32(x) for name, x in hyper.items()}
  return cfg, jax.jit(steps.make_train_step(cfg)), state, batch_nBT, hyper


def tiny_step(**changes):
  """The same, in containers of its own."""
  return jax.tree.map(lambda x: x, compiled_step(**changes))


def equal(a, b):
  return bool(steps.same_bits(a, b))


@pytest.mark.nightly
def test_micro_batches_sum_to_one_batch():
  """Two micro-batches of 2 rows == one of 4, to f32 rounding."""
  _, step, state, batch, hyper = tiny_step()
  joined = jax.tree.map(lambda x: x.reshape(1, 4, -1), batch)
  two, metrics_two = step(state, batch, jnp.int32(2), hyper)
  one, metrics_one = step(state, joined, jnp.int32(1), hyper)
  for name in ('loss', 'mtp_loss', 'balance', 'grad_norm'):
    np.testing.assert_allclose(metrics_two[name], metrics_one[name], rtol=1e-5)
  grads = lambda s: s['opt'].mean  # after one step: 0.1 g
  for a, b in zip(*map(jax.tree.leaves, (grads(two), grads(one))), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
  assert equal(two['router'], one['router'])


def test_unused_micro_batches_do_not_count():
  _, step, state, batch, hyper = tiny_step()
  junk = jax.tree.map(lambda x: x.at[1].set(1), batch)
  a, _ = step(state, batch, jnp.int32(1), hyper)
  b, _ = step(state, junk, jnp.int32(1), hyper)
  assert equal(a, b)


def test_router_moves_once_a_step_by_gamma_on_the_whole_load():
  cfg, step, state, batch, hyper = tiny_step()
  new, _ = step(state, batch, jnp.int32(2), hyper)
  load = {'moe': 0.0, 'mtp': 0.0}
  net = model.build(cfg)
  for i in range(2):
    micro = jax.tree.map(lambda x, i=i: x[i], batch)
    scales = models.scales_of(cfg, micro.weights_BT, micro.segments_BT)
    _, parts = net.apply({'params': state['params']}, micro, state['router'],
                         scales, method='loss')  # fmt: skip
    load['moe'] += np.asarray(parts['load'])
    load['mtp'] += np.asarray(parts['mtp_load'])
  for name, load_LE in load.items():
    want = 0.5 * np.sign(load_LE.mean(-1, keepdims=True) - load_LE)
    np.testing.assert_array_equal(new['router'][name], want)
    assert np.any(want)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_non_finite_step_changes_nothing_but_the_guard(value):
  _, step, state, batch, hyper = tiny_step()
  state['params']['head']['w'] = (
    state['params']['head']['w'].at[0, 0].set(value)
  )
  new, metrics = step(state, batch, jnp.int32(2), hyper)
  assert bool(metrics['halted'])
  for name in ('params', 'opt', 'router'):
    assert equal(new[name], state[name])
  # Nothing moves afterwards either, though the loss is finite again.
  new['params']['head']['w'] = jnp.zeros_like(new['params']['head']['w'])
  after, metrics = step(new, batch, jnp.int32(2), hyper)
  assert bool(metrics['halted'])
  assert np.isfinite(metrics['loss'])
  assert equal(after['params'], new['params'])


def test_spike_is_skipped_and_training_goes_on():
  _, step, state, batch, hyper = tiny_step()
  spike_state = state['guard'] | {
    'mean': jnp.float32(0.1),
    'variance': jnp.float32(0.01),
    'count': jnp.int32(100),
  }
  new, metrics = step(
    state | {'guard': spike_state}, batch, jnp.int32(2), hyper
  )
  assert bool(metrics['skipped'])
  assert not bool(metrics['halted'])
  assert equal(new, state | {'guard': spike_state | {'skips': jnp.int32(1)}})
  # Five in a row: the loss has moved for good, and counts.
  for skips, skipped in ((4, True), (5, False)):
    worn = spike_state | {'skips': jnp.int32(skips)}
    new, metrics = step(state | {'guard': worn}, batch, jnp.int32(2), hyper)
    assert bool(metrics['skipped']) == skipped
  assert (new['guard']['count'], new['guard']['skips']) == (1, 0)
  assert new['guard']['mean'] == metrics['loss']
  assert not equal(new['params'], state['params'])
  calm = spike_state | {'mean': metrics['loss']}
  new, metrics = step(state | {'guard': calm}, batch, jnp.int32(2), hyper)
  assert not bool(metrics['skipped'])
  assert not equal(new['params'], state['params'])


def test_same_bits_sees_one_bit():
  _, _, state, _, _ = tiny_step()
  assert equal(state, jax.tree.map(jnp.copy, state))
  w = state['params']['embed']['w']
  bits = jax.lax.bitcast_convert_type(w, jnp.uint32).at[0, 0].add(1)
  flipped = jax.lax.bitcast_convert_type(bits, jnp.float32)
  other = state | {'params': state['params'] | {'embed': {'w': flipped}}}
  assert not equal(state, other)
  minus = jax.tree.map(lambda x: -x, state['router'])  # 0.0 and -0.0
  assert not equal(state, state | {'router': minus})


def test_probe_stops_a_run_whose_bits_differ(folder, tmp_path, monkeypatch):
  cfg = tiny_run.until(tiny_run.make(folder, train__probe_every=2), 4)
  monkeypatch.setattr(steps, 'same_bits', lambda a, b: jnp.bool_(False))
  with pytest.raises(loop.CorruptionError, match='step 0 gave different bits'):
    loop.run(cfg, tmp_path / 'probe')


@pytest.mark.nightly
@pytest.mark.usefixtures('optimized')
def test_probe_agrees_and_changes_no_bit(folder):
  cfg = tiny_run.until(tiny_run.make(folder, train__probe_every=2), 4)
  loop.run(cfg, folder / 'probe')
  other = dataclasses.replace(cfg, train=dataclasses.replace(
    cfg.train, probe_every=0))  # fmt: skip
  loop.run(other, folder / 'no probe')
  a, _ = tiny_run.committed(cfg, folder / 'probe', 4)
  b, _ = tiny_run.committed(cfg, folder / 'no probe', 4)
  jax.tree.map(np.testing.assert_array_equal, a, b)
