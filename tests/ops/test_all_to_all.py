"""Experts spread over devices: one device's results, whatever the routing."""

import dataclasses
import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import all_to_all, routing
from dsv3_jax.ops import experts as expert_ops
from tests import settings
from tests.ops import spread

# Sums of at most K parts in another order, of products that are the same.
F32 = 2e-6
HOPS, EXPERTS, TOP_K = spread.HOPS, spread.EXPERTS, spread.TOP_K
draw, one_device, devices = spread.draw, spread.one_device, spread.devices


def assert_equal(got, want, limit=F32):
  got, want = (jax.tree.leaves_with_path(tree) for tree in (got, want))
  for (path, g), (_, w) in zip(got, want, strict=True):
    assert g.dtype == w.dtype, path
    assert spread.error(g, w) < limit, jax.tree_util.keystr(path)


@pytest.mark.parametrize('routing', spread.ROUTINGS)
@pytest.mark.parametrize(
  ('shape', 'hops'),
  [
    ((1, 2), 'one_hop'),
    ((2, 4), 'one_hop'),
    ((2, 4), 'two_hops'),
    *(
      pytest.param(shape, 'one_hop', marks=pytest.mark.nightly)
      for shape in ((2, 1), (1, 4), (2, 2))
    ),
    pytest.param((2, 2), 'two_hops', marks=pytest.mark.nightly),
  ],
  ids=str,
)
def test_equals_one_device(shape, hops, routing):
  values, dy_MD = draw()
  args = values, spread.draw_ids(routing, *spread.SIZES), dy_MD
  got = devices(shape, 'blocks', HOPS[hops])(*args)
  assert_equal(got, one_device()(*args))


@pytest.mark.parametrize(
  ('product', 'hops'), [('dense', 'one_hop'), ('ragged', 'two_hops')]
)
def test_other_products_equal_one_device(product, hops):
  values, dy_MD = draw(1)
  ids_MK = spread.draw_ids('uneven', *spread.SIZES)
  got = devices((2, 4), product, HOPS[hops])(values, ids_MK, dy_MD)
  assert_equal(got, one_device('dense')(values, ids_MK, dy_MD))


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize(
  'hops', [pytest.param('one_hop', marks=pytest.mark.nightly), 'two_hops']
)
def test_runs_again_bit_by_bit(hops):
  values, dy_MD = draw(2)
  args = values, spread.draw_ids('random', *spread.SIZES), dy_MD
  first, second = (
    jax.tree.leaves(devices((2, 4), 'blocks', HOPS[hops])(*args))
    for _ in range(2)
  )
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def test_bf16_differs_by_the_rounding_of_partial_sums():
  """Outputs and tokens' gradients; nothing else is summed up on the way."""
  values, dy_MD = draw(3)
  values['x_MD'] = values['x_MD'].astype(jnp.bfloat16)
  args = values, spread.draw_ids('uneven', *spread.SIZES), dy_MD
  got = devices((2, 4), 'blocks', spread.TWO_HOPS)(*args)
  want = one_device()(*args)
  rounded = [(tree[0], tree[1].pop('x_MD')) for tree in (got, want)]
  assert_equal(*rounded, 2.0**-7)
  assert_equal(got[1], want[1])


SETS = [*itertools.combinations(range(EXPERTS), TOP_K), (EXPERTS,) * TOP_K]


@functools.cache
def there_and_back(shape, data):
  """Every expert is the identity; in one hop and in two."""
  num_local = EXPERTS // math.prod(shape)

  def body(x_MD, gates_MK, ids_MK):
    def run(axes):
      plan = all_to_all.make_plan(ids_MK, num_local, axes)
      x_ID, gates_IK = all_to_all.dispatch((x_MD, gates_MK), plan)
      mine_I = jnp.sum(jnp.where(plan.ids_IK < num_local, gates_IK, 0), axis=1)
      return all_to_all.combine(x_ID * mine_I[:, None], plan)

    return tuple(map(run, HOPS.values()))

  return spread.over(shape, body, data)


@pytest.mark.parametrize(('shape', 'data'), [((2, 4), 1), ((2, 2), 2)])
@hypothesis.settings(deadline=None, max_examples=20, derandomize=True)
@hypothesis.given(
  sets=st.lists(st.sampled_from(SETS), min_size=40, max_size=40),
  seed=st.integers(0, 9),
)
def test_nothing_is_lost_on_the_way(shape, data, sets, seed):
  """Sums of small integers are exact; ids past the last go nowhere."""
  rng = np.random.default_rng(seed)
  x_MD = np.float32(rng.integers(-9, 10, (40, 3)))
  gates_MK = np.float32(rng.integers(1, 10, (40, TOP_K)))
  ids_MK = np.array(sets, np.int32)
  gates_M = np.sum(gates_MK * (ids_MK < EXPERTS), axis=1)
  for got_MD in there_and_back(shape, data)(x_MD, gates_MK, ids_MK):
    np.testing.assert_array_equal(got_MD, x_MD * gates_M[:, None])


