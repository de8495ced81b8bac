"""Sharding the batch changes no loss, no gradient and no load."""

import jax
import numpy as np
import pytest

from dsv3_jax import config, sharding
from dsv3_jax.nn import model
from tests import settings, tolerances
from tests.nn import models

ROWS = ([13], [5, 4, 2], [7], [3, 10], [13], [1, 1, 1], [9], [])
MESHES = ({'data': 4}, {'data': 2, 'node': 2, 'expert': 2})


@pytest.mark.parametrize('axes', MESHES, ids=lambda axes: '_'.join(axes))
def test_equals_one_device(axes):
  cfg = settings.small(model__num_layers=2)
  params, router = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, ROWS)
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  want = models.loss_and_grads(cfg)(params, router, batch, scales)
  sizes = dict.fromkeys(sharding.AXES, 1) | axes
  mesh = sharding.make_mesh(config.MeshConfig(**sizes))
  place = lambda spec: jax.sharding.NamedSharding(mesh, spec)
  rows = place(sharding.to_spec(('batch', 'sequence'), sharding.RULES, 2))
  whole = place(jax.sharding.PartitionSpec())
  net = model.build(cfg)

  def loss(params, router, batch, scales):
    args = (batch, router, scales)
    return net.apply({'params': params}, *args, method='loss')

  run = jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    in_shardings=(whole, whole, rows, whole),
    out_shardings=whole,
  )
  with jax.set_mesh(mesh):
    assert sharding.batch_shards() == np.prod(list(axes.values()))
    (total, parts), grads = run(params, router, batch, scales)
  (want_total, want_parts), want_grads = want
  assert float(total) == pytest.approx(float(want_total), rel=1e-6)
  for name, value in want_parts.items():
    if 'load' in name:
      np.testing.assert_array_equal(parts[name], value)
    else:
      tolerances.assert_close(parts[name], value)
  tolerances.assert_trees_close(grads, want_grads)
