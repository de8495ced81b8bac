"""Draws follow the distribution that temperature and nucleus give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import sampling
from tests.inference import sampling_arrays

_DRAWS = 20_000


def draw(probs_V, temperature, top_p, top_k=0, seed=0):
  """Counts of many draws from one distribution."""
  logits = jnp.log(jnp.asarray(probs_V, jnp.float32))
  rows = jnp.broadcast_to(logits, (_DRAWS, len(probs_V)))
  full = lambda x: jnp.full(_DRAWS, x)
  keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(seed), _DRAWS))
  arrays = sampling_arrays.make(
    keys_B2, full(temperature), full(top_k), full(float(top_p))
  )
  ids = jax.jit(sampling.sample)(rows, arrays, full(7))
  return np.bincount(ids, minlength=len(probs_V))


def chi_squared(counts, probs):
  expected = _DRAWS * np.asarray(probs)
  live = expected > 0
  assert not counts[~live].any()
  return float(((counts - expected)[live] ** 2 / expected[live]).sum())


def test_temperature_one_is_the_distribution():
  probs = np.array([0.5, 0.25, 0.125, 0.1, 0.025])
  assert chi_squared(draw(probs, 1.0, 1.0), probs) < 18.5  # p = 0.001, 4 dof


def test_temperature_sharpens_by_its_power():
  probs = np.array([0.4, 0.3, 0.2, 0.1])
  want = probs**2 / (probs**2).sum()
  assert chi_squared(draw(probs, 0.5, 1.0), want) < 16.3  # 3 dof


def test_the_nucleus_is_renormalised():
  probs = np.array([0.1, 0.4, 0.2, 0.3])
  want = np.array([0.0, 0.4, 0.2, 0.3]) / 0.9
  assert chi_squared(draw(probs, 1.0, 0.85), want) < 13.8  # 2 dof


def test_top_k_is_renormalised():
  probs = np.array([0.1, 0.4, 0.2, 0.3])
  want = np.array([0.0, 0.4, 0.0, 0.3]) / 0.7
  assert chi_squared(draw(probs, 1.0, 1.0, top_k=2), want) < 10.8  # 1 dof
  # The nucleus is one of what is left: 4/7 of it alone is less than 0.6.
  assert chi_squared(draw(probs, 1.0, 0.6, top_k=2), want) < 10.8
  counts = draw(probs, 1.0, 0.55, top_k=2)
  assert counts.tolist() == [0, _DRAWS, 0, 0]


@pytest.mark.parametrize('temperature', [1e-6, 1e-9, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature):
  rng = np.random.default_rng(0)
  logits_BV = jnp.float32(rng.normal(0.0, 3.0, (40, 280)))
  keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(3), 40))
  full = lambda x: jnp.full(40, x)
  arrays = sampling_arrays.make(keys_B2, full(temperature), full(0), full(0.95))
  ids = jax.jit(sampling.sample)(logits_BV, arrays, full(0))
  np.testing.assert_array_equal(ids, np.argmax(logits_BV, axis=-1))


def test_rows_have_their_own_sampling_parameters():
  """Greedy, hot and top-k rows in one batch."""
  logits_BV = jnp.log(jnp.array([[0.1, 0.6, 0.3]] * 3000))
  keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(3), 3000))
  kind_B = np.arange(3000) % 3
  temperature_B = jnp.where(kind_B == 0, 0.0, 1.0)
  top_k_B = jnp.where(kind_B == 2, 2, 0)
  arrays = sampling_arrays.make(keys_B2, temperature_B, top_k_B, jnp.ones(3000))
  ids = np.asarray(
    sampling.sample(logits_BV, arrays, jnp.zeros(3000, jnp.int32))
  )
  assert set(ids[kind_B == 0]) == {1}
  assert set(ids[kind_B == 1]) == {0, 1, 2}
  assert set(ids[kind_B == 2]) == {1, 2}
