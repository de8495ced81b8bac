"""The FP8 product on Hopper against the reference, and its machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import machine_code
from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import cases, pallas_gpu, reference
from tests import nightly
from tests.pallas import gpu

BlockSizes = pallas_gpu.BlockSizes
TILES = pytest.mark.parametrize('tile', [quantized.ROW, quantized.BLOCK])
ONE_TILE = pytest.mark.parametrize(
  'tile',
  [pytest.param(quantized.ROW, marks=pytest.mark.nightly), quantized.BLOCK],
)
# Two programs take several tiles each: the ring goes on over their ends.
FEW = BlockSizes(programs=2)


def draw(case, tile):
  rng = np.random.default_rng(case)

  def matrix(rows, tile):
    wide = np.exp2(rng.integers(-20, 20, (rows, -(-case.k // 128))))
    x = rng.normal(size=(rows, case.k)) * wide.repeat(128, 1)[:, : case.k]
    return reference.quantize(jnp.asarray(x, jnp.float32), tile)

  return matrix(case.m, quantized.ROW), matrix(case.n, tile)


def structs(case, tile):
  def matrix(rows, tile):
    scales = (-(-rows // tile[0]), -(-case.k // 128))
    return quantized.Quantized(
      jax.ShapeDtypeStruct((rows, case.k), quantized.E4M3),
      jax.ShapeDtypeStruct(scales, jnp.float32),
      tile,
    )

  return matrix(case.m, quantized.ROW), matrix(case.n, tile)


def assert_same(got, want):
  assert got.shape == want.shape and got.dtype == want.dtype
  error = numerics.relative_error(got, want)
  assert error <= numerics.SAME_OPERANDS[str(want.dtype)], error


KERNELS = [
  (name, out_dtype, tile)
  for name, out_dtype in (
    ('tiny', 'float32'),
    ('one_row', 'bfloat16'),
    ('rope_row', 'bfloat16'),
    ('ragged', 'float32'),
    ('odd', 'float32'),
    ('odd', 'bfloat16'),
  )
  for tile in (quantized.ROW, quantized.BLOCK)
]
DAILY = (
  ('one_row', 'bfloat16', quantized.ROW),
  ('odd', 'float32', quantized.BLOCK),
)


@gpu.interpreted
@pytest.mark.parametrize(
  ('name', 'out_dtype', 'tile'),
  [
    *DAILY,
    *(
      pytest.param(*kernel, marks=pytest.mark.nightly)
      for kernel in KERNELS
      if kernel not in DAILY
    ),
  ],
)
def test_kernel_matches_the_reference(name, out_dtype, tile, capfd):
  a, b = draw(cases.SMALL[name], tile)
  with gpu.no_races(capfd):
    got = pallas_gpu.matmul(a, b, out_dtype, blocks=FEW, interpret=True)
  assert_same(got, reference.matmul(a, b, out_dtype))


@gpu.interpreted
@pytest.mark.parametrize(
  ('columns', 'tile', 'stages'),
  [
    pytest.param(64, quantized.ROW, 2, marks=pytest.mark.nightly),
    (64, quantized.BLOCK, 4),
    pytest.param(128, quantized.ROW, 3, marks=pytest.mark.nightly),
    pytest.param(192, quantized.BLOCK, 2, marks=pytest.mark.nightly),
  ],
)
def test_every_tile_and_ring(columns, tile, stages, capfd):
  a, b = draw(cases.Case(200, 320, 384), tile)
  blocks = BlockSizes(columns=columns, stages=stages, programs=3, strip=2)
  with gpu.no_races(capfd):
    got = pallas_gpu.matmul(a, b, 'float32', blocks=blocks, interpret=True)
  assert_same(got, reference.matmul(a, b, jnp.float32))


@gpu.interpreted
@ONE_TILE
@pytest.mark.nightly
def test_again_gives_the_same_bits_also_under_jit(tile):
  a, b = draw(cases.SMALL['ragged'], tile)
  run = functools.partial(
    pallas_gpu.matmul, out_dtype='float32', interpret=True
  )
  first = np.asarray(run(a, b))
  np.testing.assert_array_equal(np.asarray(jax.jit(run)(a, b)), first)


@gpu.interpreted
def test_zeros_give_zeros():
  a, b = draw(cases.SMALL['one_block'], quantized.BLOCK)
  zeros = reference.quantize(jnp.zeros(a.shape))
  got = pallas_gpu.matmul(zeros, b, 'bfloat16', interpret=True)
  assert not np.any(np.asarray(got, np.float32))


@gpu.interpreted
@pytest.mark.nightly
def test_vmap_is_a_loop_of_products():
  pairs = [draw(cases.Case(65, 72, k), quantized.BLOCK) for k in (256, 256)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
  run = functools.partial(
    pallas_gpu.matmul, out_dtype='float32', interpret=True
  )
  got = jax.vmap(run)(*stacked)
  want = jnp.stack([reference.matmul(*pair, jnp.float32) for pair in pairs])
  assert_same(got, want)


@TILES
@pytest.mark.parametrize(
  'name',
  nightly.daily(cases.V3 | cases.SMALL, 'q_kv_down', 'down', 'one_row', 'odd'),
)
def test_all_shapes_are_lowered_to_wgmma_in_fp8(name, tile):
  """Whole: the interpreter takes sizes that TMA would not."""
  case = (cases.V3 | cases.SMALL)[name]
  out_dtype = 'float32' if tile == quantized.ROW else 'bfloat16'
  run = functools.partial(pallas_gpu.matmul, out_dtype=out_dtype)
  text = gpu.lower(run, *structs(case, tile))
  columns = pallas_gpu.choose(1, case.m, case.n, tile == quantized.ROW).columns
  want = {f'm64n{columns}k32.f32.e4m3.e4m3'}
  assert gpu.multiplications(text) == want


@gpu.compiled
@pytest.mark.parametrize(
  ('columns', 'tile', 'out_dtype'),
  [
    (64, quantized.BLOCK, 'bfloat16'),
    (128, quantized.BLOCK, 'bfloat16'),
    (192, quantized.BLOCK, 'bfloat16'),
    (192, quantized.BLOCK, 'float32'),
    (64, quantized.ROW, 'float32'),
    (128, quantized.ROW, 'float32'),
  ],
)
def test_registers_suffice_and_four_wgmmas_are_promoted_at_once(
  columns, tile, out_dtype
):
  run = functools.partial(
    pallas_gpu.matmul, out_dtype=out_dtype, blocks=BlockSizes(columns=columns)
  )
  machine = machine_code.compile_kernel(
    run, *structs(cases.V3['gate_up'], tile)
  )
  assert machine.spilled == 0
  assert machine.count(rf'QGMMA.64x{columns}x32.F32.E4M3.E4M3') == 4
  # The first wgmma of four starts from zero, at no cost.
  assert machine.count(r'QGMMA.*, RZ, !UPT') == 1
  # No zero of an accumulator is written, and each is read by one FMA.
  assert machine.count('FFMA') <= columns // 2 + 16


@pytest.mark.parametrize(
  ('rows', 'columns', 'want'),
  [(4096, 2112, 192), (4096, 7168, 192), (128, 7168, 64), (128, 16384, 128)],
)
def test_columns_are_chosen_by_what_the_busiest_program_loads(
  rows, columns, want
):
  assert pallas_gpu.choose(1, rows, columns, False).columns == want


def test_wrong_or_foreign_arguments_are_named():
  with pytest.raises(ValueError, match='columns=96 must be 64, 128 or 192'):
    BlockSizes(columns=96)
  a, b = draw(cases.SMALL['tiny'], quantized.ROW)
  with pytest.raises(ValueError, match='columns=192 must be at most 128'):
    pallas_gpu.matmul(a, b, 'float32', blocks=BlockSizes(columns=192))
  e5m2 = reference.quantize(jnp.ones((64, 256)), dtype=jnp.float8_e5m2)
  with pytest.raises(NotImplementedError, match='a is float8_e5m2, not e4m3'):
    pallas_gpu.matmul(e5m2, b, 'float32')
