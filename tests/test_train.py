"""The loop: bitwise resume, ramp, guards, and what a run refuses."""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors, metrics, optim, train
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.nn import model
from tests import settings, tiny_run
from tests.nn import models


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


def until(cfg, steps_):
  """The same experiment, ended after so many steps."""
  tokens = tiny_run.tokens_after(steps_)
  return dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, total_tokens=tokens)
  )


def committed(cfg, workdir, step):
  """Every array and document of a committed step."""
  kept = store.Store(workdir / 'checkpoints', keep=10)
  like = steps.state_shapes(cfg)
  ema = like['params'] if cfg.optim.ema_decay else {}
  try:
    return kept.restore(step, {'train': like, 'ema': ema})
  finally:
    kept.close()


def told(workdir):
  """Lines of metrics.jsonl without the clock's."""
  clock = ('tokens_per_second', 'mfu')
  return [
    {k: v for k, v in line.items() if k not in clock}
    for line in metrics.read_metrics(workdir)
    if line['kind'] == 'train'
  ]


@pytest.mark.usefixtures('optimized')
@pytest.mark.slow
def test_resume_is_bitwise(folder):
  """40 == 20 + 20 == 7 + 13 + 20: arrays, EMA, loader, loss lines."""
  cfg = tiny_run.make(folder)
  straight = folder / '40'
  train.run(cfg, straight)
  want, documents = committed(cfg, straight, 40)
  assert documents['progress'] == {'step': 40, 'tokens': cfg.train.total_tokens}
  assert np.any(np.asarray(want['train']['router']['moe']))
  assert np.any(np.asarray(want['train']['router']['mtp']))
  for stops in ((20,), (7, 20)):
    workdir = folder / '+'.join(map(str, stops))
    for stop in (*stops, 40):
      train.run(until(cfg, stop), workdir)
    got, same = committed(cfg, workdir, 40)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert same == documents
    assert told(workdir) == told(straight)
  assert len(told(straight)) == 40
  for line in told(straight):
    done = line['step'] - 1
    seen = tiny_run.tokens_after(done)
    assert line['lr'] == np.float32(optim.lr_at(cfg.optim.lr, done, seen))
    assert line['skipped'] == 0
  for name in ('loss.png', 'samples.txt', 'config.json', 'tokenizer.json'):
    assert (straight / name).stat().st_size > 0
  first, *_, last = told(straight)
  assert last['loss'] < first['loss'] - 0.5


def test_batch_ramp_does_not_recompile(folder):
  """Two rows a step at first, four later: one program."""
  cfg = tiny_run.make(folder)
  compiled = []
  watch = lambda name, seconds, **kw: compiled.append(kw.get('fun_name'))
  jax.monitoring.register_event_duration_secs_listener(watch)
  try:
    train.run(cfg, folder / 'ramp')
  finally:
    jax.monitoring.clear_event_listeners()
  rows = {line['tokens'] for line in told(folder / 'ramp')}
  gaps = set(np.diff(sorted(rows)).tolist())
  assert gaps == {2 * 32, 4 * 32}
  assert compiled.count('step') + compiled.count('jit(step)') <= 3
  assert any(name and 'step' in name for name in compiled)


def test_non_finite_loss_stops_before_the_optimizer(folder, monkeypatch):
  """The error tells step and metrics; the last checkpoint stands."""
  cfg, workdir = tiny_run.make(folder), folder / 'nan'
  train.run(until(cfg, 5), workdir)
  want, _ = committed(cfg, workdir, 5)
  real = optim.lr_at
  broken = lambda lr, step, tokens: (
    float('nan') if step == 6 else real(lr, step, tokens)
  )
  monkeypatch.setattr(optim, 'lr_at', broken)
  with pytest.raises(train.NonFiniteError) as caught:
    train.run(cfg, workdir)
  step, said = caught.value.args
  assert step == 8  # step 7 wrote NaN weights, step 8's loss showed it
  assert not np.isfinite(said['loss'])
  assert store.Store(workdir / 'checkpoints', keep=10).steps() == [5]
  got, _ = committed(cfg, workdir, 5)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.usefixtures('optimized')
