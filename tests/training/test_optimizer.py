"""Twenty steps of AdamW against the oracle; decay on a real tree; clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.nn import model
from dsv3_jax.training import optimizer as optim
from dsv3_jax.training import step as steps
from tests import gradients, settings, tolerances
from tests.nn import models
from tests.oracles import optim as oracle

BF16_UNIT = 2.0**-8  # largest relative error of rounding to BF16
SHAPES = {'w_up': (3, 5), 'kv_norm': (5,), 'w_down': (7,)}
RATE = 3e-3


def draw(seed, scale=1.0):
  """A flat tree whose values f32 holds exactly."""
  rng = np.random.default_rng(seed)
  tree = {k: scale * rng.normal(size=shape) for k, shape in SHAPES.items()}
  return float64(models.f32(tree))


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def zeros():
  return {name: np.zeros(shape) for name, shape in SHAPES.items()}


def oracle_step(cfg, params, grads, mean, square, count):
  decayed = {name: not name.endswith('norm') for name in params}
  rest = (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, decayed)
  args = (params, grads, mean, square, count, RATE)
  return oracle.adamw_step(*args, *rest)


def twenty_steps(cfg):
  """Yields number, gradients, parameters and state of each of 20 steps."""
  optimizer = optim.adamw(cfg)
  params = models.f32(draw(0))
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for n in range(1, 21):
    grads = draw(n, scale=10.0 ** (n % 4 - 2))
    args = (models.f32(grads), state, params, jnp.float32(RATE))
    params, state = update(*args)
    assert int(state.count) == n
    yield n, grads, params, state
  assert update._cache_size() == 1


def test_twenty_steps_with_f32_moments():
  cfg = settings.small(optim__moments_dtype='float32').optim
  params, mean, square = draw(0), zeros(), zeros()
  for n, grads, got, state in twenty_steps(cfg):
    params, mean, square = oracle_step(cfg, params, grads, mean, square, n)
    tolerances.assert_trees_close(got, params)
    tolerances.assert_trees_close(state.mean, mean)
    tolerances.assert_trees_close(state.square, square)


def test_bf16_moments_err_by_their_storage_alone():
  # A step adds a rounding of at most one unit of the moment, and hands beta of
  # the earlier ones on: a bound for every entry after every step.
  cfg = settings.small(optim__moments_dtype='bfloat16').optim
  params, mean, square = draw(0), zeros(), zeros()
  stored_mean, stored_square = zeros(), zeros()
  slack_mean, slack_square = zeros(), zeros()
  for n, grads, got, state in twenty_steps(cfg):
    # From what was stored, the weights' step is exact: rounding comes after.
    stored = (stored_mean, stored_square)
    want, _, _ = oracle_step(cfg, params, grads, *stored, n)
    tolerances.assert_trees_close(got, want)
    _, mean, square = oracle_step(cfg, params, grads, mean, square, n)
    slack_mean = carry(slack_mean, mean, cfg.beta1)
    slack_square = carry(slack_square, square, cfg.beta2)
    assert_within(state.mean, mean, slack_mean)
    assert_within(state.square, square, slack_square)
    params = float64(got)
    stored_mean, stored_square = float64(state.mean), float64(state.square)
  for moment in (state.mean, state.square):
    assert {x.dtype for x in jax.tree.leaves(moment)} == {jnp.dtype('bfloat16')}


def carry(slack, exact, beta):
  """The bound after one more step."""
  unit = BF16_UNIT + tolerances.TOLERANCE['float32']  # computed in f32
  return {
    name: unit * np.abs(exact[name]) + (1.0 + unit) * beta * slack[name]
    for name in exact
  }


def assert_within(got, want, slack):
  for name in want:
    error = np.abs(np.asarray(got[name], np.float64) - want[name])
    assert np.all(error <= slack[name]), name


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_first_step_is_the_gradient_s_sign(dtype):
  # Without bias correction it would be 0.1 / sqrt(0.05) of that.
  changes = {'optim__moments_dtype': dtype, 'optim__weight_decay': 0.0}
  optimizer = optim.adamw(settings.small(**changes).optim)
  params = {'w': jnp.array([1.0, -2.0, 0.5])}
  grads = {'w': jnp.array([3.0, -1e-3, 700.0])}
  state = optimizer.init(params)
  moved, _ = optimizer.update(grads, state, params, jnp.float32(0.25))
  tolerances.assert_close(moved['w'], [0.75, -1.75, 0.25])


@pytest.mark.parametrize('scan', [True, False])
def test_norm_weights_of_the_model_are_what_is_not_decayed(scan):
  cfg = settings.small(model__scan_layers=scan, model__mtp__depth=2)
  net = model.build(cfg)
  shapes = model.param_shapes(net)
  kept = 0
  for path, leaf in gradients.paths(shapes):
    stacked = any(key.key == 'layers' for key in path)
    assert optim.is_decayed(path) == (leaf.ndim - stacked > 1), path
    kept += not optim.is_decayed(path)
  stacks = 2 if scan else 3
  assert kept == 4 * stacks + 1 + 2 * (4 + 3)  # four norms in each block


@pytest.mark.parametrize('limit', [0.02, 1e4])
def test_the_step_clips_the_norm_of_all_gradients_together(limit):
  cfg = settings.small(  # one dense layer compiles fastest
    model__num_layers=1,
    model__mtp__depth=0,
    model__scan_layers=False,
    model__remat='none',
    optim__moments_dtype='float32',
  )
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, ([13], [5, 4, 2]))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  _, grads = models.loss_and_grads(cfg)(params, router_biases, batch, scales)
  flat = {str(path): g for path, g in gradients.paths(float64(grads))}
  clipped, norm = oracle.clip_by_global_norm(flat, limit)
  assert (norm > limit) == (limit < 1.0)

  clipping = dataclasses.replace(cfg.optim, clip_norm=limit)
  cfg = dataclasses.replace(cfg, optim=clipping)
  state = jax.jit(lambda: steps.init_state(cfg, jax.random.key(0)))()
  state |= {'params': params, 'router': router_biases}
  hyper = {'lr': 0.01, 'mtp_weight': models.MTP_WEIGHT, 'bias_rate': 0.0}
  hyper = {name: jnp.float32(value) for name, value in hyper.items()}
  step = jax.jit(steps.make_train_step(cfg))
  micro = jax.tree.map(lambda x: x[None], batch)
  new, metrics = step(state, micro, jnp.int32(1), hyper)
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  assert float(metrics['max_violation']) == 0.0  # no experts, no imbalance
  for path, mean in gradients.paths(new['opt'].mean):
    tolerances.assert_close(mean, (1 - cfg.optim.beta1) * clipped[str(path)])
