"""Layouts train as one device does; a subset that covers every feature.

The whole table is `dsv3 bench layouts`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts

# Cases of one model share its run on one device.
USUAL = {
  'model.num_layers': 4,
  'model.num_dense_layers': 2,
  'model.remat': 'report',
  'train.batch_size': 128,
  'train.spike_sigmas': 3.0,
}
UNUSUAL = {
  **layouts.FEATURES['MTP 2, pre-norm, valid'],
  **layouts.FEATURES['batch balance'],
  **layouts.FEATURES['isolated'],
  **layouts.FEATURES['unrolled'],
  'model.num_layers': 4,
  'model.num_dense_layers': 0,
}
DUALPIPE = {'pipe': 4, 'data': 2, 'schedule': 'dualpipe'}
FSDP = {'parallel.fsdp': ('data', 'node', 'expert')}
FOUR_LAYERS = {'model.num_layers': 4}
CASES = {
  'FSDP': ({'data': 2, 'node': 2, 'expert': 2}, USUAL | FSDP),
  'dualpipe, dense over two stages': (DUALPIPE, USUAL),
}
NIGHTLY = {
  'dualpipev, unusual': (
    {'pipe': 2, 'context': 2, 'schedule': 'dualpipev'},
    UNUSUAL,
  ),
  'zb1p, fp8': (
    {'pipe': 2, 'expert': 2, 'schedule': 'zb1p'},
    layouts.FEATURES['fp8']
    | {'model.remat': 'full', 'parallel.fsdp': ('expert',)},
  ),
  'zb1p, FSDP': (
    {'pipe': 2, 'expert': 2, 'data': 2, 'schedule': 'zb1p'},
    USUAL | FSDP,
  ),
  'dualpipev': (
    {'pipe': 2, 'context': 2, 'expert': 2, 'schedule': 'dualpipev'},
    USUAL,
  ),
  '1f1b, unusual': ({'pipe': 2, 'context': 2, 'schedule': '1f1b'}, UNUSUAL),
  'interleaved, unusual': ({'pipe': 2, 'schedule': 'interleaved'}, UNUSUAL),
  'flat': ({'data': 2, 'node': 2, 'expert': 2}, {}),
  'dualpipe of eight layers': (DUALPIPE, {'model.num_dense_layers': 3}),
  'dualpipe, all dense': (
    {'pipe': 2, 'data': 2, 'schedule': 'dualpipe'},
    FOUR_LAYERS | {'model.num_dense_layers': 4},
  ),
  'V2 balance': (
    {'pipe': 2, 'context': 2, 'expert': 2, 'schedule': 'dualpipev'},
    FOUR_LAYERS | layouts.FEATURES['V2 balance'],
  ),
  'interleaved, no MTP': (
    {'pipe': 2, 'schedule': 'interleaved'},
    FOUR_LAYERS | layouts.FEATURES['no MTP'],
  ),
  'gpipe, MTP 2': (
    {'pipe': 2, 'context': 2, 'schedule': 'gpipe'},
    FOUR_LAYERS | layouts.FEATURES['MTP 2, pre-norm, valid'],
  ),
  'context, FSDP': (
    {'context': 2, 'expert': 2, 'data': 2},
    {
      'model.num_layers': 2,
      'model.remat': 'report',
      'parallel.fsdp': ('data', 'context'),
    },
  ),
}


def assert_is_one_device(axes, changes, num_steps):
  cfg = layouts.make_config(axes, changes)
  row = layouts.compare(cfg, num_steps if cfg.precision == 'f32' else 1)
  assert not layouts.is_wrong(row, cfg.precision), row


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_layout_is_one_device(name):
  assert_is_one_device(*CASES[name], num_steps=3)


@pytest.mark.nightly
@pytest.mark.parametrize('name', NIGHTLY)
def test_other_layout_is_one_device(name):
  assert_is_one_device(*NIGHTLY[name], num_steps=5)


def trained(axes):
  """Metrics of steps with a ramp, rows of padding, a spike and a NaN.

  And how many programs were compiled after each step.
  """
  cfg = layouts.make_config(axes, USUAL)
  trainer, step = layouts.compiled(cfg)
  state = jax.device_put(
    layouts.start(layouts.alone(cfg)), trainer.model_shardings()
  )
  state = trainer.from_model(state)
  spike_state = {'count': jnp.int32(60), 'mean': jnp.float32(3.5)}
  state['guard'] |= spike_state | {'variance': jnp.float32(0.01)}
  state = jax.device_put(state, trainer.shardings())
  values, compiled = [], []
  hyper = {name: jnp.float32(x) for name, x in layouts.HYPER.items()}
  for number, count in enumerate((8, 16, 12, 16, 16)):
    batch = layouts.batch(cfg, 10 + number)  # no near tie of the gate
    if number == 1:  # half of the rows of half of the micro-batches
      batch = jax.tree.map(lambda x: x.at[::2, :4].set(0), batch)
    if number == 3:  # targets that no model would guess: a spike
      weights = batch.weights_BT * 1.0
      batch = batch._replace(weights_BT=weights.at[:, :, 1:].set(0.0))
      state['guard'] |= {'mean': jnp.float32(0.0)}
      state = jax.device_put(state, trainer.shardings())
    if number == 4:
      state['params']['final_norm']['norm'] *= jnp.float32(np.nan)
      state = jax.device_put(state, trainer.shardings())
    batch = jax.device_put(batch, trainer.batch_sharding())
    state, out = step(state, batch, trainer.num_microbatches(count), hyper)
    values.append(jax.device_get(out))
    compiled.append(step._cache_size())
  return values, compiled


@pytest.mark.slow
def test_ramp_padding_spike_and_nan_are_as_on_one_device():
  values, compiled = trained(DUALPIPE)
  want, _ = trained({})
  assert compiled == [1] * 5  # the table is an input
  for got, one in zip(values[:4], want[:4], strict=True):
    assert max(layouts.error(got[name], one[name]) for name in one) < 2e-6
  assert [bool(x['skipped']) for x in want] == [0, 0, 0, 1, 0]
  assert [bool(x['skipped']) for x in values] == [0, 0, 0, 1, 0]
  assert [bool(x['halted']) for x in values] == [0, 0, 0, 0, 1]


def test_a_wrong_gradient_is_seen():
  row = {
    'metrics': 0.0,
    'gradients': 1e-7,
    'weights': 3e-6,
    'biases_equal': True,
  }
  assert layouts.is_wrong(row, 'f32')
  row['weights'] = 1e-6
  assert not layouts.is_wrong(row, 'f32')
  assert layouts.is_wrong(row | {'biases_equal': False}, 'f32')
  assert layouts.is_wrong(row | {'gradients': float('nan')}, 'f32')
  for name in ('gradients_scale', 'weights_scale'):
    row |= {'gradients_scale': 0.01, 'weights_scale': 1e-5}
    assert not layouts.is_wrong(row, 'fp8')
    assert layouts.is_wrong(row | {name: 0.06}, 'fp8')


def test_the_table_covers_meshes_times_schedules():
  names = [case.name for case in layouts.table()]
  assert len(names) == len(set(names)) > 80
  for kind in layouts.KINDS:
    assert f'{kind} pipe4 data2' in names
    assert f'{kind} pipe2 expert2 node2' in names
    assert f'{kind} pipe2 expert2 context2' in names
