"""The deterministic mode: the same bits on 1, 2, 4 and 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.training import step as steps

pytestmark = pytest.mark.usefixtures('optimized')
STEPS = 50
MESHES = (
  {'data': 2},
  {'expert': 4},
  {'data': 2, 'node': 2, 'expert': 2},
)


@functools.cache
def losses(deterministic, **axes):
  """Loss and norm of each step, and the last state in bits."""
  changes = layouts.FEATURES['unrolled'] | {
    'model.num_layers': 2,
    'model.moe.top_groups': 4,
    'train.batch_size': 16,
    'parallel.deterministic': deterministic,
  }
  cfg = layouts.make_config(axes, changes)
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  state = jax.device_put(layouts.start(cfg), trainer.shardings())
  step, results = trainer.jit(), []
  hyper = {name: jnp.float32(x) for name, x in layouts.HYPER.items()}
  for number in range(STEPS):
    batch = layouts.batch(cfg, number)
    batch = jax.device_put(batch, trainer.batch_sharding())
    state, metrics = step(state, batch, trainer.num_microbatches(2), hyper)
    results.append(metrics)
  return jax.device_get(results), jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_fifty_steps_are_bitwise_equal_on_any_mesh(axes):
  metrics, state = losses(True, **axes)
  want, right = losses(True)
  for number, (got, one) in enumerate(zip(metrics, want, strict=True)):
    for name in one:
      assert got[name].tobytes() == one[name].tobytes(), (number, name)
  assert bool(steps.same_bits(state, right))


@pytest.mark.slow
def test_it_is_the_plain_step_to_rounding_which_itself_is_not_bitwise():
  want, _ = losses(True)
  plain, _ = losses(False)
  spread, _ = losses(False, data=2, node=2, expert=2)
  loss = lambda metrics: np.array([x['loss'] for x in metrics])
  np.testing.assert_allclose(loss(want), loss(plain), rtol=1e-4)
  assert np.any(loss(plain) != loss(spread))
