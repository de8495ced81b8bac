"""The deterministic mode: the same bits on 1, 2, 4 and 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.training import step as steps

STEPS = 50
EIGHT = {'data': 2, 'node': 2, 'expert': 2}
MESHES = (
  pytest.param({'data': 2}, 5, id='data'),
  pytest.param({'expert': 4}, 5, id='expert'),
  pytest.param(EIGHT, STEPS, id='long'),
)


@functools.cache
def losses(deterministic, num_steps, **axes):
  """Loss and norm of each step, and the state after each in bits."""
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
  for number in range(num_steps):
    batch = layouts.batch(cfg, number)
    batch = jax.device_put(batch, trainer.batch_sharding())
    state, metrics = step(state, batch, trainer.num_microbatches(2), hyper)
    results.append(jax.device_get((metrics, state)))
  return results


@pytest.mark.slow
def test_two_steps_are_bitwise_equal_on_eight_devices():
  assert_same_bits(EIGHT, 2)


@pytest.mark.nightly
@pytest.mark.usefixtures('optimized')  # and what follows
@pytest.mark.parametrize(('axes', 'num_steps'), MESHES)
def test_steps_are_bitwise_equal_on_any_mesh(axes, num_steps):
  losses.cache_clear()  # of what was compiled with few optimisations
  assert_same_bits(axes, num_steps)


def assert_same_bits(axes, num_steps):
  spread, one = losses(True, num_steps, **axes), losses(True, num_steps)
  pairs = zip(spread, one, strict=True)
  number = 0
  for number, ((got, state), (want, right)) in enumerate(pairs, start=1):
    for name in want:
      assert got[name].tobytes() == want[name].tobytes(), (number, name)
    assert bool(steps.same_bits(state, right)), number
  assert number == num_steps


@pytest.mark.nightly
def test_it_is_the_plain_step_to_rounding_which_itself_is_not_bitwise():
  loss = lambda results: np.array([metrics['loss'] for metrics, _ in results])
  plain = loss(losses(False, 10))
  spread = loss(losses(False, 10, **EIGHT))
  np.testing.assert_allclose(loss(losses(True, 10)), plain, rtol=1e-5)
  assert np.any(plain != spread)
