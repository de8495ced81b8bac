"""Placements against exact arithmetic, exhaustive search and hand-made ones."""

import fractions
import itertools
import re
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3_jax.inference import eplb
from tests import limits
from tests.oracles import expert_balance as oracle

# Divisible by every number of replicas up to 12: their loads are whole.
_WHOLE = 27720


@st.composite
def sizes(draw):
  """Legal sizes of either policy, and the number of experts."""
  nodes = draw(st.integers(1, 3))
  gpus = nodes * draw(st.integers(1, 3))
  groups = draw(st.integers(1, 3).map(lambda k: k * nodes) | st.integers(1, 7))
  experts = groups * draw(st.integers(1, 4))
  per_gpu = -(-experts // gpus) + draw(st.integers(0, 2))
  legal = {
    'num_replicas': gpus * per_gpu,
    'num_groups': groups,
    'num_nodes': nodes,
    'num_gpus': gpus,
  }
  return experts, legal


def matrix(data, experts, values):
  row = st.lists(values, min_size=experts, max_size=experts)
  return data.draw(st.lists(row, min_size=1, max_size=3))


_ANY_LOAD = st.integers(0, 3) | st.floats(0, 1.7e308) | st.just(0)


@hypothesis.given(sizes(), st.data())
@hypothesis.settings(max_examples=150)
def test_every_slot_is_that_of_exact_arithmetic(drawn, data):
  experts, legal = drawn
  hypothesis.assume(legal['num_replicas'] - experts < 12)
  loads = matrix(data, experts, st.integers(0, 9).map(lambda x: x * _WHOLE))
  phy2log, log2phy, logcnt = eplb.rebalance_experts(loads, **legal)
  for layer, row in enumerate(loads):
    slots = oracle.placed(row, *legal.values())
    assert phy2log[layer].tolist() == [expert for expert, _ in slots]
    for slot, (expert, replica) in enumerate(slots):
      assert log2phy[layer, expert, replica] == slot
    assert logcnt[layer].sum() == len(slots)


@hypothesis.given(sizes(), st.data())
def test_the_three_arrays_say_the_same(drawn, data):
  experts, legal = drawn
  loads = matrix(data, experts, _ANY_LOAD)
  phy2log, log2phy, logcnt = eplb.rebalance_experts(loads, **legal)
  assert phy2log.dtype == log2phy.dtype == logcnt.dtype == np.int32
  assert phy2log.shape == (len(loads), legal['num_replicas'])
  assert logcnt.shape == (len(loads), experts)
  assert log2phy.shape == (*logcnt.shape, logcnt.max())
  for layer, expert in np.ndindex(*logcnt.shape):
    slots = np.flatnonzero(phy2log[layer] == expert)
    assert len(slots) == logcnt[layer, expert] >= 1
    named = log2phy[layer, expert]
    assert sorted(named[: len(slots)]) == slots.tolist()
    assert np.all(named[len(slots) :] == -1)


@hypothesis.given(sizes(), st.data())
def test_groups_stay_on_one_node(drawn, data):
  experts, legal = drawn
  groups, nodes = legal['num_groups'], legal['num_nodes']
  hypothesis.assume(groups % nodes == 0)
  loads = matrix(data, experts, _ANY_LOAD)
  phy2log, _, _ = eplb.rebalance_experts(loads, **legal)
  group_LNz = phy2log.reshape(len(loads), nodes, -1) // (experts // groups)
  for group_Nz in group_LNz:
    groups_N = [set(group_z.tolist()) for group_z in group_Nz]
    assert [len(own) for own in groups_N] == [groups // nodes] * nodes
    assert set.union(*groups_N) == set(range(groups))


@hypothesis.given(sizes(), st.data())
def test_layers_units_and_types_do_not_matter(drawn, data):
  experts, legal = drawn
  loads = np.array(matrix(data, experts, st.integers(0, 1000)))
  want = eplb.rebalance_experts(loads, **legal)
  unit_L1 = 2.0 ** np.linspace(-900, 900, len(loads)).round()[:, None]
  for other in (loads.astype(np.float32), loads * unit_L1, loads / unit_L1):
    got = eplb.rebalance_experts(other, **legal)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
  for layer in range(len(loads)):
    alone = eplb.rebalance_experts(loads[layer : layer + 1], **legal)
    np.testing.assert_array_equal(alone.phy2log[0], want.phy2log[layer])
    np.testing.assert_array_equal(alone.logcnt[0], want.logcnt[layer])
    most = alone.log2phy.shape[2]
    np.testing.assert_array_equal(
      alone.log2phy[0], want.log2phy[layer, :, :most]
    )


@hypothesis.given(sizes(), st.data())
@hypothesis.settings(max_examples=150)
def test_gpus_of_a_node_differ_by_less_than_their_replicas(drawn, data):
  """max - min load of GPUs <= max - min load of replicas, within each node.

  Of two packs p and f with k items each, in the order of their coming: if no
  p_(i+1) came before f_i, then it is at most f_i, and sum p - sum f is at most
  p_1 - f_k. Else take the last such i: at that time f had room, so its items
  before f_i weighed at least p_1 + .. + p_i; all later p_(j+1) are at most f_j;
  sum p - sum f is at most p_(i+1) - f_i.
  """
  experts, legal = drawn
  hypothesis.assume(legal['num_replicas'] - experts < 12)
  some = st.integers(0, 9) | st.sampled_from([50, 10**6])
  loads = np.array(matrix(data, experts, some)) * _WHOLE
  phy2log, _, logcnt = eplb.rebalance_experts(loads, **legal)
  hierarchical = legal['num_groups'] % legal['num_nodes'] == 0
  nodes = legal['num_nodes'] if hierarchical else 1
  gpu_LW = eplb.loads(loads, phy2log, legal['num_gpus'])
  load_LZ = np.take_along_axis(loads / logcnt, phy2log, axis=1)
  spread = lambda x: np.ptp(x.reshape(len(loads), nodes, -1), axis=2)
  assert np.all(spread(gpu_LW) <= spread(load_LZ))


@hypothesis.given(
  st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 5)
)
def test_no_counts_make_the_busiest_replica_less_busy(loads, spare):
  experts = len(loads)
  slots = experts + spare
  _, _, logcnt = eplb.rebalance_experts([loads], slots, 1, 1, 1)
  busiest = lambda counts: max(map(fractions.Fraction, loads, counts))
  every = itertools.product(range(1, spare + 2), repeat=experts)
  least = min(busiest(c) for c in every if sum(c) == slots)
  assert busiest(logcnt[0].tolist()) == least


@hypothesis.given(st.integers(1, 4), st.data())
def test_two_slots_a_gpu_are_packed_as_well_as_can_be(gpus, data):
  experts = data.draw(st.integers(max(1, 2 * gpus - 3), 2 * gpus))
  scaled = np.array(matrix(data, experts, st.integers(0, 30))[:1]) * _WHOLE
  phy2log, _, logcnt = eplb.rebalance_experts(scaled, 2 * gpus, 1, 1, gpus)
  load_Z = (scaled / logcnt)[0, phy2log[0]]
  slots = list(range(2 * gpus))
  least = min(
    max(sum(load_Z[slot] for slot in pack) for pack in packing)
    for packing in oracle.every_packing(slots, gpus)
  )
  assert np.max(eplb.loads(scaled, phy2log, gpus)) == least
  if experts == 2 * gpus:  # so never worse than in the experts' own order
    plain = np.arange(experts, dtype=np.int32)[None]
    assert np.max(eplb.loads(scaled, plain, gpus)) >= least


def test_with_three_slots_a_gpu_the_plain_order_can_be_better():
  """3 and 3, then 2 and 2, 2 to the first, the 0 to the second: 7 and 5."""
  loads = [[3, 3, 0, 2, 2, 2]]
  phy2log, _, _ = eplb.rebalance_experts(loads, 6, 1, 1, 2)
  assert phy2log.tolist() == [[0, 3, 5, 1, 4, 2]]
  assert eplb.loads(loads, phy2log, 2).tolist() == [[7, 5]]
  plain = np.arange(6)[None]
  assert eplb.loads(loads, plain, 2).tolist() == [[6, 6]]


def test_two_nodes_by_hand():
  """Pairs of experts weigh 30, 96, 60, 6.

  Nodes: 96 to the first, 60 and then 30 to the second, which is full, 6 to the
  first. Node 0 has experts 2 3 6 7 and replicates 90 twice: 30 6 5 1 30 30. Its
  GPUs: 30 | 30, 30 to the first of equals, 6 and 5 to the second, 1. Node 1 has
  4 5 0 1 and replicates 30 (expert 4, the first of equals), then the other 30:
  15 15 10 20 15 15. Its GPUs: 20 | 15, 15 to the second, 15 to the first
  (20 < 30) 15 to the second (30 < 35), 10.
  """
  loads = [[10, 20, 90, 6, 30, 30, 5, 1]]
  none = -1
  phy2log, log2phy, logcnt = eplb.rebalance_experts(loads, 12, 4, 2, 4)
  assert phy2log.tolist() == [[2, 2, 7, 2, 3, 6, 1, 4, 0, 4, 5, 5]]
  assert logcnt.tolist() == [[1, 1, 3, 1, 2, 2, 1, 1]]
  assert log2phy.tolist() == [
    [
      [8, none, none],
      [6, none, none],
      [0, 3, 1],
      [4, none, none],
      [9, 7, none],
      [10, 11, none],
      [5, none, none],
      [2, none, none],
    ]
  ]
  load_LW = eplb.loads(loads, phy2log, 4)
  assert load_LW.tolist() == [[61, 41, 45, 45]]
  assert eplb.balancedness(load_LW).tolist() == [192 / 4 / 61]


@pytest.mark.parametrize(('groups', 'nodes'), [(3, 2), (1, 1), (2, 4), (1, 4)])
def test_the_global_policy_by_hand(groups, nodes):
  """12 and 8 are replicated: 4 1 1 6 2 3 6 4 in the order of slots.

  6 6 4 4 go to a GPU each, 3 to the first with 4, 2 to the other, 1 and 1.
  """
  loads = [[8, 1, 1, 12, 2, 3]]
  phy2log, _, _ = eplb.rebalance_experts(loads, 8, groups, nodes, 4)
  assert phy2log.tolist() == [[3, 1, 3, 2, 0, 5, 0, 4]]
  load_LW = eplb.loads(loads, phy2log, 4)
  assert load_LW.tolist() == [[7, 7, 7, 6]]


def test_equal_loads_keep_the_order():
  """One to each GPU in turn; without load, the first GPU is always lightest."""
  for load in (1, 3.5, 1e-320, 1.7e308):
    loads = np.full((1, 8), load)
    phy2log, _, _ = eplb.rebalance_experts(loads, 8, 1, 1, 2)
    assert phy2log.tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]
  phy2log, _, _ = eplb.rebalance_experts(np.zeros((1, 8)), 8, 1, 1, 2)
  assert phy2log.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
  ('experts', 'legal', 'plain_gpus', 'means'),
  [
    (256, (288, 8, 4, 32), 32, (0.457, 0.933)),  # prefill, hierarchical
    (256, (288, 8, 18, 144), 128, (0.196, 0.767)),  # decode on 18 nodes
    (256, (320, 8, 40, 320), 256, (0.110, 0.498)),  # decode, an expert a GPU
    (257, (320, 1, 40, 320), 257, (0.111, 0.496)),  # ... the shared one too
  ],
)
def test_the_deployments_of_the_report(experts, legal, plain_gpus, means):
  """Log-normal loads of 58 layers: mean balancedness before and after."""
  rng = np.random.default_rng(0)
  loads = rng.lognormal(size=(58, experts))
  phy2log, _, _ = eplb.rebalance_experts(loads, *legal)
  plain = np.tile(np.arange(experts), (58, 1))
  before = eplb.loads(loads, plain, plain_gpus)
  after = eplb.loads(loads, phy2log, legal[-1])
  both = [eplb.balancedness(load) for load in (before, after)]
  assert np.all(both[1] > both[0])
  got = [float(np.mean(b)) for b in both]
  np.testing.assert_allclose(got, means, atol=0.002)


