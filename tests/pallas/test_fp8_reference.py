"""Quantisers and the FP8 product in plain jnp against the float64 oracle."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import api, cases, reference
from tests import nightly
from tests.oracles import fp8 as blocks_oracle
from tests.oracles import fp8_formats as oracle
from tests.oracles import fp8_gemm

HOW = ('tile', 'pow2', 'floor', 'dtype')
quantize = jax.jit(reference.quantize, static_argnames=HOW)
product = jax.jit(reference.matmul, static_argnums=2)
POW2 = oracle.Scaling(pow2=True)
COLUMN = (128, 1)
TILES = [quantized.ROW, COLUMN, quantized.BLOCK]
SIZES = [(1, 1), (127, 129), (257, 131)]
MORE = [(3, 300), (300, 3), (128, 256)]
FORMATS = [(quantized.E4M3, oracle.E4M3), (jnp.float8_e5m2, oracle.E5M2)]
F32 = np.finfo(np.float32)


def draw(seed, shape):
  """Rows and columns of all magnitudes, zeros, ties and wide ranges."""
  rng = np.random.default_rng(seed)
  x_IJ = rng.normal(size=shape) * np.exp2(rng.uniform(-20, 0, shape))
  x_IJ *= np.exp2(rng.integers(-50, 50, (shape[0], 1)))
  x_IJ *= np.exp2(rng.integers(-50, 50, (1, shape[1])))
  x_IJ[rng.uniform(size=shape) < 0.1] = 0
  x_IJ = np.float32(x_IJ)
  x_IJ[np.abs(x_IJ) < F32.tiny] = 0  # a device may read denormals so
  few_IJ = (x_IJ.view(np.uint32) & 0xFFF80000).view(np.float32)
  return np.where(rng.uniform(size=shape) < 0.5, few_IJ, x_IJ)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spread(scales_ij, shape, tile):
  return blocks_oracle.spread(np.asarray(scales_ij), shape, tile)


def exact(q):
  """The tensor that a Quantized holds, in f64."""
  values_IJ = np.asarray(q.values.astype(jnp.float32), np.float64)
  return values_IJ * spread(q.scales, q.shape, q.tile)


def assert_quantized(q, x_IJ, tile, scaling, form=oracle.E4M3):
  """Powers of two: the oracle's bits. Else scales and ties within f32's digits.

  f32 rounds 1 / 448, its product with amax, the reciprocal of the scale and its
  product with x: each moves the result by at most half an ulp, 2^-24.
  """
  want_IJ, want_ij = oracle.quantize(x_IJ, tile, scaling, form)
  got_IJ = np.asarray(q.values.astype(jnp.float32), np.float64)
  assert q.tile == tile and q.shape == x_IJ.shape
  assert q.scales.dtype == jnp.float32 and q.scales.shape == want_ij.shape
  if scaling.pow2:
    np.testing.assert_array_equal(q.scales, want_ij)
    np.testing.assert_array_equal(got_IJ, want_IJ)
    return
  np.testing.assert_allclose(q.scales, want_ij, rtol=2.0**-23, atol=0)
  ratio_IJ = np.float64(x_IJ) / spread(q.scales, q.shape, tile)
  low_IJ, high_IJ = (
    oracle.round_to(ratio_IJ * (1 + slack), form)
    for slack in (-(2.0**-23), 2.0**-23)
  )
  assert np.all((got_IJ == low_IJ) | (got_IJ == high_IJ))
  assert np.mean(got_IJ == want_IJ) > 0.99 or got_IJ.size < 100


@pytest.mark.parametrize(
  'shape', [*SIZES, *(pytest.param(x, marks=pytest.mark.nightly) for x in MORE)]
)
@pytest.mark.parametrize('tile', TILES)
def test_every_tile_as_the_oracle(shape, tile):
  x_IJ = draw(shape[0], shape)
  for dtype, form in FORMATS:
    for pow2 in (False, True):
      q = quantize(x_IJ, tile, pow2=pow2, dtype=dtype)
      assert q.values.dtype == dtype
      assert_quantized(q, x_IJ, tile, oracle.Scaling(pow2), form)


@hypothesis.settings(max_examples=25)  # about as many are compiled
@hypothesis.given(
  shape=st.sampled_from([(1, 4), (3, 1), (3, 4)]),
  numbers=st.lists(
    st.floats(
      width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False
    ),
    min_size=12,
    max_size=12,
  ),
  tile=st.sampled_from(TILES),
  scaling=st.builds(
    oracle.Scaling,
    pow2=st.booleans(),
    floor=st.sampled_from([0.0, 1e-4, 1.0]),
  ),
)
def test_any_numbers(shape, numbers, tile, scaling):
  x_IJ = np.float32(numbers[: shape[0] * shape[1]]).reshape(shape)
  q = quantize(x_IJ, tile, **scaling._asdict())
  want = oracle.Scaling(scaling.pow2, float(np.float32(scaling.floor)))
  assert_quantized(q, x_IJ, tile, want)


@pytest.mark.parametrize('form', FORMATS)
def test_powers_of_two_exactly_at_and_beside_every_border(form):
  """One row per amax: largest * 2^k and its neighbours, for all k of f32."""
  dtype, form = form
  borders = form.largest * np.exp2(np.arange(-116, 128 - 16.0))
  borders = borders[borders >= F32.tiny].astype(np.float32)
  below = np.nextafter(borders, np.float32(0))
  above = np.nextafter(borders, np.float32(np.inf))
  for amax_I in (borders, below, above):
    q = quantize(amax_I[:, None], pow2=True, dtype=dtype)
    want_I = [oracle.scale_of(a, POW2, form) for a in amax_I]
    np.testing.assert_array_equal(q.scales[:, 0], want_I)
  ratio = quantize(above[:, None], pow2=True).scales[:, 0]
  assert np.all(np.log2(ratio) == np.rint(np.log2(ratio)))


def test_floor_and_the_ends_of_f32():
  floor = float(np.float32(1e-4))
  amax = [0.0, 1e-9, floor, 2e-4, F32.tiny, 2 * F32.tiny, 3e38, -3e38]
  x_I1 = np.float32(amax)[:, None]
  for pow2 in (False, True):
    for at in (0.0, floor):
      q = quantize(x_I1, pow2=pow2, floor=at)
      assert_quantized(q, x_I1, quantized.ROW, oracle.Scaling(pow2, at))
      # Dequantised, huge numbers stay finite and within 2^-4 of themselves.
      back_I = np.asarray(reference.dequantize(q))[-2:, 0]
      np.testing.assert_allclose(back_I, x_I1[-2:, 0], rtol=2.0**-4)
  floored = quantize(x_I1, floor=1e-4).scales[:3, 0]
  np.testing.assert_array_equal(floored, floored[0])


def test_denormals_are_zero_or_nearly():
  """A tile without a normal number holds zeros and has scale 1."""
  x_IJ = np.full((2, 128), 1e-40, np.float32)
  x_IJ[1, 0] = F32.tiny
  for pow2 in (False, True):
    q = quantize(x_IJ, pow2=pow2)
    np.testing.assert_array_equal(q.scales[:, 0], [1.0, 2.0**-116])
    np.testing.assert_array_equal(q.values.astype(jnp.float32)[0], 0)


def test_nan_and_infinity_are_seen_and_stay_in_their_tile():
  x_IJ = np.ones((2, 384), np.float32)
  x_IJ[0, 5], x_IJ[0, 130], x_IJ[1, 260] = np.nan, np.inf, -np.inf
  for dtype, _ in FORMATS:
    for pow2 in (False, True):
      back_IJ = reference.dequantize(quantize(x_IJ, pow2=pow2, dtype=dtype))
      back_IJ = np.asarray(back_IJ)
      assert not np.isfinite(back_IJ[[0, 0, 1], [5, 130, 260]]).any()
      np.testing.assert_allclose(back_IJ[0, 256:], 1, rtol=1e-6)
      np.testing.assert_allclose(back_IJ[1, :256], 1, rtol=1e-6)


def test_leading_dims_and_bf16_input():
  x_BIJ = jnp.asarray(normal(0, 2, 130, 140), jnp.bfloat16)
  for tile in TILES:
    q = quantize(x_BIJ, tile, pow2=True)
    one = functools.partial(reference.quantize, tile=tile, pow2=True)
    vmapped = jax.jit(jax.vmap(one))(x_BIJ)
    jax.tree.map(np.testing.assert_array_equal, vmapped, q)
    for b, x_IJ in enumerate(np.asarray(x_BIJ, np.float64)):
      part = quantized.Quantized(q.values[b], q.scales[b], tile)
      assert_quantized(part, x_IJ, tile, POW2)


def test_quantize_both_is_rows_of_x_and_of_its_transpose():
  x_MD = draw(0, (130, 200))
  for pow2 in (False, True):
    both = functools.partial(reference.quantize_both, pow2=pow2)
    rows, columns = jax.jit(both)(x_MD)
    assert_quantized(rows, x_MD, quantized.ROW, oracle.Scaling(pow2))
    assert_quantized(columns, x_MD.T, quantized.ROW, oracle.Scaling(pow2))


def test_both_orientations_of_a_weight_are_the_same_numbers():
  w_EDF = normal(0, 2, 200, 300)
  turned, straight = jax.jit(reference.quantize_weight)(w_EDF)
  assert turned.shape == (2, 300, 200) and turned.scales.shape == (2, 3, 2)
  for e in range(2):
    expert = lambda q, e=e: quantized.Quantized(
      q.values[e], q.scales[e], q.tile
    )
    assert_quantized(expert(straight), w_EDF[e], quantized.BLOCK, oracle.PLAIN)
    np.testing.assert_array_equal(
      exact(expert(turned)), exact(expert(straight)).T
    )
  with pytest.raises(ValueError, match=r'tile=\(1, 128\)'):
    reference.transpose(quantize(w_EDF[0]))


def test_requantised_tiles_are_those_of_what_the_first_ones_hold():
  x_MD = draw(1, (130, 200))
  for pow2 in (False, True):
    first = quantize(x_MD, pow2=pow2)
    held_MD = np.asarray(reference.dequantize(first))
    np.testing.assert_array_equal(held_MD, np.float32(exact(first)))
    again = functools.partial(reference.requantize_transposed, pow2=pow2)
    got = jax.jit(again)(first)
    scaling = oracle.Scaling(pow2)
    assert_quantized(got, held_MD.T, quantized.ROW, scaling)
    if pow2:
      np.testing.assert_array_equal(
        exact(got), fp8_gemm.requantize(x_MD, scaling).T
      )


def assert_same_operands(got, want, dtype):
  assert got.dtype == dtype
  error = numerics.relative_error(got.astype(jnp.float32), want)
  assert error <= numerics.SAME_OPERANDS[jnp.dtype(dtype).name]


@pytest.mark.parametrize(
  'name', nightly.daily(cases.SMALL, 'two_tiles', 'one_row', 'ragged', 'odd')
)
@pytest.mark.parametrize('tile', [quantized.ROW, quantized.BLOCK])
def test_products_of_the_same_operands(name, tile):
  m, n, k = cases.SMALL[name]
  a, b = quantize(draw(0, (m, k))), quantize(normal(1, n, k), tile)
  want_MN = exact(a) @ exact(b).T
  for dtype in (jnp.float32, jnp.bfloat16):
    got_MN = jax.jit(api.matmul, static_argnums=(2, 3))(
      a, b, dtype, 'reference'
    )
    assert_same_operands(got_MN, want_MN, dtype)


@pytest.mark.parametrize(
  'name', nightly.daily(cases.SMALL, 'one_row', 'ragged', 'odd')
)
def test_the_three_products_of_a_linear(name):
  """From the unquantised arrays: equal to the oracle's, whose scales agree."""
  m, f, d = cases.SMALL[name]
  x_MD, w_DF, dy_MF = normal(0, m, d), normal(1, d, f), normal(2, m, f)
  straight = quantize(w_DF, quantized.BLOCK, pow2=True)
  turned = reference.transpose(straight)
  x, dy = quantize(x_MD, pow2=True), quantize(dy_MF, pow2=True)
  y_MF = product(x, turned, jnp.float32)
  want = fp8_gemm.fprop(x_MD, w_DF, POW2, POW2)
  assert_same_operands(y_MF, want, jnp.float32)
  dx_MD = product(dy, straight, jnp.float32)
  want = fp8_gemm.dgrad(dy_MF, w_DF, POW2, POW2)
  assert_same_operands(dx_MD, want, jnp.float32)
  a = quantize(reference.dequantize(x).T, pow2=True)
  b = quantize(dy_MF.T, pow2=True)
  dw_DF = product(a, b, jnp.float32)
  want = fp8_gemm.wgrad(x_MD, dy_MF, POW2, POW2)
  assert_same_operands(dw_DF, want, jnp.float32)