def test_going_back_makes_the_later_steps_anew(folder):
  """restore_step: later steps are moved aside, and come out the same."""
  cfg = tiny_run.make(folder, checkpoint__every_steps=4, eval__every_steps=4)
  workdir = folder / 'back'
  train.run(until(cfg, 12), workdir)
  want, _ = committed(cfg, workdir, 12)
  back = dataclasses.replace(cfg.checkpoint, restore_step=4)
  backwards = dataclasses.replace(cfg, checkpoint=back)
  # A start that does not get there leaves the request unanswered.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store.Store, 'roll_back', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train.run(until(backwards, 12), workdir)
  train.run(until(backwards, 12), workdir)
  got, _ = committed(cfg, workdir, 12)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  names = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  assert names == ['000000004', '000000008', '000000008.aside-1',
                   '000000012', '000000012.aside-1']  # fmt: skip
  assert [line['step'] for line in told(workdir)] == list(range(1, 13))
  lines = metrics.read_metrics(workdir)
  held_out = [line for line in lines if line['kind'] == 'eval']
  assert [line['step'] for line in held_out] == [4, 8, 12]
  assert held_out[-1]['tokens'] == tiny_run.tokens_after(12)

  # It goes on with its own tokenizer, whatever becomes of the cache; with
  # another corpus it does not.
  shutil.rmtree(cfg.data.cache_dir)
  # Asked again it goes on, so that a stopped run can be started again.
  train.run(until(backwards, 13), workdir)
  assert len(list((workdir / 'checkpoints').glob('*.aside-*'))) == 2
  assert [line['step'] for line in told(workdir)] == list(range(1, 14))
  (folder / 'corpus' / 'more.txt').write_text('more text', encoding='utf-8')
  try:
    with pytest.raises(errors.InputError, match=r'the corpus is .* but .*back'):
      train.run(until(cfg, 14), workdir)
  finally:
    (folder / 'corpus' / 'more.txt').unlink()
  assert not pathlib.Path(cfg.data.cache_dir).exists()


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'data__tokenizer': 'big'}, 'model.vocab_size=512 must be >= 600'),
    ({'sample__prompts': ('def ' * 99,)}, 'sample.prompts: prompt 0 has'),
  ],
)
def test_refused_before_a_workdir_is_made(folder, tmp_path, changes, said):
  tiny_run.make(folder)  # writes the corpus
  if 'data__tokenizer' in changes:
    texts = [p.read_text() for p in (folder / 'corpus').glob('*.txt')]
    tokenizers.train(texts, 600).save(tmp_path / 'big.json')
    changes = {'data__tokenizer': str(tmp_path / 'big.json')}
  cfg = tiny_run.make(folder, **changes)
  with pytest.raises(errors.InputError, match=re.escape(said)):
    train.run(cfg, tmp_path / 'run')
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


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v3_671b', 'v3_16b', 'ablations.fp8'])
def test_every_experiment_runs_locally(folder, name):
  """Rematerialised on two devices; on conversations; in FP8."""
  source = importlib.import_module(f'experiments.{name}').get_config('runlocal')
  changes = tiny_run.overrides(folder, steps=3)
  if name == 'v3_671b':
    changes |= {'parallel.data': 2}
  elif name == 'v3_16b':
    changes |= {'data.source': chats(folder), 'data.isolate_samples': True}
    changes |= {'model.mtp.depth': 0, 'precision': 'bf16'}
  with source.unlocked():
    source.update_from_flattened_dict(changes)
  cfg = config.from_config_dict(source)
  if name == 'ablations.fp8':
    assert cfg.precision == 'fp8'
  else:
    assert cfg.model.scan_layers and cfg.model.remat == 'report'
  final = train.run(cfg, folder / name)
  assert 0 < final['loss_nats_per_token'] < 1.2 * np.log(cfg.model.vocab_size)
  assert len(told(folder / name)) == 3
  assert (folder / name / 'samples.txt').stat().st_size > 0


