"""Who depends on whom, proved by gradients that are exactly zero.

All tokens of a row differ, so the gradient with respect to a row of the
embedding table is the gradient with respect to one token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

LENGTH, DEPTH = 8, 2
SEGMENTS = (1, 1, 1, 2, 2, 2, 2, 0)


@functools.cache
def dependence(isolated):
  """Bool [depth + 1, T, T + 1]: does position i's output see token j?

  Depth 0 is the main model. All positions of one batch at once.
  """
  cfg = settings.small(
    model__mtp__depth=DEPTH,
    data__seq_len=LENGTH,
    data__isolate_samples=isolated,
    model__num_layers=2,
  )
  params, router_biases = map(models.f32, models.random_params(cfg))
  row = jnp.arange(1, LENGTH + 2)[None]  # token 0 is what MTP pads with
  batch = model.Batch(
    tokens_BT=row[:, :-1],
    targets_BT=row[:, 1:],
    positions_BT=jnp.arange(LENGTH)[None],
    segments_BT=jnp.array([SEGMENTS]),
    weights_BT=jnp.ones((1, LENGTH)),
  )
  net = model.build(cfg)
  mixing_V = jnp.float32(np.random.default_rng(0).normal(size=23))

  def outputs(table_VD):
    changed = params | {'embed': {'w': table_VD}}
    main, deeper = net.apply({'params': changed}, batch, router_biases)
    return jnp.stack([main, *deeper])[:, 0] @ mixing_V

  jacobian = jax.jit(jax.jacrev(outputs))(params['embed']['w'])
  return np.any(np.asarray(jacobian), axis=-1)[:, :, 1 : LENGTH + 2]


def test_main_model_sees_the_past_and_itself_only():
  want_TZ = np.tri(LENGTH, LENGTH + 1, 0, bool)
  np.testing.assert_array_equal(dependence(False)[0], want_TZ)


@pytest.mark.parametrize('depth', [1, 2])
def test_depth_k_sees_k_tokens_ahead_and_no_further(depth):
  # Its target, token i + k + 1, is the first one that it does not see.
  want_TZ = np.tri(LENGTH, LENGTH + 1, depth, bool)
  np.testing.assert_array_equal(dependence(False)[depth], want_TZ)


@pytest.mark.parametrize('depth', [0, 1, 2])
def test_isolated_samples_do_not_see_each_other(depth):
  segments_Z = np.array([*SEGMENTS, 0])
  seen_TZ = dependence(True)[depth]
  for i in range(LENGTH):
    if i + depth < LENGTH and segments_Z[i + depth] == segments_Z[i]:
      same_Z = segments_Z == segments_Z[i]
      want_Z = same_Z & (np.arange(LENGTH + 1) <= i + depth)
      np.testing.assert_array_equal(seen_TZ[i], want_Z, f'position {i}')


def test_packed_documents_see_each_other_unless_isolated():
  assert dependence(False)[0][3, 0]
  assert not dependence(True)[0][3, 0]
