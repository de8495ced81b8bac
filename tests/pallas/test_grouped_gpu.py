"""FP8 products of many experts on Hopper against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import machine_code
from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import reference as dense
from pallas_kernels.grouped_matmul import cases, pallas_gpu, reference
from tests import nightly
from tests.pallas import gpu

ROWS = reference.ROWS
UNUSED = 2  # blocks
FEW = pallas_gpu.BlockSizes(programs=2)


def layout(sizes):
  """(expert_j, num_blocks) with unused blocks at the end."""
  blocks = [-(-size // ROWS) for size in sizes]
  expert_j = np.repeat(np.arange(len(sizes)), blocks)
  expert_j = np.concatenate([expert_j, [len(sizes) - 1] * UNUSED])
  return jnp.asarray(expert_j, jnp.int32), jnp.int32(sum(blocks))


def rows(rng, sizes, width):
  """Padded rows of the experts; unused blocks are not zero."""
  x_JD = []
  for size in sizes:
    x_JD.append(rng.normal(size=(size, width)))
    x_JD.append(np.zeros((-size % ROWS, width)))
  x_JD.append(np.full((UNUSED * ROWS, width), 7.0))
  return np.float32(np.concatenate(x_JD))


def draw(case):
  rng = np.random.default_rng(0)
  a_JK, dy_JN = (rows(rng, case.sizes, width) for width in (case.k, case.n))
  b_ENK = rng.normal(size=(len(case.sizes), case.n, case.k))
  # Experts of different sizes: one that took another's weight would show.
  b_ENK *= np.exp2(np.arange(len(case.sizes)))[:, None, None]
  return a_JK, np.float32(b_ENK), dy_JN


def assert_same(got, want):
  assert got.shape == want.shape and got.dtype == want.dtype
  error = numerics.relative_error(got, want)
  assert error <= numerics.SAME_OPERANDS[str(want.dtype)], error


@gpu.interpreted
@pytest.mark.parametrize('name', nightly.daily(cases.SMALL, 'ragged'))
def test_rows_times_the_weight_of_their_expert(name, capfd):
  case = cases.SMALL[name]
  a_JK, b_ENK, _ = draw(case)
  operands = (
    dense.quantize(a_JK),
    dense.quantize(jnp.asarray(b_ENK), quantized.BLOCK),
    *layout(case.sizes),
    jnp.float32 if name == 'odd' else jnp.bfloat16,
  )
  with gpu.no_races(capfd):
    got = pallas_gpu.grouped(*operands, blocks=FEW, interpret=True)
  assert_same(got, reference.grouped(*operands))
  used = int(operands[3]) * ROWS
  assert not np.any(np.asarray(got, np.float32)[used:])


@gpu.interpreted
@pytest.mark.nightly
def test_blocks_of_experts_may_lie_in_any_order(capfd):
  case = cases.Case((100, 128, 200), 200, 200)
  a_JK, b_ENK, _ = draw(case)
  expert_j, num_blocks = layout(case.sizes)
  operands = (
    dense.quantize(a_JK),
    dense.quantize(jnp.asarray(b_ENK), quantized.BLOCK),
    expert_j[::-1],
    num_blocks,
    jnp.float32,
  )
  blocks = pallas_gpu.BlockSizes(columns=192, programs=3)
  with gpu.no_races(capfd):
    got = pallas_gpu.grouped(*operands, blocks=blocks, interpret=True)
  assert_same(got, reference.grouped(*operands))


@gpu.interpreted
@pytest.mark.parametrize('name', nightly.daily(cases.SMALL, 'empty'))
def test_gradients_of_the_weights(name, capfd):
  case = cases.SMALL[name]
  a_JK, _, dy_JN = draw(case)
  operands = (
    dense.quantize(a_JK.T),
    dense.quantize(dy_JN.T),
    *layout(case.sizes),
    len(case.sizes),
  )
  with gpu.no_races(capfd):
    got = pallas_gpu.grouped_k(*operands, blocks=FEW, interpret=True)
  assert_same(got, reference.grouped_k(*operands))
  for expert, size in enumerate(case.sizes):
    assert np.any(got[expert]) == (size > 0)


@gpu.interpreted
@pytest.mark.nightly
def test_again_gives_the_same_bits_also_under_jit():
  case = cases.Case((0, 64, 0, 64), 72, 256)
  a_JK, b_ENK, _ = draw(case)
  a = dense.quantize(a_JK)
  b = dense.quantize(jnp.asarray(b_ENK), quantized.BLOCK)
  run = functools.partial(
    pallas_gpu.grouped, out_dtype=jnp.float32, interpret=True
  )
  first = np.asarray(run(a, b, *layout(case.sizes)))
  again = jax.jit(run)(a, b, *layout(case.sizes))
  np.testing.assert_array_equal(np.asarray(again), first)


def struct(shape, tile):
  scales = (
    *shape[:-2],
    *(-(-s // t) for s, t in zip(shape[-2:], tile, strict=True)),
  )
  return quantized.Quantized(
    jax.ShapeDtypeStruct(shape, quantized.E4M3),
    jax.ShapeDtypeStruct(scales, jnp.float32),
    tile,
  )


def product(case, weights: bool):
  """A product of one case, and the shapes that it is lowered with."""
  experts = len(case.sizes)
  padded = sum(-(-size // ROWS) * ROWS for size in case.sizes)
  table = (
    jax.ShapeDtypeStruct((padded // ROWS,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  if weights:
    run = functools.partial(pallas_gpu.grouped_k, num_experts=experts)
    a = struct((case.k, padded), quantized.ROW)
    b = struct((case.n, padded), quantized.ROW)
  else:
    run = functools.partial(pallas_gpu.grouped, out_dtype=jnp.bfloat16)
    a = struct((padded, case.k), quantized.ROW)
    b = struct((experts, case.n, case.k), quantized.BLOCK)
  return run, (a, b, *table)


@pytest.mark.parametrize(
  ('name', 'weights', 'columns'),
  [
    ('gate_up', False, 192),
    ('gate_up', True, 128),
    pytest.param('down', False, 192, marks=pytest.mark.nightly),
    pytest.param('down', True, 128, marks=pytest.mark.nightly),
    ('odd', False, 64),
    ('odd', True, 64),
  ],
)
def test_shapes_are_lowered_to_wgmma_in_fp8(name, weights, columns):
  run, args = product((cases.V3 | cases.SMALL)[name], weights)
  want = {f'm64n{columns}k32.f32.e4m3.e4m3'}
  assert gpu.multiplications(gpu.lower(run, *args)) == want


@gpu.compiled
@pytest.mark.parametrize('weights', [False, True])
def test_registers_suffice(weights):
  run, args = product(cases.V3['gate_up'], weights)
  machine = machine_code.compile_kernel(run, *args)
  assert machine.spilled == 0
  assert machine.count('QGMMA') == 4
