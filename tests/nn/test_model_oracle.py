"""The whole network in f32 against the float64 oracle, every variant.

Logits, losses and loads for all; for some, each parameter's gradient against
the oracle's slope.
"""

import jax
import numpy as np
import pytest

from tests import gradients, nightly, reference, settings
from tests.nn import models

_SOFTMAX = {
  'model__moe__score_func': 'softmax',
  'model__moe__norm_topk': False,
  'model__moe__route_scale': 4.0,
}
CASES = {
  'plain': {},
  'q_proj_yarn': {
    'model__mla__q_lora_rank': 0,
    'model__rope__original_seq_len': 8,
    'model__num_dense_layers': 0,
  },
  'yarn_mscales': {
    'model__rope__original_seq_len': 8,
    'model__rope__mscale_all_dim': 0.707,
    'model__moe__num_groups': 1,
    'model__moe__top_groups': 1,
    'model__mtp__depth': 0,
  },
  'two_dense_two_shared': {
    'model__num_dense_layers': 2,
    'model__norm_eps': 1e-3,
    'model__latent_norm_eps': 0.1,
    'model__moe__num_shared_experts': 2,
    'model__moe__num_groups': 2,
    'model__moe__top_groups': 1,
    'model__mtp__normalizer': 'valid',
    'balance__kind': 'batch',
  },
  'softmax_v2': _SOFTMAX
  | {
    'model__moe__num_shared_experts': 0,
    'model__mla__q_lora_rank': 0,
    'model__mtp__hidden': 'pre_norm',
    'model__mtp__depth': 2,
    'balance__kind': 'v2',
  },
  'isolated_deep': {
    'data__isolate_samples': True,
    'model__mtp__depth': 2,
    'model__moe__product': 'dense',
  },
  'isolated_valid_ragged': {
    'data__isolate_samples': True,
    'model__mtp__normalizer': 'valid',
    'model__mtp__hidden': 'pre_norm',
    'model__scan_layers': False,
    'model__remat': 'none',
    'model__moe__product': 'ragged',
    'balance__kind': 'none',
  },
  'all_dense': {'model__num_dense_layers': 3, 'model__mtp__depth': 0},
}
DAILY = ('isolated_deep',)
GRADIENTS = (*DAILY, 'two_dense_two_shared', 'softmax_v2')
SAMPLES = ([13], [5, 4, 2], [7])


def run(cfg, compiled):
  """(params and router in float64, batch, whole rows, results)."""
  params, router_biases = models.random_params(cfg)
  batch, whole = models.make_batch(cfg, SAMPLES)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (models.f32(params), models.f32(router_biases), batch, scales)
  return params, router_biases, batch, whole, compiled(cfg)(*args)


def oracle(params, router_biases, cfg, batch, whole):
  last = [x_BZ[:, -1] for x_BZ in whole]
  isolated = cfg.data.isolate_samples
  rows = reference.forward(params, router_biases, cfg, batch, last, isolated)
  args = (rows, cfg, batch, whole[0], whole[2], models.MTP_WEIGHT)
  return rows, reference.loss(*args)


def assert_parts_match(total, parts, want):
  assert float(total) == pytest.approx(want['total'], rel=1e-5)
  for name in ('loss', 'mtp_loss', 'balance'):
    wanted = pytest.approx(want[name], rel=1e-5, abs=1e-7)
    assert float(parts[name]) == wanted, name
  loads = [*parts['load'], *parts['mtp_load']]
  np.testing.assert_array_equal(np.reshape(loads, (-1, 8)), want['loads'])


# Nightly: whose losses and loads the daily test of gradients compares too.
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.nightly if name in DAILY else ())
    for name in CASES
  ],
)
def test_logits_losses_and_loads_match(name):
  cfg = settings.small(**CASES[name])
  params, router_biases, batch, whole, got = run(cfg, models.forward_and_loss)
  rows, want = oracle(params, router_biases, cfg, batch, whole)
  main, deeper, total, parts = got
  assert len(deeper) == cfg.model.mtp.depth
  for b, (main_ZV, deeper_ZV, _) in enumerate(rows):
    for k, logits_ZV in enumerate([main_ZV, *deeper_ZV]):
      got_TV = (main if k == 0 else deeper[k - 1])[b]
      count = cfg.data.seq_len - max(k - 1, 0)  # where t_{i+k} exists
      np.testing.assert_allclose(
        got_TV[:count], logits_ZV[:count], rtol=0.0, atol=1e-4
      )
  if not want['loads']:
    want['loads'] = np.zeros((0, 8))
  assert_parts_match(total, parts, want)


@pytest.mark.parametrize('name', nightly.daily(GRADIENTS, *DAILY))
def test_every_gradient_matches(name):
  # Two layers, so that YaRN, MTP and both kinds of layer are all there.
  changes = {'model__num_layers': 2, 'model__num_dense_layers': 1}
  changes |= {'data__seq_len': 9, 'model__rope__original_seq_len': 8}
  cfg = settings.small(**(CASES[name] | changes))
  params, router_biases = models.random_params(cfg)
  batch, whole = models.make_batch(cfg, [[10], [5, 3]])
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (models.f32(params), models.f32(router_biases), batch, scales)
  (total, parts), grads = models.loss_and_grads(cfg)(*args)

  def loss(p):
    return oracle(p, router_biases, cfg, batch, whole)[1]['total']

  want = oracle(params, router_biases, cfg, batch, whole)[1]
  assert_parts_match(total, parts, want)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  gradients.assert_matches(grads, loss, params)
