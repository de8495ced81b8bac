"""One model in many forms: scanned, recomputed, micro-batched, in bf16."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.nn import model
from tests import settings, tolerances
from tests.nn import models

SAMPLES = ([13], [5, 4, 2], [7], [3, 10])
# Two layers compile fastest; forms that are not under test are the plain ones.
BASE = {'model__num_layers': 2}
PLAIN = BASE | {'model__remat': 'none'}


def run(cfg, params=None):
  """((total, parts), gradients) of one batch at seeded parameters."""
  drawn, router_biases = models.random_params(cfg)
  params = models.f32(drawn) if params is None else params
  batch, _ = models.make_batch(cfg, SAMPLES)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, models.f32(router_biases), batch, scales)
  return models.loss_and_grads(cfg)(*args)


def assert_same(got, want):
  """Equal loads; losses and gradients within f32's tolerance."""
  (total, parts), grads = got
  (want_total, want_parts), want_grads = want
  assert float(total) == pytest.approx(float(want_total), rel=1e-6)
  for name in ('load', 'mtp_load'):
    np.testing.assert_array_equal(parts[name], want_parts[name])
  for name in ('loss', 'mtp_loss', 'balance'):
    tolerances.assert_close(parts[name], want_parts[name])
  tolerances.assert_trees_close(grads, want_grads)


@pytest.mark.nightly
def test_the_attention_kernel_trains_the_same():
  """Interpreted; samples share rows, and layers are recomputed."""
  cfg = settings.small(**BASE, model__remat='full')
  kernel = dataclasses.replace(
    precision.POLICIES[cfg.precision], implementation='pallas_interpret'
  )
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, SAMPLES)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, router_biases, batch, scales)
  plain = jax.jit(models.plain_loss_and_grads(cfg)).lower(*args)
  with mock.patch.dict(precision.POLICIES, {cfg.precision: kernel}):
    other = jax.jit(models.plain_loss_and_grads(cfg)).lower(*args)
  assert other.as_text() != plain.as_text()
  assert_same(other.compile()(*args), plain.compile()(*args))


def unstack(stack):
  """{'layers': stacked leaves} -> {'layer_0': leaves, ...}."""
  count = len(jax.tree.leaves(stack)[0])
  pick = lambda i: jax.tree.map(lambda w: w[i], stack['layers'])
  return {f'layer_{i}': pick(i) for i in range(count)}


def unstack_all(tree):
  stacks = ('dense_layers', 'moe_layers')
  return tree | {name: unstack(tree[name]) for name in stacks}


def test_scanned_equals_unrolled():
  changes = {'model__mtp__depth': 0, 'model__remat': 'none'}
  scanned = settings.small(**changes)
  unrolled = settings.small(**changes, model__scan_layers=False)
  params = models.f32(models.random_params(scanned)[0])
  value, grads = run(scanned, params)
  got = run(unrolled, unstack_all(params))
  assert_same(got, (value, unstack_all(grads)))


@pytest.mark.parametrize(
  'remat', [pytest.param('none', marks=pytest.mark.nightly), 'full']
)
def test_remat_changes_nothing_but_memory(remat):
  changed = settings.small(**(BASE | {'model__remat': remat}))
  assert_same(run(changed), run(settings.small(**BASE)))


def test_remat_keeps_less():
  # Bytes that wait between the forward and the backward pass.
  kept = {}
  for remat in ('none', 'report', 'full'):
    cfg = settings.small(model__remat=remat, model__num_layers=4)
    net = model.build(cfg)
    params, router_biases = map(models.f32, models.random_params(cfg))
    batch, _ = models.make_batch(cfg, SAMPLES)
    scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)

    def backward(params, net=net, rest=(batch, router_biases, scales)):
      loss = lambda p: net.apply({'params': p}, *rest, method='loss')[0]
      return jax.vjp(loss, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, params))
    kept[remat] = sum(x.size * x.dtype.itemsize for x in residuals)
  assert kept['full'] < 0.9 * kept['report'] < 0.8 * kept['none']


