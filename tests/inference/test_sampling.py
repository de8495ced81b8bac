"""Draws follow the distribution, and a nucleus is the smallest set."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

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


def test_greedy_is_argmax():
  logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 4.9, 0.0]])
  keys = jax.random.split(jax.random.key(0), 2)
  ids = sampling.sample(logits, keys, jnp.float32(0.0), jnp.float32(0.5))
  assert ids.tolist() == [1, 0]


@hypothesis.given(
  st.lists(st.integers(1, 50), min_size=2, max_size=8), st.floats(0.05, 1.0)
)
def test_smallest_set_whose_mass_reaches_top_p(weights, top_p):
  """Brute force; what ties with the last one kept is kept."""
  probs = np.array(weights) / sum(weights)
  mass, kept = 0.0, set()
  for i in np.argsort(-probs, kind='stable'):
    if mass >= top_p - 1e-6:
      break
    mass += probs[i]
    kept.add(int(i))
  least = min(probs[i] for i in kept)
  want = {i for i, p in enumerate(probs) if p >= least}
  logits = jnp.log(jnp.asarray(probs, jnp.float32))[None]
  got = sampling._nucleus(logits, jnp.float32(top_p - 1e-6))
  assert set(np.flatnonzero(got[0]).tolist()) == want