def test_58_layers_take_well_below_a_second():
  """58 layers in 10 ms where this was written; half a second is allowed."""
  loads = np.random.default_rng(0).lognormal(size=(58, 256))
  seconds = []
  for _ in range(3):
    start = time.process_time()
    eplb.rebalance_experts(loads, 288, 8, 4, 32)
    seconds.append(time.process_time() - start)
  assert min(seconds) < 0.5


@hypothesis.given(sizes(), st.data())
def test_loads_keep_the_total(drawn, data):
  experts, legal = drawn
  loads = matrix(data, experts, st.floats(0, 1e6))
  phy2log, _, _ = eplb.rebalance_experts(loads, **legal)
  load_LW = eplb.loads(loads, phy2log, legal['num_gpus'])
  np.testing.assert_allclose(
    load_LW.sum(axis=1), np.sum(loads, axis=1), rtol=1e-12
  )
  balancedness_L = eplb.balancedness(load_LW)
  assert np.all((balancedness_L > 0) & (balancedness_L <= 1))


def test_loads_by_hand():
  phy2log = np.array([[0, 1, 1, 2], [2, 2, 1, 0]])
  loads = [[4, 6, 1], [0, 0, 0]]
  load_LW = eplb.loads(loads, phy2log, 2)
  assert load_LW.tolist() == [[7, 4], [0, 0]]
  assert eplb.balancedness(load_LW).tolist() == [5.5 / 7, 1]
  assert np.mean([0.1] * 3) > 0.1  # by rounding
  assert eplb.balancedness(np.full((1, 3), 0.1)).tolist() == [1]


