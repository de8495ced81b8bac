"""RMSNorm and SwiGLU against the oracles, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import linear, norm
from tests import gradients, tolerances
from tests.oracles import mla, moe

EPS = 1e-6
PLAIN = precision.POLICIES['f32']


@pytest.mark.parametrize('shape', [(3, 8), (2, 3, 5), (7,), (2, 1)])
def test_rms_norm_matches_the_oracle(shape):
  rng = np.random.default_rng(0)
  x, weight_D = rng.normal(size=shape), rng.normal(size=shape[-1])
  got = norm.rms_norm(jnp.float32(x), jnp.float32(weight_D), EPS)
  tolerances.assert_close(got, mla.rms_norm(x, weight_D, EPS))


def test_rms_norm_gradients_match_the_oracle():
  rng = np.random.default_rng(1)
  values = {'x': rng.normal(size=(4, 6)), 'w': rng.normal(size=6)}
  dy = rng.normal(size=(4, 6))
  loss = lambda v: jnp.sum(norm.rms_norm(v['x'], v['w'], EPS) * dy)
  grads = jax.grad(loss)(jax.tree.map(jnp.float32, values))
  oracle = lambda v: np.sum(mla.rms_norm(v['x'], v['w'], EPS) * dy)
  gradients.assert_matches(grads, oracle, values)


def test_rms_norm_of_zero_is_zero_with_a_finite_gradient():
  ones = jnp.ones(4)
  assert not np.any(norm.rms_norm(jnp.zeros((2, 4)), ones, EPS))
  grad = jax.grad(lambda x: jnp.sum(norm.rms_norm(x, ones, EPS)))
  np.testing.assert_allclose(grad(jnp.zeros((2, 4))), 1e3, rtol=1e-6)


def test_rms_norm_keeps_bf16_and_makes_its_statistics_in_f32():
  x = np.random.default_rng(2).normal(size=(2, 4096))
  got = norm.rms_norm(jnp.bfloat16(x), jnp.ones(4096), EPS)
  assert got.dtype == jnp.bfloat16
  x = np.asarray(jnp.bfloat16(x), np.float64)
  want = jnp.bfloat16(mla.rms_norm(x, np.ones(4096), EPS))
  # One rounding at the end: nearly all entries are the nearest bf16.
  assert np.mean(np.asarray(got == want)) > 0.99


def test_swiglu_matches_the_oracle_with_its_gradients():
  rng = np.random.default_rng(3)
  shapes = {'x': (3, 4), 'gate': (4, 5), 'up': (4, 5), 'down': (5, 4)}
  values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  dy = rng.normal(size=(3, 4))
  swiglu = functools.partial(linear.swiglu, policy=PLAIN)
  apply = lambda f, v: f(v['x'], v['gate'], v['up'], v['down'])
  loss = lambda v: jnp.sum(apply(swiglu, v) * dy)
  f32 = jax.tree.map(jnp.float32, values)
  got, grads = jax.value_and_grad(loss)(f32)
  oracle = lambda v: np.sum(apply(moe.swiglu, v) * dy)
  want = apply(moe.swiglu, values)
  tolerances.assert_close(apply(swiglu, f32), want)
  assert float(got) == pytest.approx(oracle(values), rel=1e-5)
  gradients.assert_matches(grads, oracle, values)