def test_probe_agrees_and_can_disagree(folder, monkeypatch):
  cfg = tiny_run.make(folder, train__probe_every=2)
  cfg = until(cfg, 4)
  train.run(cfg, folder / 'probe')
  other = dataclasses.replace(cfg, train=dataclasses.replace(
    cfg.train, probe_every=0))  # fmt: skip
  train.run(other, folder / 'no probe')
  a, _ = committed(cfg, folder / 'probe', 4)
  b, _ = committed(cfg, folder / 'no probe', 4)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  monkeypatch.setattr(steps, 'same_bits', lambda a, b: jnp.bool_(False))
  shutil.rmtree(folder / 'probe')
  with pytest.raises(train.CorruptionError, match='step 0 gave different bits'):
    train.run(cfg, folder / 'probe')


# The step alone.


@functools.cache
def compiled_step(**changes):
  """A step of a tiny model, its fresh state and a batch."""
  settings_ = {
    'precision': 'f32',
    'train__batch_size': 4,
    'train__batch_size_start': 4,
    'train__microbatch_size': 2,
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


def test_micro_batches_add_up_to_one_batch():
  """Two micro-batches of 2 rows == one of 4, to f32 rounding."""
  _, step, state, batch, hyper = tiny_step()
  whole = jax.tree.map(lambda x: x.reshape(1, 4, -1), batch)
  twice, told_twice = step(state, batch, jnp.int32(2), hyper)
  once, told_once = step(state, whole, jnp.int32(1), hyper)
  for name in ('loss', 'mtp_loss', 'balance', 'grad_norm'):
    np.testing.assert_allclose(told_twice[name], told_once[name], rtol=1e-5)
  grads = lambda s: s['opt'].mean  # after one step: 0.1 g
  for a, b in zip(
    *map(jax.tree.leaves, (grads(twice), grads(once))), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
  assert equal(twice['router'], once['router'])


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
  new, told_ = step(state, batch, jnp.int32(2), hyper)
  assert bool(told_['halted'])
  for name in ('params', 'opt', 'router'):
    assert equal(new[name], state[name])
  # Nothing moves afterwards either, though the loss is finite again.
  new['params']['head']['w'] = jnp.zeros_like(new['params']['head']['w'])
  after, told_ = step(new, batch, jnp.int32(2), hyper)
  assert bool(told_['halted'])
  assert np.isfinite(told_['loss'])
  assert equal(after['params'], new['params'])


def test_spike_is_skipped_and_training_goes_on():
  _, step, state, batch, hyper = tiny_step(train__spike_sigmas=4.0)
  guard = state['guard'] | {
    'mean': jnp.float32(0.1),
    'variance': jnp.float32(0.01),
    'count': jnp.int32(100),
  }
  new, told_ = step(state | {'guard': guard}, batch, jnp.int32(2), hyper)
  assert bool(told_['skipped'])
  assert not bool(told_['halted'])
  assert equal(new, state | {'guard': guard | {'skips': jnp.int32(1)}})
  # Five in a row: the loss has moved for good, and counts.
  for skips, skipped in ((4, True), (5, False)):
    worn = guard | {'skips': jnp.int32(skips)}
    new, told_ = step(state | {'guard': worn}, batch, jnp.int32(2), hyper)
    assert bool(told_['skipped']) == skipped
  assert (new['guard']['count'], new['guard']['skips']) == (1, 0)
  assert new['guard']['mean'] == told_['loss']
  assert not equal(new['params'], state['params'])
  calm = guard | {'mean': told_['loss']}
  new, told_ = step(state | {'guard': calm}, batch, jnp.int32(2), hyper)
  assert not bool(told_['skipped'])
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
