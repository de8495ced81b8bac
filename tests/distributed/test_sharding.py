"""Logical axes are strict; the mesh is what was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.distributed import collectives, sharding

Spec = jax.sharding.PartitionSpec


def mesh_config(**sizes):
  ones = dict.fromkeys(sharding.AXES, 1)
  return config.ParallelConfig(
    **(ones | sizes), schedule='dualpipe', fsdp=(), deterministic=False
  )


def test_names_become_mesh_axes():
  rules = sharding.ShardingRules(heads='model', experts=('node', 'expert'))
  to_spec = sharding.to_spec
  batch = ('data', 'node', 'expert')
  got = to_spec(('batch', 'heads', None), rules, 3)
  assert got == Spec(batch, 'model', None)
  assert to_spec(('experts', 'embed', 'ffn'), rules, 3) == Spec(
    ('node', 'expert'), None, None
  )
  assert to_spec((), rules, 0) == Spec()


@pytest.mark.parametrize(
  ('names', 'ndim', 'message'),
  [
    (('batch', 'colour'), 2, "logical axis 'colour' is unknown"),
    (('batch',), 2, 'names 1 dims of an array of 2'),
    (('batch', 'embed', None), 2, 'names 3 dims of an array of 2'),
    (('batch', 'experts'), 2, "mesh axis 'expert' would shard two dims"),
    (('batch', 'batch'), 2, "mesh axis 'data' would shard two dims"),
  ],
)
def test_anything_else_is_an_error(names, ndim, message):
  rules = sharding.ShardingRules(experts='expert')
  with pytest.raises(ValueError, match=message):
    sharding.to_spec(names, rules, ndim)


SIZES = dict.fromkeys(sharding.AXES, 1) | {'data': 2, 'node': 2, 'expert': 4}
FSDP = sharding.ShardingRules(fsdp=('data', 'context', 'node', 'expert'))


@pytest.mark.parametrize(
  ('shape', 'names', 'want'),
  [
    # Over all of more than one device, in the longest dim that divides.
    ((8, 64), ('embed', 'ffn'), Spec(None, ('data', 'node', 'expert'))),
    ((16, 20), ('embed', 'ffn'), Spec(('data', 'node', 'expert'), None)),
    ((6, 20), ('embed', 'ffn'), Spec(None, ('data', 'node'))),
    ((3, 5), ('embed', 'ffn'), Spec(None, None)),
    # Not over what shards the experts already; never layers, never vectors.
    (
      (8, 6, 5),
      ('experts', 'embed', 'ffn'),
      Spec(('node', 'expert'), ('data',), None),
    ),
    ((64, 6, 2), ('layers', 'embed', None), Spec(None, ('data',), None)),
    ((64, 16), ('layers', 'embed'), Spec(None, None)),
  ],
)
def test_matrices_lie_cut_over_more_axes(shape, names, want):
  got = sharding.storage_spec(shape, names, FSDP, SIZES)
  assert got.spec == want
  assert bool(got.axes) == (want != sharding.to_spec(names, FSDP, len(shape)))


def test_rules_name_real_mesh_axes_and_are_hashable():
  for field in dataclasses.fields(sharding.ShardingRules):
    axes = getattr(sharding.RULES, field.name) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    assert set(axes) <= set(sharding.AXES)
  assert hash(sharding.RULES) == hash(sharding.ShardingRules())
  with pytest.raises(dataclasses.FrozenInstanceError):
    sharding.RULES.vocab = 'pipe'


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
  with pytest.raises(
    ValueError, match=r'parallel\.data=64.*need 64 devices, 8'
  ):
    sharding.make_mesh(mesh_config(data=64))


def test_several_processes_use_all_their_devices(monkeypatch):
  sharding.make_mesh(mesh_config(data=2))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  sharding.make_mesh(mesh_config(data=8))
  with pytest.raises(
    errors.InputError, match=r'data=2.*use 2 of the 8 .* 2 processes: .* all'
  ):
    sharding.make_mesh(mesh_config(data=2))


def test_sizes_shapes_and_sums_are_those_of_one_device_outside_a_mesh():
  assert collectives.axis_size(sharding.TOKEN_AXES) == 1
  assert collectives.local_shape((8, 3), Spec('expert', None)) == (8, 3)
  x = {'x': jnp.ones(2)}
  assert collectives.psum(x, 'data') is x
  with jax.set_mesh(sharding.make_mesh(mesh_config(data=2, expert=4))):
    assert collectives.axis_size('expert') == 1


def test_sizes_shapes_and_sums_inside_a_mapped_function():
  mesh = sharding.make_mesh(mesh_config(data=2, expert=4))

  def body(x):
    assert collectives.axis_size(None) == 1
    assert collectives.axis_size('expert') == 4
    assert collectives.axis_size(sharding.BATCH_AXES) == 8
    assert collectives.local_shape((8, 3), Spec('expert', None)) == (2, 3)
    return collectives.psum(x, ('expert', 'context'))

  run = sharding.shard_map_step(
    body, mesh, in_specs=Spec(('data', 'expert')), out_specs=Spec('data')
  )
  got = jax.jit(run)(jnp.arange(8.0))
  np.testing.assert_array_equal(got, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])


def test_gradient_of_a_sum_over_devices_is_that_of_the_whole():
  """Each device adds its share f(sum x) to the loss: d/dx_i is 4 f'."""
  mesh = sharding.make_mesh(mesh_config(data=4))
  share = lambda x: jnp.sum(jnp.sin(collectives.psum(x, 'data')))
  run = sharding.shard_map_step(
    jax.grad(share), mesh, in_specs=Spec('data'), out_specs=Spec('data')
  )
  x = jnp.arange(4.0) / 7
  np.testing.assert_allclose(run(x), np.full(4, 4 * np.cos(x.sum())), rtol=1e-6)