def parts(size, by=2048):
  """Slices of a long dim, so that its f32 arrays never exist as a whole."""
  return [slice(i, min(i + by, size)) for i in range(0, size, by)]


@pytest.mark.parametrize('name', nightly.daily(cases.V3, 'q_kv_down'))
def test_v3_products_differ_by_less_than_one_in_a_thousand(name):
  """From the product of the unquantised operands, by DeepGEMM's measure."""
  _, n, k = cases.V3[name]
  a_MK = normal(0, 64, k)
  rng = np.random.default_rng(1)
  values, scales, wants = [], [], []
  for part in parts(n):
    b_NK = rng.standard_normal((part.stop - part.start, k), np.float32)
    wants.append(a_MK @ b_NK.T)
    q = quantize(b_NK, quantized.BLOCK)
    values.append(q.values)
    scales.append(q.scales)
  b = quantized.Quantized(
    jnp.concatenate(values), jnp.concatenate(scales), quantized.BLOCK
  )
  got_MN = jax.jit(api.matmul)(quantize(a_MK), b)
  difference = numerics.difference(
    got_MN.astype(jnp.float32), np.concatenate(wants, axis=1)
  )
  assert 1e-5 < difference < numerics.FP8_DIFFERENCE


def test_the_measures_by_hand():
  assert numerics.difference([3.0, 4.0], [3.0, 4.0]) == 0
  assert numerics.difference([1.0, 0.0], [0.0, 1.0]) == 1
  assert numerics.difference(np.zeros(3), np.zeros(3)) == 0
  assert numerics.relative_error([1.0, 3.5], [1.0, 4.0]) == 0.125
  assert numerics.relative_error([], []) == 0


