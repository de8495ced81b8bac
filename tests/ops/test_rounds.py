"""Bounded buffers: rounds that fit everywhere, and one device's results."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import all_to_all, rounds
from dsv3_jax.ops import experts as expert_ops
from tests.ops import spread
from tests.ops.test_all_to_all import SETS, assert_equal
from tests.ops.test_all_to_all_ragged import stand_in

EXPERTS, TOP_K, LOCAL = spread.EXPERTS, spread.TOP_K, 5
each_hops = pytest.mark.parametrize('hops', spread.HOPS)


def test_room_by_hand():
  """64 devices of 4 experts, as the report's training has them (TR 3.2)."""
  room = lambda hops, *rest: rounds.Room(
    tuple(all_to_all.HopRoom(*hop) for hop in hops), *rest
  )
  got = rounds.room_of(4096, 8, 4, (64,), 1.5)
  assert got == room([(32_768, 49_152)], (49_152,), 192)
  # To 8 nodes first, once to each; 8 * 8 assignments of a token of 8 devices.
  got = rounds.room_of(4096, 8, 4, (8, 8), 1.5)
  hops = [(32_768, 32_768), (49_152, 49_152)]
  assert got == room(hops, (49_152, 49_152), 192)
  # A slice of one token fits, however small the factor or the batch.
  got = rounds.room_of(16, 8, 4, (64,), 0.1)
  assert got == room([(128, 64)], (256,), 1)
  # No more than all tokens of all devices; one device has one round.
  got = rounds.room_of(6, 2, 2, (2,), 9.0)
  assert got == room([(12, 12)], (24,), 6)
  got = rounds.room_of(6, 2, 4, (), 1.5)
  assert got == room([(6, 6)], (12,), 6)


