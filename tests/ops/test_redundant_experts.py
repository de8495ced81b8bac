"""Redundant experts change who computes, and no bit of what is computed."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.distributed import sharding
from dsv3_jax.ops import experts as expert_ops
from dsv3_jax.ops import redundant_experts
from tests.ops import spread

DIM, WIDTH, TOKENS, BLOCK = 24, 12, 64, 8
EXPERTS, TOP_K = spread.EXPERTS, spread.TOP_K
SHAPES = ((1, 1), *spread.MESHES)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: np.float32(rng.normal(size=shape))
  up, down = (EXPERTS, DIM, WIDTH), (EXPERTS, WIDTH, DIM)
  gates_MK = np.float32(rng.uniform(0.1, 1.0, (TOKENS, TOP_K)))
  experts = expert_ops.Experts(normal(*up), normal(*up), normal(*down))
  return normal(TOKENS, DIM), gates_MK, experts


def slots_of(expert_Z):
  """The slots of each expert, of a list of what is in each."""
  slots_Er = np.full((EXPERTS, len(expert_Z) - EXPERTS + 1), -1, np.int32)
  count_E = np.zeros(EXPERTS, np.int32)
  for slot, expert in enumerate(expert_Z):
    slots_Er[expert, count_E[expert]] = slot
    count_E[expert] += 1
  return redundant_experts.RedundantSlots(slots_Er, count_E)


@functools.cache
def over(shape, dtype='float32'):
  """(expert_Z, x_MD, ids_MK, gates_MK, valid_M, experts) -> y_MD."""
  axes = tuple(a for a, n in zip(spread.AXES, shape, strict=True) if n > 1)
  replicated, sharded = sharding.Spec(), sharding.Spec(spread.AXES)
  options = expert_ops.ExpertOptions('blocks', BLOCK, axes)

  def body(redundant, x_MD, ids_MK, gates_MK, valid_M, experts):
    args = (x_MD.astype(dtype), ids_MK, gates_MK, experts)
    return expert_ops.expert_ffn(*args, options, redundant, valid_M)

  if math.prod(shape) > 1:
    specs = {'in_specs': (replicated, *[sharded] * 5), 'out_specs': sharded}
    mesh = spread.mesh(shape)
    body = jax.shard_map(body, mesh=mesh, check_vma=False, **specs)
  step = jax.jit(body)

  def run(expert_Z, x_MD, ids_MK, gates_MK, valid_M, experts):
    slots = expert_ops.Experts(*(w[np.array(expert_Z)] for w in experts))
    args = (x_MD, ids_MK, gates_MK, np.float32(valid_M), slots)
    return np.asarray(step(slots_of(expert_Z), *args))

  run.step = step
  return run


@functools.cache
def alone(dtype='float32'):
  """(x_MD, ids_MK, gates_MK, experts) -> y_MD, without any of this."""
  options = expert_ops.ExpertOptions('blocks', BLOCK)
  return jax.jit(
    lambda x_MD, *rest: expert_ops.expert_ffn(
      x_MD.astype(dtype), *rest, options
    )
  )


@st.composite
def placements(draw, spare=8):
  """Every expert at least once, in any order, on any device."""
  more = st.lists(st.integers(0, EXPERTS - 1), min_size=spare, max_size=spare)
  return draw(st.permutations([*range(EXPERTS), *draw(more)]))


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('routing', spread.ROUTINGS)
@pytest.mark.parametrize(
  'shape',
  [
    shape if shape == (2, 2) else pytest.param(shape, marks=pytest.mark.nightly)
    for shape in SHAPES
  ],
  ids=str,
)
def test_the_bits_of_one_device_without_redundancy(shape, routing):
  x_MD, gates_MK, experts = draw()
  ids_MK = spread.draw_ids(routing, TOKENS, TOP_K, EXPERTS)
  want = alone()(x_MD, ids_MK, gates_MK, experts)
  args = (x_MD, ids_MK, gates_MK, np.ones(TOKENS), experts)
  rng = np.random.default_rng(1)
  for spare in (0, 8):
    more = rng.integers(0, EXPERTS, spare)
    expert_Z = rng.permutation([*range(EXPERTS), *more])
    np.testing.assert_array_equal(over(shape)(expert_Z, *args), want)


@pytest.mark.usefixtures('optimized')
@hypothesis.given(expert_Z=placements(), seed=st.integers(0, 9))
@hypothesis.settings(max_examples=25)
def test_any_placement_gives_the_same_bits(expert_Z, seed):
  x_MD, gates_MK, experts = draw(seed)
  ids_MK = spread.draw_ids('uneven', TOKENS, TOP_K, EXPERTS, seed)
  want = alone()(x_MD, ids_MK, gates_MK, experts)
  args = (x_MD, ids_MK, gates_MK, np.ones(TOKENS), experts)
  np.testing.assert_array_equal(over((2, 2))(expert_Z, *args), want)
  assert over((2, 2)).step._cache_size() <= 2  # one for each number of slots


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('valid', [0, 1])
def test_one_row_alone_has_the_bits_that_it_has_without_redundancy(valid):
  x_MD, gates_MK, experts = draw(4)
  ids_MK = spread.draw_ids('random', TOKENS, TOP_K, EXPERTS)
  for m in range(8):
    row = slice(m, m + 1)
    args = (x_MD[row], ids_MK[row], gates_MK[row])
    want = valid * np.asarray(alone()(*args, experts))
    expert_Z = np.random.default_rng(m).permutation([*range(EXPERTS)] * 2)
    got = over((1, 1))(expert_Z, *args, np.full(1, valid), experts)
    np.testing.assert_array_equal(got, want)


def test_bf16_rounds_once_an_assignment():
  """As one device does, so that here too bits are equal."""
  x_MD, gates_MK, experts = draw(2)
  ids_MK = spread.draw_ids('uneven', TOKENS, TOP_K, EXPERTS)
  want = alone('bfloat16')(x_MD, ids_MK, gates_MK, experts)
  expert_Z = [*range(EXPERTS)][::-1] + [0, 0, 0, 1, 1, 2, 3, 4]
  args = (x_MD, ids_MK, gates_MK, np.ones(TOKENS), experts)
  got = over((2, 4), 'bfloat16')(expert_Z, *args)
  assert got.dtype == want.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want)


def test_void_tokens_go_nowhere_and_change_nothing():
  x_MD, gates_MK, experts = draw(3)
  ids_MK = spread.draw_ids('random', TOKENS, TOP_K, EXPERTS)
  valid_M = np.arange(TOKENS) % 3 > 0
  want = np.array(alone()(x_MD, ids_MK, gates_MK, experts))
  want[~valid_M] = 0.0
  x_MD[~valid_M] = np.nan  # would show in the output
  expert_Z = [*range(EXPERTS), *range(EXPERTS)]
  args = (x_MD, ids_MK, gates_MK, valid_M, experts)
  np.testing.assert_array_equal(over((1, 4))(expert_Z, *args), want)


@hypothesis.given(expert_Z=placements(), seed=st.integers(0, 99))
def test_slots_are_taken_in_turn(expert_Z, seed):
  """A slot holds the expert that was chosen; n slots of it serve 1/n each."""
  redundant, slots_in = slots_of(expert_Z), np.array(expert_Z)
  ids_MK = spread.draw_ids('uneven', TOKENS, TOP_K, EXPERTS, seed)
  valid_M = np.float32(np.random.default_rng(seed).integers(0, 2, TOKENS))
  slots_MK = np.asarray(_choose(ids_MK, valid_M, redundant))
  assert redundant.num_slots == len(expert_Z)
  assert np.all(slots_MK[valid_M == 0] == len(expert_Z))
  slots = slots_MK[valid_M > 0]
  np.testing.assert_array_equal(slots_in[slots], ids_MK[valid_M > 0])
  used = np.bincount(slots.ravel(), minlength=len(expert_Z))
  for expert in range(EXPERTS):
    uses = used[slots_in == expert]
    assert uses.max() - uses.min() <= 1


_choose = jax.jit(redundant_experts.choose)


def test_devices_begin_with_different_slots():
  """Of decode steps, where each has a row or two."""
  expert_Z = [*range(EXPERTS), *[5] * 8]
  redundant = redundant_experts.RedundantSlots(
    *map(jnp.asarray, slots_of(expert_Z))
  )
  mesh = spread.mesh((2, 4))
  spec = sharding.Spec(sharding.BATCH_AXES)
  choose = sharding.shard_map_step(
    lambda ids_MK: redundant_experts.choose(ids_MK, jnp.ones(1), redundant),
    mesh,
    in_specs=spec,
    out_specs=spec,
  )
  slots = jax.jit(choose)(np.full((8, 1), 5, np.int32))
  assert len(set(np.asarray(slots).ravel().tolist())) == 8