@pytest.mark.parametrize(
  ('normalizer', 'isolated'),
  [pytest.param('T', False, marks=pytest.mark.nightly), ('valid', True)],
)
def test_micro_batches_add_up_to_the_batch(normalizer, isolated):
  changes = {'model__mtp__normalizer': normalizer}
  changes['data__isolate_samples'] = isolated
  cfg = settings.small(**PLAIN, **changes)
  params, router_biases = map(models.f32, models.random_params(cfg))
  # The last rows hold padding only: a batch that the ramp has not filled.
  rows = ([13], [5, 4, 2], [7], [3, 10], [13], [])
  batch, _ = models.make_batch(cfg, rows)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  want = models.loss_and_grads(cfg)(params, router_biases, batch, scales)
  micro = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), batch)
  scales = models.scales_of(cfg, micro.weights_BT, micro.segments_BT)
  parts = [
    models.loss_and_grads(cfg)(
      params, router_biases, jax.tree.map(lambda x, i=i: x[i], micro), scales
    )
    for i in range(3)
  ]
  assert_same(jax.tree.map(lambda *xs: sum(xs), *parts), want)


def test_rows_of_padding_change_no_loss_and_no_gradient():
  cfg = settings.small(**PLAIN)
  params, router_biases = map(models.f32, models.random_params(cfg))
  rng, results = np.random.default_rng(4), []
  batch, _ = models.make_batch(cfg, ([13], [7], [], []))
  for _ in range(2):  # other tokens where nothing counts
    noise = jnp.array(rng.integers(1, 23, (4, cfg.data.seq_len)), jnp.int32)
    noisy = lambda x, n=noise: jnp.where(batch.segments_BT > 0, x, n)
    filled = batch._replace(tokens_BT=noisy(batch.tokens_BT))
    filled = filled._replace(
      targets_BT=jnp.where(batch.weights_BT > 0, batch.targets_BT, noise)
    )
    args = (filled.weights_BT, filled.segments_BT)
    scales = models.scales_of(cfg, *args)
    results.append(
      models.loss_and_grads(cfg)(params, router_biases, filled, scales)
    )
  assert_same(*results)


def test_token_losses_are_the_main_loss():
  cfg = settings.small(**PLAIN)
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, SAMPLES)
  net = model.build(cfg)
  token_losses = jax.jit(
    lambda p: net.apply(
      {'params': p}, batch, router_biases, method='token_losses'
    )
  )
  losses_BT = token_losses(params)
  want = float(jnp.sum(losses_BT * batch.weights_BT) / np.sum(batch.weights_BT))
  (_, parts), _ = run(cfg)
  assert float(parts['loss']) == pytest.approx(want, rel=1e-6)


def test_the_router_bias_gets_no_gradient_but_steers_the_load():
  cfg = settings.small(**PLAIN)
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, SAMPLES)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  net = model.build(cfg)

  @jax.jit
  def run_router(router_biases):
    loss = lambda r: net.apply(
      {'params': params}, batch, r, scales, method='loss'
    )
    return jax.grad(loss, has_aux=True)(router_biases)

  grads, parts = run_router(router_biases)
  assert not any(np.any(g) for g in jax.tree.leaves(grads))
  _, more = run_router(
    {name: b.at[:, 3].set(9.0) for name, b in router_biases.items()}
  )
  tokens = np.sum(batch.segments_BT > 0)
  assert np.all(more['load'][:, 3] == tokens)
  assert np.all(parts['load'][:, 3] < tokens)
  np.testing.assert_array_equal(np.sum(more['load'], axis=1), 3 * tokens)


def test_bf16_stays_near_f32():
  exact = settings.small(**PLAIN)
  lower = settings.small(**PLAIN, precision='bf16')
  params = models.f32(models.random_params(exact)[0])
  (want, _), want_grads = run(exact, params)
  (got, parts), grads = run(lower, params)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  limit = tolerances.TOLERANCE['bfloat16']
  assert float(got) == pytest.approx(float(want), rel=limit)
  assert parts['load'].dtype == jnp.float32
  flat = lambda tree: np.concatenate(
    [np.ravel(g) for g in jax.tree.leaves(tree)]
  )
  a, b = flat(grads), flat(want_grads)
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert cosine > 1.0 - limit
