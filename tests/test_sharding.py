"""Logical axes are strict; the mesh is what was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, sharding

Spec = jax.sharding.PartitionSpec


def mesh_config(**sizes):
  return config.MeshConfig(**(dict.fromkeys(sharding.AXES, 1) | sizes))


def test_names_become_mesh_axes():
  rules = sharding.ShardingRules(heads='model', experts=('node', 'expert'))
  to_spec = sharding.to_spec
  batch = ('data', 'node', 'expert')
  got = to_spec(('batch', 'sequence', None), rules, 3)
  assert got == Spec(batch, 'context', None)
  assert to_spec(('experts', 'embed', 'ffn'), rules, 3) == Spec(
    ('node', 'expert'), None, None
  )
  assert to_spec((), rules, 0) == Spec()


@pytest.mark.parametrize(
  ('names', 'ndim', 'message'),
  [
    (('batch', 'colour'), 2, "logical axis 'colour' is unknown"),
    (('batch',), 2, 'names 1 dims of an array of 2'),
    (('batch', 'sequence', None), 2, 'names 3 dims of an array of 2'),
    (('batch', 'experts'), 2, "mesh axis 'expert' would shard two dims"),
    (('batch', 'batch'), 2, "mesh axis 'data' would shard two dims"),
  ],
)
def test_anything_else_is_an_error(names, ndim, message):
  rules = sharding.ShardingRules(experts='expert')
  with pytest.raises(ValueError, match=message):
    sharding.to_spec(names, rules, ndim)


def test_rules_name_real_mesh_axes_and_are_hashable():
  for field in dataclasses.fields(sharding.ShardingRules):
    axes = getattr(sharding.RULES, field.name) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    assert set(axes) <= set(sharding.AXES)
  assert hash(sharding.RULES) == hash(sharding.ShardingRules())
  with pytest.raises(dataclasses.FrozenInstanceError):
    sharding.RULES.vocab = 'pipe'


def test_constrain_checks_names_without_a_mesh():
  x = jnp.ones((4, 2))
  assert sharding.constrain(x, ('batch', None)) is x
  with pytest.raises(ValueError, match='unknown'):
    sharding.constrain(x, ('rows', None))
  with pytest.raises(ValueError, match='names 1 dims'):
    jax.jit(lambda x: sharding.constrain(x, ('batch',)))(x)


def test_constrain_shards_inside_jit():
  mesh = sharding.make_mesh(mesh_config(data=4))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.constrain(2 * x, ('batch', None)))(
      jnp.ones((8, 3))
    )
  assert y.sharding.shard_shape(y.shape) == (2, 3)
  np.testing.assert_array_equal(y, np.full((8, 3), 2.0))


def test_mesh_has_all_axes_in_order():
  mesh = sharding.make_mesh(mesh_config(data=2, expert=4))
  assert mesh.axis_names == sharding.AXES
  assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {
    'data': 2,
    'expert': 4,
  }
  flat = list(np.ravel(mesh.devices))
  assert flat == jax.devices()[:8]


def test_too_large_a_mesh_says_what_was_asked_for():
  with pytest.raises(ValueError, match=r'mesh\.data=64.*need 64 devices, 8'):
    sharding.make_mesh(mesh_config(data=64))


def test_batch_shards_counts_the_batch_axes_only():
  assert sharding.batch_shards() == 1
  with jax.set_mesh(sharding.make_mesh(mesh_config(data=2, expert=2, model=2))):
    assert sharding.batch_shards() == 4
  assert sharding.batch_shards() == 1
