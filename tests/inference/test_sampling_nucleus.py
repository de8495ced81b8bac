"""Nuclei of many rows at once, ties, extremes; rows that draw alone."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.inference import sampling
from tests.inference import sampling_arrays


def draws(keys_B, temperature, top_p):
  full = lambda x: jnp.full(len(keys_B), x)
  return sampling_arrays.make(
    jax.random.key_data(keys_B), full(temperature), full(0), full(top_p)
  )


@jax.jit
def sample(logits_BV, keys_B, temperature, top_p):
  arrays = draws(keys_B, temperature, top_p)
  return sampling.sample(
    logits_BV, arrays, jnp.zeros(len(logits_BV), jnp.int32)
  )


@jax.jit
def nucleus(logits_BV, top_p):
  keys_B = jax.random.split(jax.random.key(0), len(logits_BV))
  return sampling.candidate_mask(
    logits_BV, draws(keys_B, jnp.float32(1.0), top_p)
  )


def smallest_set(weights_V, numerator, denominator):
  """Brute force in whole numbers: the fewest whose mass reaches the share.

  The most likely ones, and whatever ties with the least likely of them.
  """
  total, mass, least = sum(weights_V), 0, max(weights_V)
  for weight in sorted(weights_V, reverse=True):
    if mass and mass * denominator >= numerator * total:
      break
    mass, least = mass + weight, weight
  return np.array([weight >= least for weight in weights_V])


@hypothesis.given(
  rows=st.lists(
    st.lists(st.integers(1, 9), min_size=6, max_size=6), min_size=3, max_size=3
  ),
  numerator=st.integers(1, 1000),
)
def test_every_row_keeps_its_smallest_set(rows, numerator):
  # Shares that a sum of weights hits exactly are left to the next test.
  top_p = (numerator + 0.5) / 1001
  got_BV = nucleus(jnp.log(jnp.float32(rows)), jnp.float32(top_p))
  want_BV = [smallest_set(row, 2 * numerator + 1, 2002) for row in rows]
  np.testing.assert_array_equal(got_BV, want_BV)


@pytest.mark.parametrize(
  ('weights', 'top_p', 'kept'),
  [
    ([8, 4, 2, 1, 1], 0.5, [1, 0, 0, 0, 0]),  # the first reaches it exactly
    ([8, 4, 2, 1, 1], 0.75, [1, 1, 0, 0, 0]),
    ([8, 4, 2, 1, 1], 0.9, [1, 1, 1, 1, 1]),  # one of two that tie is needed
    ([1, 1, 1, 1, 1], 0.1, [1, 1, 1, 1, 1]),
    ([1, 2, 8, 4, 1], 0.7, [0, 0, 1, 1, 0]),  # in any order
    ([1, 2, 8, 4, 1], 1e-6, [0, 0, 1, 0, 0]),  # never none
  ],
)
def test_nuclei_by_hand(weights, top_p, kept):
  got_BV = nucleus(jnp.log(jnp.float32([weights])), jnp.float32(top_p))
  np.testing.assert_array_equal(got_BV[0], np.bool_(kept))


def test_top_p_1_keeps_all_however_unlikely():
  # In f32 the first alone has a mass of 1.
  logits_BV = jnp.array([[0.0, -25.0, -30.0, -80.0], [0.0, 0.0, -18.0, 5.0]])
  assert np.all(nucleus(logits_BV, jnp.float32(1.0)))
  assert not np.any(nucleus(logits_BV, jnp.float32(0.999))[0, 1:])


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.5, 1.0, 3.0]))
def test_what_is_drawn_lies_in_the_nucleus(seed, temperature):
  rng = np.random.default_rng(seed)
  logits_BV = jnp.float32(rng.normal(0.0, 2.0, (64, 9)))
  keys = jax.random.split(jax.random.key(seed), 64)
  args = (logits_BV, keys, jnp.float32(temperature), jnp.float32(0.6))
  ids_B = sample(*args)
  kept_BV = nucleus(logits_BV / temperature, jnp.float32(0.6))
  assert np.all(kept_BV[jnp.arange(64), ids_B])
  np.testing.assert_array_equal(sample(*args), ids_B)


def test_a_row_draws_by_its_own_key_alone():
  rng = np.random.default_rng(0)
  logits_BV = jnp.float32(rng.normal(size=(32, 50)))
  keys = jax.random.split(jax.random.key(4), 32)
  arrays = (jnp.float32(1.0), jnp.float32(0.95))
  together_B = sample(logits_BV, keys, *arrays)
  for b in range(0, 32, 5):
    one = slice(b, b + 1)
    np.testing.assert_array_equal(
      sample(logits_BV[one], keys[one], *arrays), together_B[one]
    )
  backwards_B = sample(logits_BV[::-1], keys[::-1], *arrays)
  np.testing.assert_array_equal(backwards_B[::-1], together_B)
  assert np.any(sample(logits_BV, keys[::-1], *arrays) != together_B)


def test_greedy_takes_the_first_of_equals_and_no_key_matters():
  logits_BV = jnp.array([[1.0, 7.0, 7.0], [2.0, 2.0, 2.0], [-9.0, -9.0, -1.0]])
  for seed in (0, 1):
    keys = jax.random.split(jax.random.key(seed), 3)
    ids_B = sample(logits_BV, keys, jnp.float32(0.0), jnp.float32(0.3))
    assert ids_B.tolist() == [1, 0, 2] and ids_B.dtype == jnp.int32


@pytest.mark.parametrize('beside', [(0, 1.0), (3, 1.0), (0, 0.7)])
def test_who_keeps_all_draws_alike_beside_one_who_does_not(beside):
  logits_BV = jax.random.normal(jax.random.key(0), (2, 50))
  keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(1), 2))
  top_k_B = jnp.array([0, beside[0]])
  arrays = sampling_arrays.make(
    keys_B2, jnp.ones(2), top_k_B, jnp.array([1, beside[1]])
  )
  drawn = jax.jit(sampling.sample)
  at = lambda count, i: jnp.full(count, i, jnp.int32)
  got = [int(drawn(logits_BV, arrays, at(2, i))[0]) for i in range(40)]
  one = jax.tree.map(lambda x: x[:1], arrays)
  want = [int(drawn(logits_BV[:1], one, at(1, i))[0]) for i in range(40)]
  assert got == want and len(set(got)) > 10
