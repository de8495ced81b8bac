"""Draws follow the distribution that temperature and nucleus give."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.inference import sampling

_DRAWS = 20_000


def draw(probs_V, temperature, top_p, seed=0):
  """Counts of many draws from one distribution."""
  logits = jnp.log(jnp.asarray(probs_V, jnp.float32))
  keys = jax.random.split(jax.random.key(seed), _DRAWS)
  rows = jnp.broadcast_to(logits, (_DRAWS, len(probs_V)))
  run = jax.jit(sampling.sample)
  ids = run(rows, keys, jnp.float32(temperature), jnp.float32(top_p))
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


def test_nucleus_is_cut_and_renormalised():
  probs = np.array([0.1, 0.4, 0.2, 0.3])
  want = np.array([0.0, 0.4, 0.2, 0.3]) / 0.9
  assert chi_squared(draw(probs, 1.0, 0.85), want) < 13.8  # 2 dof
