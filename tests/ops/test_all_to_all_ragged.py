"""The ragged transport without a device that has it: lowered, and stood in for.

XLA has no `ragged_all_to_all` on CPU. `stand_in` does what its documentation
says by gathering everything everywhere, and poisons what would be undefined:
two sides that disagree, slices that overlap or end past an array.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.distributed import sharding
from dsv3_jax.ops import all_to_all, fp8_linear
from dsv3_jax.ops import experts as expert_ops
from pallas_kernels.fp8_matmul import reference
from tests.ops import spread

each_hops = pytest.mark.parametrize(
  'axes', spread.HOPS.values(), ids=spread.HOPS
)


def stand_in(operand, output, from_W, size_W, to_W, taken_W, *, axis_name):
  """Slice w of a device goes to device w, to the rows from to_W[w] on."""
  sent = (operand, from_W, size_W, to_W, taken_W)
  sent, from_WW, size_WW, to_WW, taken_WW = (
    jax.lax.all_gather(x, axis_name) for x in sent
  )
  own, row = jax.lax.axis_index(axis_name), jnp.arange(len(output))
  fits = (from_WW + size_WW <= len(operand)) & (to_WW + size_WW <= len(output))
  legal = jnp.all(size_WW == taken_WW.T) & jnp.all(fits)
  result, writes = output, jnp.zeros(len(output), jnp.int32)
  for w in range(len(from_W)):
    first = to_WW[w, own]
    inside = (row >= first) & (row < first + size_WW[w, own])
    rows = jnp.take(sent[w], row - first + from_WW[w, own], 0, mode='clip')
    shape = (-1, *[1] * (output.ndim - 1))
    result = jnp.where(inside.reshape(shape), rows, result)
    writes += inside
  legal &= jnp.all(writes <= 1)
  return jnp.where(legal, result, jnp.full_like(result, 77))


@pytest.fixture
def emulated(monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', stand_in)


def test_stand_in_moves_slices_as_documented():
  """Two devices, by hand."""

  def body(operand, output, *where_W):
    return stand_in(operand, output, *where_W, axis_name='expert')

  run = spread.over((1, 2), body)
  flat = lambda *lists: jnp.int32(sum(lists, []))
  args = [
    flat([1, 2, 3], [4, 5, 6]),  # rows of device 0, of device 1
    flat([0, 0, 0, 0], [9, 9, 9, 9]),
    flat([2, 0], [0, 1]),  # the first row to each device
    flat([1, 2], [1, 2]),  # and how many
  ]
  where, taken = flat([3, 0], [0, 2]), flat([1, 1], [2, 2])
  want = flat([4, 0, 0, 3], [1, 2, 5, 6])
  np.testing.assert_array_equal(run(*args, where, taken), want)
  poisoned = flat([77] * 4)
  overlap = run(*args, flat([3, 1], [0, 2]), taken)
  np.testing.assert_array_equal(overlap[4:], poisoned)
  disagreeing = run(*args, where, flat([1, 1], [1, 2]))
  np.testing.assert_array_equal(disagreeing[4:], poisoned)
  past_the_end = run(*args, flat([3, 0], [0, 3]), taken)
  np.testing.assert_array_equal(past_the_end[4:], poisoned)


@each_hops
def test_moves_the_same_rows_as_the_padded_one(axes, emulated):
  values, dy_MD = spread.draw()
  padded = spread.devices((2, 2), 'blocks', axes)
  ragged = spread.over((2, 2), spread.step('blocks', axes, 'ragged'))
  for routing in spread.ROUTINGS:
    ids_MK = spread.draw_ids(routing, *spread.SIZES)
    both = (run(values, ids_MK, dy_MD) for run in (padded, ragged))
    for g, w in zip(*map(jax.tree.leaves, both), strict=True):
      np.testing.assert_array_equal(g, w)


@each_hops
def test_send_buffers_hold_what_tokens_can_send_and_no_more(axes, emulated):
  """K rows a token, or one for each device of the hop where these are fewer."""
  sizes, top_k, local = [], 3, 5

  def body(ids_MK):
    plan = all_to_all.make_plan(ids_MK, 2, axes, 'ragged')
    sizes.extend(len(hop.token_O) for hop in plan.hops)
    return all_to_all.dispatch(ids_MK, plan)

  ids_MK = spread.draw_ids('random', 8 * local, top_k, 16)
  received = jax.eval_shape(spread.over((2, 4), body), ids_MK)
  one_hop = [local * top_k]
  two_hops = [local * 2, 2 * local * top_k]
  assert sizes == (one_hop if axes == spread.ONE_HOP else two_hops)
  assert received.shape == (8 * 8 * local, top_k)


def fp8_step(axes, transport):
  """Output and gradients of the routed product in FP8."""

  def apply(v, ids_MK):
    weights = (
      fp8_linear.Weight(w, *reference.quantize_weight(w)) for w in v['experts']
    )
    experts, policy = expert_ops.Experts(*weights), precision.POLICIES['fp8']
    tokens = v['x_MD'], ids_MK, v['gates_MK']
    options = expert_ops.ExpertOptions(
      axes=axes, transport=transport, policy=policy
    )
    return expert_ops.expert_ffn(*tokens, experts, options)

  return spread.value_and_grads(apply)


PLATFORMS = {
  'cuda': ('NVIDIA H100 80GB HBM3', None),
  'tpu': ('TPU v5', 2),
}


@pytest.mark.parametrize('platform', PLATFORMS)
@pytest.mark.parametrize(
  ('axes', 'fp8'),
  [(spread.ONE_HOP, False), (spread.TWO_HOPS, False), (spread.TWO_HOPS, True)],
  ids=['one_hop', 'two_hops', 'fp8'],
)
def test_lowers_for(platform, axes, fp8):
  """Ids; tokens (and scales) and gates; outputs; then their gradients."""
  kind, cores = PLATFORMS[platform]
  device = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=cores, platform=platform
  )
  types = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
  shape = tuple({'node': 2, 'expert': 4}.get(a, 1) for a in sharding.AXES)
  mesh = jax.sharding.AbstractMesh(
    shape, sharding.AXES, axis_types=types, abstract_device=device
  )
  values, dy_MD = spread.draw()
  ids_MK = spread.draw_ids('random', *spread.SIZES)
  step = fp8_step if fp8 else functools.partial(spread.step, 'blocks')
  with jax.sharding.use_abstract_mesh(mesh):
    run = spread.on(mesh, step(axes, 'ragged'))
    traced = run.trace(values, ids_MK, dy_MD)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  moved = ['ids', 'x', 'gates', 'y', 'dy', 'dx', 'dgates']
  moved += ['scales of x', 'scales of dy'] if fp8 else []
  assert text.count('@ragged_all_to_all') == len(axes) * len(moved)
  # Counts, once a hop.
  assert text.count('"stablehlo.all_reduce"') == len(axes)
  assert not fp8 or 'ui8' in text