def test_small_case_by_hand():
  """Two devices of two experts and two tokens each."""
  ids_MK = np.array([[0, 3], [1, 0], [2, 3], [1, 2]], np.int32)
  x_MD = np.array([[10], [11], [12], [13]], np.uint8)
  y_ID = np.float32([[1], [2], [3], [99], [10], [20], [30], [99]])

  def body(ids_MK, x_MD, y_ID):
    plan = all_to_all.make_plan(ids_MK, 2, spread.ONE_HOP)
    sums_MD = all_to_all.combine(y_ID, plan)
    (hop,) = plan.hops
    at = hop.token_O, hop.back_Mn, *all_to_all.rows_sent(plan)
    return plan.ids_IK, all_to_all.dispatch(x_MD, plan), sums_MD, at

  got = spread.over((1, 2), body)(ids_MK, x_MD, y_ID)
  listed = jax.tree.map(lambda x: np.array(x).tolist(), got)
  ids_IK, x_ID, sums_MD, (token_O, back_Mn, count_W) = listed
  here, none = [[0, 2], [1, 0], [1, 2], [2, 2]], [2, 2]
  assert ids_IK == here + [[2, 1], [0, 1], [2, 0], none]
  assert x_ID == [[10], [11], [13], [0], [10], [12], [13], [0]]
  assert sums_MD == [[1 + 10], [2], [20], [3 + 30]]
  # Rows to device 0, then to device 1; 2 is no token, 4 is no row.
  assert token_O == [0, 1, 0, 2] + [1, 0, 1, 2]
  assert back_Mn == [[0, 2], [1, 4]] + [[1, 4], [0, 2]]
  assert count_W == [2, 1] + [1, 2]


@pytest.mark.parametrize('top_groups', [1, 2, 4])
def test_tokens_cross_nodes_once_each_and_no_more_than_the_groups(top_groups):
  nodes, peers, experts, top_k, tokens = 4, 2, 16, 4, 256
  moe = dataclasses.replace(
    settings.small().model.moe,
    num_experts=experts,
    num_groups=nodes,
    top_groups=top_groups,
    top_k=top_k,
  )
  rng = np.random.default_rng(0)
  w_DE = jnp.float32(rng.normal(size=(5, experts)))
  x_MD = jnp.float32(rng.normal(size=(tokens, 5)))
  ids_MK = routing.route(x_MD, w_DE, jnp.zeros(experts), moe).ids_MK

  def body(ids_MK):
    sent = lambda axes: all_to_all.rows_sent(
      all_to_all.make_plan(ids_MK, 2, axes)
    )
    return *sent(spread.TWO_HOPS), *sent(spread.ONE_HOP)

  to_node, to_peer, to_device = spread.over((nodes, peers), body)(ids_MK)
  local = tokens // nodes // peers
  visits = lambda size: [len(set(ids // size)) for ids in np.array(ids_MK)]
  per_device = lambda sent: np.reshape(sent, (8, -1)).sum(axis=1)
  node_rows = np.reshape(visits(experts // nodes), (8, local)).sum(axis=1)
  np.testing.assert_array_equal(per_device(to_node), node_rows)
  assert np.all(node_rows <= local * top_groups)
  # The second hop, and one hop over all, end at every device of a token.
  assert np.sum(to_peer) == np.sum(to_device) == np.sum(visits(2))
  # Unlimited, tokens do visit more nodes than the limits of the other cases.
  assert top_groups < 4 or np.mean(visits(experts // nodes)) > 2.0


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize(('hops', 'per_hop'), [('one_hop', 1), ('two_hops', 2)])
def test_backward_goes_along_the_layout_of_forward(hops, per_hop, remat):
  """Ids travel once; tokens and gates there, outputs back; then gradients."""
  values, dy_MD = draw()
  ids_MK = spread.draw_ids('random', *spread.SIZES)

  def apply(values, ids_MK):
    v, options = values, expert_ops.ExpertOptions('blocks', 4, HOPS[hops])
    args = v['x_MD'], ids_MK, v['gates_MK'], v['experts']
    return expert_ops.expert_ffn(*args, options)

  if remat:
    keep = jax.checkpoint_policies.save_only_these_names
    apply = jax.checkpoint(apply, policy=keep('all_to_all', 'swiglu_in'))
  run = spread.over((2, 4), spread.value_and_grads(apply))
  program = spread.equations(jax.make_jaxpr(run)(values, ids_MK, dy_MD))
  names = [eqn.primitive.name for eqn in program]
  moved = {'ids': 1, 'x, gates': 2, 'y': 1, 'dy': 1, 'dx, dgates': 2}
  assert names.count('all_to_all') == per_hop * sum(moved.values())


def test_axes_of_one_device_change_nothing():
  values, dy_MD = draw()
  args = values, spread.draw_ids('random', *spread.SIZES), dy_MD
  program = lambda axes: str(
    jax.make_jaxpr(spread.over((1, 1), spread.step(axes=axes)))(*args)
  )
  assert program(spread.ONE_HOP) == program(spread.TWO_HOPS) == program(())


def test_unknown_transport_is_refused():
  with pytest.raises(ValueError, match="transport='mail' must be one of"):
    all_to_all.make_plan(jnp.zeros((2, 1), jnp.int32), 2, (), 'mail')