def plainly(ids_DMK, sizes, num_local, room):
  """The round of each token, slice by slice, in loops. D devices."""
  devices, tokens = ids_DMK.shape[:2]
  round_M, current = np.zeros(tokens, int), 0
  load = 0
  for start in range(0, tokens, room.slice_tokens):
    # Rows and assignments that each device has after each hop.
    more = np.zeros((len(sizes), 2, devices))
    for source in range(devices):
      for ids in ids_DMK[source, start : start + room.slice_tokens]:
        goals = [i // num_local for i in ids if i < devices * num_local]
        for at in range(len(sizes)):
          inner = math.prod(sizes[at + 1 :])
          there = [g // inner * inner + source % inner for g in goals]
          np.add.at(more[at, 0], there, 1)
          np.add.at(more[at, 1], list(set(there)), 1)
    limits = zip(
      room.assignments, (hop.receive for hop in room.hops), strict=True
    )
    limits = np.array(list(limits))[:, :, None]
    if np.any(load + more > limits):
      current, load = current + 1, 0
    load = load + more
    round_M[start : start + room.slice_tokens] = current
  return round_M


@functools.cache
def assigned(shape, hops, factor):
  """Rounds of all devices' tokens, [M, K] on each of them."""
  sizes = (math.prod(shape),) if hops == 'one_hop' else shape
  num_local = EXPERTS // math.prod(shape)
  room = rounds.room_of(LOCAL, TOP_K, num_local, sizes, factor)

  def body(ids_MK):
    assigned_ = rounds.assign(ids_MK, num_local, spread.HOPS[hops], room)
    return assigned_.round_M, assigned_.count[None]

  return spread.over(shape, body), sizes, num_local, room


@pytest.mark.parametrize('factor', [0.1, 1.0])
@pytest.mark.parametrize('shape', [(2, 4), (2, 2)])
@each_hops
@hypothesis.settings(deadline=None, max_examples=20, derandomize=True)
@hypothesis.given(
  sets=st.lists(st.sampled_from(SETS), min_size=40, max_size=40)
)
def test_rounds_are_as_full_as_they_may_be(shape, hops, factor, sets):
  run, sizes, num_local, room = assigned(shape, hops, factor)
  devices = math.prod(shape)
  ids_MK = np.array(sets, np.int32)[: devices * LOCAL]
  round_M, counts = run(ids_MK)
  ids_DMK = ids_MK.reshape(devices, LOCAL, TOP_K)
  want_M = plainly(ids_DMK, sizes, num_local, room)
  np.testing.assert_array_equal(round_M, np.tile(want_M, devices))
  np.testing.assert_array_equal(counts, want_M[-1] + 1)
  for r in range(want_M[-1] + 1):
    sent = ids_DMK[:, want_M == r] // num_local
    load = np.bincount(sent.ravel(), minlength=devices)[:devices]
    assert max(load) <= room.assignments[-1]


def step(axes, factor, transport='auto', product='blocks'):
  options = expert_ops.ExpertOptions(
    product, spread.BLOCK, axes, transport, factor
  )
  return spread.value_and_grads(
    lambda v, ids_MK: expert_ops.expert_ffn(
      v['x_MD'], ids_MK, v['gates_MK'], v['experts'], options
    )
  )


@functools.cache
def devices(shape, hops, factor, product='blocks'):
  return spread.over(shape, step(spread.HOPS[hops], factor, product=product))


@pytest.mark.parametrize('routing', spread.ROUTINGS)
@pytest.mark.parametrize(
  ('shape', 'hops', 'factor', 'product'),
  [
    ((2, 4), 'two_hops', 0.5, 'blocks'),
    ((2, 4), 'one_hop', 1.0, 'ragged'),
    pytest.param((2, 4), 'one_hop', 0.1, 'blocks', marks=pytest.mark.nightly),
    pytest.param((2, 2), 'two_hops', 1.5, 'dense', marks=pytest.mark.nightly),
  ],
)
def test_equals_one_device(shape, hops, factor, product, routing):
  values, dy_MD = spread.draw()
  args = values, spread.draw_ids(routing, *spread.SIZES), dy_MD
  got = devices(shape, hops, factor, product)(*args)
  assert_equal(got, spread.one_device()(*args))


@each_hops
def test_transports_have_the_same_rounds(hops, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', stand_in)
  values, dy_MD = spread.draw()
  axes = spread.HOPS[hops]
  padded = devices((2, 2), hops, 0.5)
  ragged = spread.over((2, 2), step(axes, 0.5, 'ragged'))
  for routing in ('all_to_one', 'uneven'):
    ids_MK = spread.draw_ids(routing, *spread.SIZES)
    got, want = (run(values, ids_MK, dy_MD) for run in (padded, ragged))
    assert_equal(got, want)


def test_an_even_load_takes_one_round_and_a_full_device_more():
  run, *_ = assigned((2, 4), 'one_hop', 1.0)
  even = np.arange(8 * LOCAL * TOP_K, dtype=np.int32).reshape(-1, TOP_K)
  _, counts = run(even % EXPERTS)
  assert set(np.asarray(counts)) == {1}
  _, counts = run(np.zeros_like(even) + np.arange(TOP_K, dtype=np.int32))
  # A slice of a token each brings 8 to a device that has room for 15.
  assert set(np.asarray(counts)) == {5}


def test_no_array_has_room_for_all_tokens():
  """The largest of the report's layer on 64 devices, forward and backward."""
  tokens, dim, width, local, count = 4096, 7168, 2048, 4, 64
  sizes = {'node': 8, 'expert': 8}
  types = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.sharding.AbstractMesh(
    tuple(sizes.values()), tuple(sizes), axis_types=types
  )
  spec = jax.sharding.PartitionSpec(('node', 'expert'))
  shape = lambda *s: jax.ShapeDtypeStruct((s[0] * count, *s[1:]), jnp.bfloat16)
  up, down = (local, dim, width), (local, width, dim)
  values = {
    'x_MD': shape(tokens, dim),
    'gates_MK': shape(tokens, 8),
    'experts': expert_ops.Experts(shape(*up), shape(*up), shape(*down)),
  }
  ids_MK = jax.ShapeDtypeStruct((tokens * count, 8), jnp.int32)
  run = jax.shard_map(
    step(spread.TWO_HOPS, 1.5, 'ragged', 'ragged'),
    mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
  )  # fmt: skip
  program = jax.make_jaxpr(run)(values, ids_MK, shape(tokens, dim))
  (body,) = (e for e in program.jaxpr.eqns if e.primitive.name == 'shard_map')
  arrays = [v.aval for e in spread.equations(body.params['jaxpr'])
            for v in e.outvars]  # fmt: skip
  rows = max(a.shape[0] for a in arrays if a.ndim == 2 and a.shape[1] == dim)
  assert rows == 49_152  # of 262,144
