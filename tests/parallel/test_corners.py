"""Shapes and moments at the edge of what a pipeline meets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.training import step as steps

AXES = {'pipe': 2, 'data': 2, 'schedule': 'dualpipe'}
FOUR = {'model.num_layers': 4}


@pytest.mark.slow
def test_layers_may_all_be_dense():
  cfg = layouts.make_config(AXES, FOUR | {'model.num_dense_layers': 4})
  row = layouts.compare(cfg, num_steps=1)
  assert not layouts.is_wrong(row, 'f32'), row


@functools.cache
def trained(**axes):
  """Told of steps with a ramp, rows of padding, a spike and a NaN; compiles."""
  changes = FOUR | {'train.spike_sigmas': 3.0}
  cfg = layouts.make_config(axes, changes)
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  state = jax.device_put(layouts.start(cfg), trainer.model_shardings())
  state = trainer.from_model(state)
  spike_state = state['guard'] | {
    'count': jnp.int32(60),
    'mean': jnp.float32(3.5),
  }
  state['guard'] = spike_state | {'variance': jnp.float32(0.01)}
  state = jax.device_put(state, trainer.shardings())
  step, values, compiled = trainer.jit(), [], []
  hyper = {name: jnp.float32(x) for name, x in layouts.HYPER.items()}
  for number, count in enumerate((4, 8, 6, 8, 8)):
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
  values, compiled = trained(**AXES)
  want, _ = trained()
  assert compiled == [1] * 5  # the table is an input
  for got, one in zip(values[:4], want[:4], strict=True):
    assert max(layouts.error(got[name], one[name]) for name in one) < 2e-6
  assert [bool(x['skipped']) for x in want] == [0, 0, 0, 1, 0]
  assert [bool(x['skipped']) for x in values] == [0, 0, 0, 1, 0]
  assert [bool(x['halted']) for x in values] == [0, 0, 0, 0, 1]
