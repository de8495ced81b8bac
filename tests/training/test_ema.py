"""The average in host memory: its recurrence, resume to the bit, errors."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training import ema
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
  average, want = ema.HostEma(decay, models.f32(START)), START
  for n in range(1, 31):
    params = draw(n)
    average.update(params)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    want = oracle.ema(want, exact, decay)
  got = average.tree()
  average.close()
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  tolerances.assert_trees_close(got, want)


def test_parameters_may_be_donated_after_the_update():
  halve = jax.jit(lambda p: jax.tree.map(lambda w: w / 2, p), donate_argnums=0)
  params, want = models.f32(START), START
  average = ema.HostEma(0.9, params)
  for n in range(1, 9):
    params = halve(params)
    average.update(params)
    exact = {name: w * 0.5**n for name, w in START.items()}
    want = oracle.ema(want, exact, 0.9)
  tolerances.assert_trees_close(average.tree(), want)
  average.close()


def test_goes_on_from_a_tree_to_the_bit():
  uninterrupted, first = (ema.HostEma(0.9, models.f32(START)) for _ in range(2))
  for n in range(1, 9):
    uninterrupted.update(draw(n))
  for n in range(1, 6):
    first.update(draw(n))
  second = ema.HostEma(0.9, first.tree())
  for n in range(6, 9):
    second.update(draw(n))
  for name, value in uninterrupted.tree().items():
    np.testing.assert_array_equal(second.tree()[name], value)
  for average in (uninterrupted, first, second):
    average.close()


def test_trees_that_go_in_or_out_are_copies():
  params = models.f32(START)
  average = ema.HostEma(0.5, params)
  before = average.tree()
  average.update(jax.tree.map(jnp.zeros_like, params))
  np.testing.assert_array_equal(average.tree()['w'], 0.25)
  np.testing.assert_array_equal(before['w'], 0.5)
  np.testing.assert_array_equal(params['w'], 0.5)
  average.close()


def test_parts_stay_where_the_parameters_are():
  """Sharded over two of three axes: each part once, and the same numbers."""
  mesh = jax.make_mesh((2, 2, 2), ('x', 'y', 'z'))
  sharded = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('x', 'z')
  )
  start = {'w': jnp.arange(32.0).reshape(4, 8)}
  average = ema.HostEma(0.5, jax.device_put(start, sharded))
  for n in range(3):
    average.update(jax.device_put({'w': jnp.full((4, 8), float(n))}, sharded))
  got = average.tree()['w']
  average.close()
  assert got.sharding == sharded
  want = np.asarray(start['w']) / 8 + (0.25 * 1 + 0.5 * 2)
  np.testing.assert_array_equal(got, want)


def test_an_error_in_the_thread_reaches_the_caller_and_ends_nothing_else():
  before = threading.active_count()
  average = ema.HostEma(0.9, models.f32(START))
  average.update({'w': jnp.ones((3, 5))})  # not the tree that it averages
  for call in (
    average.flush,
    average.tree,
    lambda: average.update(draw(1)),
    average.close,
  ):
    with pytest.raises(RuntimeError, match='the EMA thread failed'):
      call()
  assert threading.active_count() == before
