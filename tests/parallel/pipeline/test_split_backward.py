"""Backward passes in two parts: gradients of `jax.vjp`, nothing done twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.pipeline import split_backward
from tests.parallel.pipeline import stages

ROWS, DIM, WIDTH, OUT = 6, 5, 7, 3


def draw(shape, seed, dtype='float32'):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def mlp(params, x, consts):
  """Two linears; a loss and counts as `aux`."""
  hidden = jnp.tanh(x @ params['up'].astype(x.dtype))
  y = hidden @ params['down'].astype(x.dtype) + consts
  aux = {'loss': jnp.mean(jnp.square(hidden)), 'count': jnp.sum(y > 0)}
  return y, aux | {'load': jax.nn.one_hot(jnp.argmax(y, -1), OUT).sum(0)}


def mlp_args(dtype='float32'):
  params = {'up': draw((DIM, WIDTH), 0), 'down': draw((WIDTH, OUT), 1)}
  return params, draw((ROWS, DIM), 2, dtype), draw((ROWS, OUT), 3, dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_mlp(dtype):
  args = mlp_args(dtype)
  parts = stages.assert_is_vjp(mlp, args)
  product = 2 * ROWS * WIDTH * (DIM + OUT)
  for name in ('forward', 'backward_input', 'backward_weight'):
    assert stages.product_flops(parts, name) == product
  # W has of each linear its input and its output's gradient.
  want = [(ROWS, DIM), (ROWS, WIDTH), (ROWS, WIDTH), (ROWS, OUT)]
  assert sorted(s.shape for s in parts.carry) == sorted(want)
  assert {s.dtype for s in parts.carry} == {jnp.dtype(dtype)}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_parameters_and_their_casts_are_not_stored(dtype):
  args = mlp_args(dtype)
  sizes = {w.shape for w in args[0].values()}
  sizes |= {shape[::-1] for shape in sizes}
  # JAX itself keeps them: for the last product there is no way without.
  pull = jax.eval_shape(lambda *args: jax.vjp(mlp, *args)[1], *args)
  assert sizes.intersection(s.shape for s in jax.tree.leaves(pull))
  parts = split_backward.split_stage(mlp, *args)
  stored = (*parts.residuals, *parts.carry)
  assert not sizes.intersection(s.shape for s in stored)


def test_products_of_parameters_are_made_once_and_stored():
  def stage(params, x, consts):
    del consts
    return jnp.tanh(x @ (params['up'] @ params['down'])), ()

  args = mlp_args()
  parts = stages.assert_is_vjp(stage, args)
  assert (DIM, OUT) in [s.shape for s in parts.residuals]


def test_casts_are_stored_as_what_they_are_made_of():
  def stage(params, x, consts):
    del consts
    wide = jnp.broadcast_to(x.astype('float32')[:, None], (ROWS, 4, DIM))
    return jnp.sum(wide * params, axis=1), ()

  args = draw((4, DIM), 0), draw((ROWS, DIM), 1, 'bfloat16'), ()
  parts = stages.assert_is_vjp(stage, args)
  assert [s.dtype for s in parts.residuals] == [jnp.bfloat16]
  # The weight's gradient, a sum over rows, is less than what it is made of.
  assert parts.carry == (jax.ShapeDtypeStruct((4, DIM), 'float32'),)


def embedding(params, x, consts):
  """A first stage: tokens in, activations out."""
  del consts
  rows = params['table'][x['tokens']]
  return rows @ params['w'], {'tokens': x['tokens'] + 1}


def embedding_args():
  params = {'table': draw((11, DIM), 0), 'w': draw((DIM, WIDTH), 1)}
  return params, {'tokens': jnp.arange(ROWS) % 4}, ()


def test_tokens_get_no_gradient_and_leave_all_to_w():
  args = embedding_args()
  parts = stages.assert_is_vjp(embedding, args)
  assert stages.names(parts, 'backward_input') == []
  dy = jnp.ones((ROWS, WIDTH))
  *_, residuals = parts.forward(*args)
  dx, _ = parts.backward_input(args[0], residuals, dy, {'tokens': None})
  assert dx == {'tokens': None}


def test_parameters_without_use_and_without_gradient():
  def stage(params, x, consts):
    del consts
    own, steps = params['own'], params['steps']
    return x @ own['w'] * params['frozen'] + steps['count'], ()

  own = {'w': draw((DIM, DIM), 0), 'unused': draw((3,), 1)}
  params = {'own': own, 'frozen': draw((DIM,), 2)}
  params['steps'] = {'count': jnp.int32(3)}
  args = params, draw((ROWS, DIM), 3), ()
  trained = lambda params: (params['own'], params['steps'])
  parts = stages.assert_is_vjp(stage, args, trained)
  *_, residuals = parts.forward(*args)
  dy = jnp.ones((ROWS, DIM))
  _, carry = parts.backward_input(params, residuals, dy, ())
  own, steps = parts.backward_weight(params, carry)
  assert steps == {'count': None}
  np.testing.assert_array_equal(own['unused'], np.zeros(3))
  assert np.any(own['w'])


def test_none_is_a_cotangent_of_zero():
  args = mlp_args()
  parts = split_backward.split_stage(mlp, *args)
  *_, residuals = parts.forward(*args)
  run = functools.partial(parts.backward, args[0], residuals)
  dy = jnp.ones((ROWS, OUT))
  aux = {'count': None, 'load': None}
  without, zero, one = (
    run(dy, aux | {'loss': value})
    for value in (None, jnp.float32(0.0), jnp.float32(1.0))
  )
  stages.assert_near(without, zero)
  assert np.any(np.asarray(one[0]) != np.asarray(zero[0]))
  dx, dparams = run(None, aux | {'loss': jnp.float32(1.0)})
  assert np.any(dx) and np.any(dparams['up'])
  assert not np.any(dparams['down'])


def test_wrong_arguments_are_refused():
  args = mlp_args()
  parts = split_backward.split_stage(mlp, *args)
  y, aux, residuals = parts.forward(*args)
  with pytest.raises(ValueError, match=r'arguments .* must be'):
    parts.forward(args[0], {'x': args[1]}, args[2])
  for dy in (y[1:], y.astype('bfloat16')):
    with pytest.raises(ValueError, match='a cotangent is'):
      parts.backward(args[0], residuals, dy, aux)
  with pytest.raises(ValueError, match='key mismatch'):
    parts.backward(args[0], residuals, y, {})


@jax.custom_vjp
def _linear(x, w):
  return jax.jit(jnp.matmul)(x, w)


def _linear_fwd(x, w):
  return _linear(x, w), (x, w)


@jax.jit
def _linear_bwd(residuals, dy):
  x, w = residuals
  return 2.0 * (dy @ w.T), 3.0 * (x.T @ dy)


_linear.defvjp(_linear_fwd, _linear_bwd)


def test_custom_derivatives_calls_and_recomputation_are_no_obstacle():
  @jax.checkpoint
  def half(x, w):
    return jax.nn.silu(_linear(jnp.sin(x), w))

  def stage(params, x, consts):
    for w in params:
      x = jax.jit(half)(x, w) + consts
    return x, ()

  params = [draw((DIM, DIM), i) for i in range(3)]
  args = params, draw((ROWS, DIM), 7), draw((DIM,), 8)
  parts = stages.assert_is_vjp(stage, args)
  product = 2 * ROWS * DIM * DIM
  assert stages.product_flops(parts, 'backward_weight') == 3 * product
  # dx of all, and all forward products but the first again: its result is
  # needed too, as it goes through silu.
  assert stages.product_flops(parts, 'backward_input') == 6 * product


def test_a_loop_is_an_equation_and_falls_to_dx():
  def stage(params, x, consts):
    del consts
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0], ()

  args = draw((2, DIM, DIM), 0), draw((ROWS, DIM), 1), ()
  parts = stages.assert_is_vjp(stage, args)
  assert 'scan' in stages.names(parts, 'backward_input')
  assert stages.product_flops(parts, 'backward_weight') == 0
  assert [s.shape for s in parts.carry] == [(2, DIM, DIM)]  # dparams itself


def test_closed_over_arrays_are_no_residuals():
  table = np.asarray(draw((ROWS, DIM), 0))

  def stage(params, x, consts):
    del consts
    return jax.jit(lambda x: x * table)(x) @ params, ()

  args = draw((DIM, OUT), 1), draw((ROWS, DIM), 2), ()
  parts = stages.assert_is_vjp(stage, args)
  assert [s.shape for s in parts.residuals] == [(ROWS, DIM)]  # x


def test_shapes_are_enough_to_split():
  args = mlp_args()
  shapes = jax.eval_shape(lambda *args: args, *args)
  parts = split_backward.split_stage(mlp, *shapes)
  again = split_backward.split_stage(mlp, *args)
  assert (parts.residuals, parts.carry) == (again.residuals, again.carry)
  y, *_ = parts.forward(*args)
  np.testing.assert_array_equal(y, mlp(*args)[0])