def test_more_than_sixteen_blocks_are_added_in_order_too():
  """2^24, then blocks of 1, each of which f32 loses when it comes by itself."""
  for blocks in (15, 18):
    a_1K = np.zeros((1, blocks * 128), np.float32)
    a_1K[0, ::128] = 256
    b_1K = a_1K / 65536
    b_1K[0, 0] = 65536
    a, b = quantize(a_1K, pow2=True), quantize(b_1K, pow2=True)
    assert product(a, b, jnp.float32).item() == 2.0**24
    backwards = [quantize(x[:, ::-1], pow2=True) for x in (a_1K, b_1K)]
    got = product(*backwards, jnp.float32).item()
    assert got == 2.0**24 + 2 * ((blocks - 1) // 2)


def test_a_weight_gradient_of_one_block_of_tokens():
  # Both operands transposed in one program: XLA's CPU backend has no such BF16
  # product, and finds none to make where there are several blocks.
  x_MK, dy_MN = normal(0, 128, 16), normal(1, 128, 7)

  @jax.jit
  def gradient(x_MK, dy_MN):
    x, dy = (quantize(x.T, tile=quantized.ROW) for x in (x_MK, dy_MN))
    return reference.matmul(dy, x, jnp.float32)

  got_NK = gradient(x_MK, dy_MN)
  assert numerics.difference(got_NK, dy_MN.T @ x_MK) < 1e-3


def test_api_names_what_does_not_fit():
  a, b = quantize(normal(0, 4, 256)), quantize(normal(1, 8, 256))

  def check(a, b, message, **options):
    with pytest.raises(ValueError, match=message):
      api.matmul(a, b, **options)

  check(a, quantize(normal(1, 8, 255)), r'a.shape=.* share K')
  check(quantize(normal(0, 4, 256), quantized.BLOCK), b, r'a\.tile=')
  check(a, quantize(normal(0, 8, 256), COLUMN), r'b\.tile=')
  check(quantize(normal(0, 2, 4, 256)), b, r'a\.shape=\(2, 4, 256\)')
  wrong = quantized.Quantized(b.values, b.scales[:, :1], b.tile)
  check(a, wrong, r'b\.scales\.shape=\(8, 1\) must be \(8, 2\)')
  check(a, b, "implementation='fast'", implementation='fast')


def test_under_vmap_and_checkpoint():
  x_BMK, w_NK = normal(0, 3, 5, 256), normal(1, 7, 256)
  b = quantize(w_NK, quantized.BLOCK)
  multiply = lambda x: reference.matmul(quantize(x), b, jnp.float32)
  got = jax.jit(jax.vmap(multiply))(x_BMK)
  want = jnp.stack([multiply(x) for x in x_BMK])
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
  weighted = lambda weight, x: jnp.sum(multiply(x) * weight)
  grad = jax.jit(jax.grad(jax.checkpoint(weighted)))(want[0], x_BMK[0])
  np.testing.assert_allclose(grad, want[0], rtol=1e-6, atol=1e-5)
