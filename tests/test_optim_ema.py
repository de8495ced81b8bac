"""The average in host memory: its recurrence, resume to the bit, errors."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import optim
from tests import tolerances
from tests.nn import models
from tests.oracles import optim as oracle

START = {'w': np.full((3, 5), 0.5), 'norm': np.ones(4)}


def draw(n):
  """The parameters of step n, as f32 arrays on the device."""
  rng = np.random.default_rng(n)
  return models.f32({k: n * rng.normal(size=w.shape) for k, w in START.items()})


@pytest.mark.parametrize('decay', [0.5, 0.999])
def test_thirty_updates_are_the_recurrence(decay):
  ema, want = optim.HostEma(decay, models.f32(START)), START
  for n in range(1, 31):
    params = draw(n)
    ema.update(params)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    want = oracle.ema(want, exact, decay)
  got = ema.tree()
  ema.close()
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  tolerances.assert_trees_close(got, want)


def test_parameters_may_be_donated_after_the_update():
  halve = jax.jit(lambda p: jax.tree.map(lambda w: w / 2, p), donate_argnums=0)
  params, want = models.f32(START), START
  ema = optim.HostEma(0.9, params)
  for n in range(1, 9):
    params = halve(params)
    ema.update(params)
    exact = {name: w * 0.5**n for name, w in START.items()}
    want = oracle.ema(want, exact, 0.9)
  tolerances.assert_trees_close(ema.tree(), want)
  ema.close()


def test_goes_on_from_a_tree_to_the_bit():
  whole, first = (optim.HostEma(0.9, models.f32(START)) for _ in range(2))
  for n in range(1, 9):
    whole.update(draw(n))
  for n in range(1, 6):
    first.update(draw(n))
  second = optim.HostEma(0.9, draw(99))
  second.load(first.tree())
  for n in range(6, 9):
    second.update(draw(n))
  for name, value in whole.tree().items():
    np.testing.assert_array_equal(second.tree()[name], value)
  for ema in (whole, first, second):
    ema.close()


def test_trees_that_go_in_or_out_are_copies():
  ema = optim.HostEma(0.9, models.f32(START))
  given = ema.tree()
  given['w'] += 1.0
  np.testing.assert_array_equal(ema.tree()['w'], 0.5)
  ema.load(given)
  given['w'] += 1.0
  np.testing.assert_array_equal(ema.tree()['w'], 1.5)
  ema.close()


def test_refuses_a_tree_of_other_shapes():
  ema = optim.HostEma(0.9, models.f32(START))
  for wrong in (ema.tree() | {'w': np.zeros((5, 3), np.float32)}, {}):
    with pytest.raises(ValueError, match='shapes of the parameters'):
      ema.load(wrong)
  ema.close()


def test_an_error_in_the_thread_reaches_the_caller_and_ends_nothing_else():
  before = threading.active_count()
  ema = optim.HostEma(0.9, models.f32(START))
  ema.update({'w': jnp.ones((3, 5))})  # not the tree that it averages
  for call in (ema.flush, ema.tree, lambda: ema.update(draw(1)), ema.close):
    with pytest.raises(RuntimeError, match='the EMA thread failed'):
      call()
  assert threading.active_count() == before
