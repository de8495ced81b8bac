"""Where masters are: sharded over as many axes as can be, each entry once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel import sharding_report, zero

Spec = sharding.Spec
SIZES = {'pipe': 1, 'data': 2, 'context': 1, 'node': 2, 'expert': 2, 'model': 1}


def place(spec, shape, **sizes):
  like = jax.ShapeDtypeStruct(shape, jnp.float32)
  return zero.placements({'w': spec}, {'w': like}, SIZES | sizes)['w']


def test_the_largest_dim_that_divides_is_cut_over_all_free_axes():
  placement = place(Spec(None, None), (12, 16))
  assert placement.master == Spec(None, ('data', 'node', 'expert'))
  assert placement.axes == ('data', 'node', 'expert') and placement.dim == 1
  placement = place(Spec(None, None), (8, 18))
  assert placement.master == Spec(('data', 'node', 'expert'), None)


def test_experts_are_cut_further_over_data_only():
  placement = place(Spec(('node', 'expert'), None, None), (4, 6, 5))
  assert placement.master == Spec(('node', 'expert'), ('data',), None)
  assert 'node' not in placement.sums and 'data' in placement.sums


def test_what_cannot_be_cut_by_all_is_cut_by_some_or_whole():
  assert place(Spec(None), (12,)).axes == ('data', 'node')
  placement = place(Spec(None), (7,))
  assert (placement.axes, placement.master) == ((), Spec(None))
  assert place(Spec(None), (16,), data=1, node=1, expert=1).axes == ()


@pytest.mark.parametrize('shape', [(16, 6), (7,), (4, 12)])
def test_gather_reduce_and_norm_are_those_of_the_whole(shape):
  mesh = sharding.make_mesh(
    layouts.make_config({'data': 2, 'expert': 4}, {}).parallel
  )
  placed = {'w': place(Spec(*[None] * len(shape)), shape, node=1, expert=4)}
  rng = np.random.default_rng(0)
  w = jnp.float32(rng.normal(size=shape))
  g = jnp.float32(rng.normal(size=(8, *shape)))  # one a device

  def body(w, g):
    whole = zero.gather({'w': w}, placed)
    grads = zero.reduce({'w': g[0]}, placed)
    return whole['w'][None], grads['w'], zero.norm(grads, placed)

  per_device, master = Spec(('data', 'expert')), placed['w'].master
  run = sharding.shard_map_step(
    body,
    mesh,
    in_specs=(master, per_device),
    out_specs=(per_device, master, Spec()),
  )
  whole, grads, norm = jax.jit(run)(w, g)
  for copy in whole:
    np.testing.assert_array_equal(copy, w)
  np.testing.assert_allclose(grads, g.sum(axis=0), rtol=1e-5, atol=1e-6)
  want = np.linalg.norm(np.asarray(g, np.float64).sum(axis=0))
  np.testing.assert_allclose(norm, want, rtol=1e-6)


def test_the_table_adds_up():
  cfg = layouts.make_config(
    {'pipe': 2, 'data': 2, 'expert': 2, 'schedule': 'dualpipe'}, {}
  )
  rows = sharding_report.rows(cfg)
  by_name = {row['array']: row for row in rows}
  up = by_name['moe.moe.w_up']
  assert up['compute'] == 'pipe - - node+expert - -'
  assert up['compute_per_device'] * 4 == up['elements']
  assert up['master_per_device'] * 8 == up['elements']
  assert by_name['head.w']['compute'] == '- pipe'
  total = sharding_report.totals(rows)
  assert total['elements'] == sum(row['elements'] for row in rows)
  text = sharding_report.render(cfg, as_json=False).splitlines()
  assert text[0].split()[0] == 'array' and text[-1].split()[0] == 'all'
  assert len(text) == len(rows) + 2