_LEGAL = {'num_replicas': 12, 'num_groups': 4, 'num_nodes': 2, 'num_gpus': 4}


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'num_replicas': 10},
     'num_replicas=10 must be a multiple of num_gpus = 4 and >= the 8 experts: '
     '8 and 12 are the nearest'),
    ({'num_replicas': 4}, '>= the 8 experts: 8 is the nearest'),
    ({'num_replicas': 0}, 'num_replicas=0 must be a multiple of num_gpus = 4'),
    ({'num_gpus': 3},
     'num_gpus=3 must be a multiple of num_nodes = 2: 2 and 4 are the nearest'),
    ({'num_gpus': 0}, 'a multiple of num_nodes = 2: 2 is the nearest'),
    ({'num_gpus': -4}, 'num_gpus=-4 must be a multiple of num_nodes = 2: 2 is'),
    ({'num_groups': 3},
     'num_groups=3 must divide the 8 experts: 2 and 4 are the nearest'),
    ({'num_groups': 9}, 'must divide the 8 experts: 8 is the nearest'),
    ({'num_groups': 0}, 'must divide the 8 experts: 1 is the nearest'),
    ({'num_nodes': 0}, 'num_nodes=0 must be >= 1'),
  ],
)  # fmt: skip
def test_sizes_that_are_refused(changed, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    eplb.rebalance_experts(np.ones((1, 8)), **(_LEGAL | changed))


@pytest.mark.parametrize('name', ['num_replicas', 'num_groups', 'num_gpus'])
def test_the_nearest_legal_sizes_are_named(name):
  """12 experts: everything else is refused, and nothing legal is nearer."""
  loads = np.ones((1, 12))
  sizes = {'num_replicas': 24, 'num_groups': 4, 'num_nodes': 2, 'num_gpus': 4}
  legal = {
    'num_replicas': lambda n: n >= 12 and n % 4 == 0,
    'num_groups': lambda n: n > 0 and 12 % n == 0,
    'num_gpus': lambda n: n > 0 and n % 2 == 0,
  }[name]
  refused = 0
  for value in range(-3, 30):
    if legal(value):
      continue
    refused += 1
    with pytest.raises(ValueError, match=f'{name}={value} ') as error:
      eplb.rebalance_experts(loads, **(sizes | {name: value}))
    match = re.search(': (.*) (is|are) the nearest', str(error.value))
    named = [int(word) for word in match.group(1).split(' and ')]
    assert all(map(legal, named))
    between = range(min(*named, value), max(*named, value) + 1)
    assert [n for n in between if legal(n)] == named
  assert refused >= 10


_GOOD = [[1.0] * 8, [1.0] * 8]


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    ([[1, 2], [3, np.nan]], 'weight_LE[1, 1]=nan must be finite and >= 0'),
    ([[1, np.inf]], 'weight_LE[0, 1]=inf must be finite and >= 0'),
    ([[-1, 2]], 'weight_LE[0, 0]=-1 must be finite and >= 0'),
    ([1, 2], 'weight_LE is int64 [2], it must be numbers [layers, experts]'),
    (np.ones((0, 8)), 'weight_LE is float64 [0, 8], it must be'),
    (np.ones((2, 0)), 'weight_LE is float64 [2, 0], it must be'),
    ([['1', '2']], 'weight_LE is <U1 [1, 2], it must be numbers'),
  ],
)
def test_weights_that_are_refused(weights, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    eplb.rebalance_experts(weights, 2, 1, 1, 1)
  with pytest.raises(ValueError, match=re.escape(message)):
    eplb.loads(weights, np.array([[0, 1]]), 1)


@pytest.mark.parametrize(
  ('phy2log', 'gpus', 'message'),
  [
    ([[0, 1]], 1, 'phy2log has 1 layers, weight_LE has 2'),
    ([[0, 1, 1]] * 2, 2, 'phy2log has 3 slots, not a multiple of num_gpus = 2'),
    ([[], []], 2, 'phy2log has 0 slots, not a multiple of num_gpus = 2'),
    ([[0, 1]] * 2, 0, 'num_gpus=0 must be >= 1'),
    ([[0, 1], [0, 2]], 2, 'phy2log must be in [0, 2), the experts'),
    ([[0, 1], [0, -1]], 2, 'phy2log must be in [0, 2), the experts'),
    ([[0, 1], [0, 0]], 2, 'phy2log[1] must have a slot for expert 1'),
  ],
)
def test_placements_that_are_refused(phy2log, gpus, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    eplb.loads(np.ones((2, 2)), np.array(phy2log, np.int32), gpus)


def test_loads_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r'weight_LE\[0\] must have a fin'):
    eplb.loads([[1e308, 1e308]], np.array([[0, 1]]), 1)


def test_it_needs_no_jax():
  code = 'import sys, dsv3_jax.inference.eplb\nassert "jax" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True, timeout=limits.HANG)
