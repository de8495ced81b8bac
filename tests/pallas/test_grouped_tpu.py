"""The TPU kernels of the experts' products, interpreted: the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import compile_kernels_tpu as without_tpu
from pallas_kernels.fp8_matmul import pallas_tpu as dense
from pallas_kernels.grouped_matmul import api, cases, pallas_tpu, reference
from tests import nightly
from tests.pallas import products

ROWS = reference.ROWS
V3 = [n for n in without_tpu.programs() if n.startswith('grouped')]
FORMS = [('ragged', 'float32'), ('none', 'float32'), ('odd', 'bfloat16')]
MORE = [(name, 'float32') for name in cases.SMALL]
MORE = [form for form in MORE if form not in FORMS]
STRICT = pltpu.InterpretParams(
  detect_races=True,
  uninitialized_memory='nan',
  num_cores_or_threads=2,
  random_seed=0,
)
reference_grouped = jax.jit(reference.grouped, static_argnums=4)
reference_grouped_k = jax.jit(reference.grouped_k, static_argnums=4)


@functools.partial(jax.jit, static_argnums=(4, 5))
def grouped(a, b, expert_j, num_blocks, dtype=jnp.float32, blocks=None):
  args = a, b, expert_j, num_blocks, dtype
  if blocks is None:
    return api.grouped(*args, implementation='pallas_interpret')
  return pallas_tpu.grouped(*args, blocks=blocks, interpret=True)


@functools.partial(jax.jit, static_argnums=(4, 5))
def grouped_k(a, b, expert_j, num_blocks, num_experts, blocks=None):
  args = a, b, expert_j, num_blocks, num_experts
  if blocks is None:
    return api.grouped_k(*args, implementation='pallas_interpret')
  return pallas_tpu.grouped_k(*args, blocks=blocks, interpret=True)


def operands(case):
  """Of `grouped`; what is not in use is NaN."""
  expert_j, num_blocks = products.experts_of(case.sizes)
  a = products.rows(0, len(expert_j) * ROWS, case.k)
  b = products.blocks(1, len(case.sizes), case.n, case.k)
  return products.poisoned(a, num_blocks, 0), b, expert_j, num_blocks


def operands_k(case):
  """Of `grouped_k`; what is not in use is NaN."""
  expert_j, num_blocks = products.experts_of(case.sizes)
  a = products.rows(0, case.k, len(expert_j) * ROWS)
  b = products.rows(1, case.n, len(expert_j) * ROWS)
  a, b = (products.poisoned(q, num_blocks, 1) for q in (a, b))
  return a, b, expert_j, num_blocks, len(case.sizes)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [*FORMS, *(pytest.param(*form, marks=pytest.mark.nightly) for form in MORE)],
)
def test_grouped_is_the_reference(name, dtype):
  args = (*operands(cases.SMALL[name]), dtype)
  got = grouped(*args)
  products.assert_same(got, reference_grouped(*args))
  products.assert_bitwise(grouped(*args), got)
  assert not np.any(got[args[3] * ROWS :])


@pytest.mark.parametrize(
  'name', nightly.daily(cases.SMALL, 'empty', 'none', 'odd')
)
def test_grouped_k_is_the_reference(name):
  case = cases.SMALL[name]
  args = operands_k(case)
  got = grouped_k(*args)
  products.assert_same(got, reference_grouped_k(*args))
  products.assert_bitwise(grouped_k(*args), got)
  for e, size in enumerate(case.sizes):
    assert np.any(got[e]) == (size > 0)


def test_order_of_the_experts_is_free():
  """Weights stay in VMEM from block to block: the right ones."""
  a, b, *_ = operands(cases.Case((128,) * 6, 200, 128))
  b = jax.tree.map(lambda x: x[:3], b)
  args = a, b, jnp.array([2, 2, 0, 2, 1, 1, -5]), jnp.int32(6)
  got = grouped(*args, jnp.float32, dense.BlockSizes(ROWS, 128, 128))
  products.assert_same(got, reference_grouped(*args, jnp.float32))


@pytest.mark.parametrize('num_blocks', [0, 1, 4])
def test_number_of_blocks_is_traced(num_blocks):
  case = cases.SMALL['ragged']
  num_blocks = jnp.int32(num_blocks)
  a, b, expert_j, _ = operands(case)
  args = a, b, expert_j, num_blocks
  products.assert_same(grouped(*args), reference_grouped(*args, jnp.float32))
  a, b, *_ = operands_k(case)
  args = a, b, expert_j, num_blocks, len(case.sizes)
  products.assert_same(grouped_k(*args), reference_grouped_k(*args))


def test_all_blocks_in_use():
  case = cases.Case((200, 0, 56), 128, 128)
  expert_j, num_blocks = products.experts_of(case.sizes, spare=0)
  a = products.rows(0, num_blocks * ROWS, case.k)
  b = products.blocks(1, 3, case.n, case.k)
  args = a, b, expert_j, num_blocks
  products.assert_same(grouped(*args), reference_grouped(*args, jnp.float32))
  a = products.rows(0, case.k, num_blocks * ROWS)
  b = products.rows(1, case.n, num_blocks * ROWS)
  args = a, b, expert_j, num_blocks, 3
  products.assert_same(grouped_k(*args), reference_grouped_k(*args))


def test_no_rows_at_all():
  none_j = jnp.zeros(0, jnp.int32)
  b = products.blocks(0, 2, 40, 50)
  assert grouped(products.rows(0, 0, 50), b, none_j, 0).shape == (0, 40)
  a, b = products.rows(0, 50, 0), products.rows(0, 40, 0)
  got = grouped_k(a, b, none_j, 0, 2)
  np.testing.assert_array_equal(got, np.zeros((2, 50, 40), np.float32))


def test_any_blocks_give_the_same():
  case = cases.Case((130, 1), 200, 640)
  args = operands(case)
  got = grouped(*args, jnp.float32, dense.BlockSizes(ROWS, 128, 256))
  products.assert_same(got, reference_grouped(*args, jnp.float32))
  args = operands_k(case)
  got = grouped_k(*args, dense.BlockSizes(256, 128, ROWS))
  products.assert_same(got, reference_grouped_k(*args))


def test_blocks_that_split_what_is_one():
  args = operands(cases.SMALL['odd'])
  with pytest.raises(ValueError, match=r'blocks\.m=256 must be 128'):
    grouped(*args, jnp.float32, dense.BlockSizes(256, 128, 128))
  args = operands_k(cases.SMALL['odd'])
  with pytest.raises(ValueError, match=r'blocks\.k=256 must be 128'):
    grouped_k(*args, dense.BlockSizes(128, 128, 256))


def test_steps_visit_every_expert_once_and_in_order():
  expert_j, num_blocks = products.experts_of((0, 300, 0, 0, 64, 0), spare=2)
  steps = jax.jit(pallas_tpu.grid_steps, static_argnums=2)(
    expert_j, num_blocks, 6
  )
  first, work = pallas_tpu.FIRST, pallas_tpu.WORK
  np.testing.assert_array_equal(
    steps.expert_i, [0, 1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 5]
  )
  np.testing.assert_array_equal(
    steps.bits_i,
    [first, first + work, work, work, first, first, first + work, first]
    + [0] * 4,
  )
  np.testing.assert_array_equal(
    np.asarray(steps.block_i)[[1, 2, 3, 6]], [0, 1, 2, 3]
  )


def test_vmap_over_everything_and_under_checkpoint():
  case = cases.Case((1, 130), 72, 200)
  other = cases.Case((130, 0), 72, 200)
  for f, make, last in (
    (grouped, operands, ()),
    (grouped_k, operands_k, (2,)),
  ):
    pairs = [make(case)[:4], make(other)[:4]]
    # Padded to as many blocks: the first has three in use, the other two.
    j = len(pairs[0][2])
    pairs[1] = _with_blocks(pairs[1], j, f is grouped_k)
    stacked = jax.tree.map(lambda *x: jnp.stack([*map(jnp.asarray, x)]), *pairs)
    got = jax.vmap(jax.checkpoint(lambda *args: f(*args, *last)))(*stacked)
    for one, pair in zip(got, pairs, strict=True):
      products.assert_same(one, f(*pair, *last))


def _with_blocks(args, blocks, of_k):
  """The same with more blocks that are not in use."""
  a, b, expert_j, num_blocks = args
  more = blocks - len(expert_j)
  expert_j = jnp.pad(expert_j, (0, more))

  def grow(q, axis):
    tail = [(0, more * ROWS if d == axis else 0) for d in range(2)]
    few = [(0, n * q.scales.shape[axis] // q.shape[axis]) for _, n in tail]
    return type(q)(jnp.pad(q.values, tail), jnp.pad(q.scales, few), q.tile)

  if of_k:
    return grow(a, 1), grow(b, 1), expert_j, num_blocks
  return grow(a, 0), b, expert_j, num_blocks


def test_no_race_and_nothing_read_that_was_not_written(capfd):
  """The interpreter's memory is NaN until written: unvisited experts' too."""
  case = cases.Case((0, 130, 0), 72, 136)
  args = (*operands(case), jnp.float32)
  got = pallas_tpu.grouped(*args, interpret=STRICT)
  products.assert_same(got, reference_grouped(*args))
  args = operands_k(case)
  got = pallas_tpu.grouped_k(*args, interpret=STRICT)
  products.assert_same(got, reference_grouped_k(*args))
  assert 'RACE' not in capfd.readouterr().out


@pytest.mark.parametrize('chip', nightly.daily(['v5p', 'v7x'], 'v5p'))
@pytest.mark.parametrize('name', V3)
def test_lowers_for_a_tpu(name, chip):
  program = without_tpu.programs()[name]
  text = without_tpu.lower(program, without_tpu.CHIPS[chip]).as_text()
  assert text.count('@tpu_custom_call') == 1
