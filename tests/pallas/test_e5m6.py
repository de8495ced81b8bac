"""The 12-bit codec against the oracle: numbers, codes and bytes, bit by bit."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import e5m6, reference
from tests.oracles import fp8_formats as oracle

quantize = jax.jit(e5m6.quantize)
pack = jax.jit(e5m6.pack)
unpack = jax.jit(e5m6.unpack)
POW2 = oracle.Scaling(pow2=True)
SIZES = [(1, 1), (1, 128), (3, 129), (130, 255), (2, 300), (5, 2)]


def draw(seed, shape):
  """Rows of many magnitudes, with wide ranges, zeros and ties in them."""
  rng = np.random.default_rng(seed)
  x_MN = rng.normal(size=shape) * np.exp2(rng.uniform(-24, 0, shape))
  x_MN *= np.exp2(rng.integers(-100, 100, (shape[0], 1)))
  x_MN[rng.uniform(size=shape) < 0.1] = 0
  x_MN = np.float32(x_MN)
  x_MN[np.abs(x_MN) < np.finfo(np.float32).tiny] = 0  # as a device may read it
  few_MN = x_MN.view(np.uint32) & 0xFFFF0000  # 8 bits: ties are frequent
  return np.where(rng.uniform(size=shape) < 0.5, few_MN.view(np.float32), x_MN)


def assert_same(got, want):
  """Also the sign of zeros; f32 denormals may have become zeros."""
  got, want = np.asarray(got), np.asarray(want)
  tiny = np.abs(want) < np.finfo(np.float32).tiny
  want = np.where(tiny & (got == 0), np.copysign(0, want), want)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_every_code_comes_back():
  codes = jnp.arange(4096, dtype=jnp.uint16)
  numbers = np.asarray(e5m6.decode(codes))
  finite = np.arange(4096) >> 6 & 31 < 31
  want = oracle.decode(np.arange(4096), oracle.E5M6)
  assert_same(numbers[finite], want[finite])
  np.testing.assert_array_equal(
    np.asarray(e5m6.encode(jnp.asarray(numbers)))[finite],
    np.arange(4096)[finite],
  )
  assert np.isnan(e5m6.decode(jnp.uint16(e5m6.NAN)))


@pytest.mark.parametrize('low', [0, 1, 0x7FFF, 0xFFFF])
def test_every_f32_exponent_tie_and_neighbour_rounds_as_the_oracle(low):
  """All upper halves of f32 numbers; ties are where the lower one is 0."""
  bits = (np.arange(65536, dtype=np.uint32) << 16) | np.uint32(low)
  x = bits.view(np.float32)
  got = np.asarray(jax.jit(e5m6.encode)(x))
  finite = np.isfinite(x)
  # f32 denormals are far below half of the smallest number: zeros.
  want = oracle.round_to(x[finite], oracle.E5M6)
  np.testing.assert_array_equal(
    got[finite], oracle.encode(want, oracle.E5M6).astype(np.uint16)
  )
  np.testing.assert_array_equal(got[~finite] & 0x7FF, e5m6.NAN)


@pytest.mark.parametrize('shape', SIZES)
def test_scales_values_and_bytes_are_the_oracles(shape):
  x_MN = draw(shape[1], shape)
  got = quantize(x_MN)
  _, scales_ij = oracle.quantize(x_MN, oracle.ROW, POW2)
  np.testing.assert_array_equal(got.scales, scales_ij)
  assert got.shape == shape and got.codes.dtype == jnp.uint8
  assert got.codes.shape == (shape[0], 3 * -(-shape[1] // 2))
  assert_same(unpack(got), np.float32(oracle.e5m6_copy(x_MN)))
  scale_MN = np.repeat(scales_ij, 128, axis=1)[:, : shape[1]]
  values_MN = oracle.round_to(x_MN / scale_MN, oracle.E5M6)
  for row_J, codes in zip(values_MN, np.asarray(got.codes), strict=True):
    want = oracle.pack12(oracle.encode(row_J, oracle.E5M6))
    np.testing.assert_array_equal(codes, want)


@hypothesis.given(
  st.lists(
    st.floats(-(2.0**127), 2.0**127, width=32),  # above, 2^128 is the nearest
    min_size=3,
    max_size=3,
  )
)
def test_any_row(row):
  x_MN = np.float32([row])
  assert_same(unpack(quantize(x_MN)), np.float32(oracle.e5m6_copy(x_MN)))


def test_scales_are_those_of_the_e4m3_copy():
  x_MN = jnp.asarray(draw(0, (7, 400)))
  q = reference.quantize(x_MN, pow2=True)
  packed = quantize(x_MN)
  np.testing.assert_array_equal(packed.scales, q.scales)
  given_MN = pack(x_MN, q.scales)
  np.testing.assert_array_equal(given_MN.codes, packed.codes)
  # What is packed once stays what it is.
  again = pack(unpack(packed), packed.scales)
  np.testing.assert_array_equal(again.codes, packed.codes)


def test_given_scales_too_small_saturate():
  x_MN = jnp.array([[1e6, -65279.0, 65024.0, 1.0]])
  got = unpack(pack(x_MN, jnp.ones((1, 1))))
  np.testing.assert_array_equal(got, [[65024.0, -65024.0, 65024.0, 1.0]])


def test_nan_and_infinity_are_seen_and_stay_in_their_tile():
  x_MN = np.ones((2, 256), np.float32)
  x_MN[0, 3], x_MN[0, 200] = np.nan, np.inf
  got = np.asarray(unpack(quantize(x_MN)))
  assert np.isnan(got[0, 3]) and np.isnan(got[0, 200])
  np.testing.assert_array_equal(got[1], 1.0)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_float_dtype_and_leading_dims(dtype):
  x_BMN = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 150)), dtype)
  got = quantize(x_BMN)
  assert got.shape == (2, 3, 150) and got.scales.shape == (2, 3, 2)
  for x_MN, got_MN in zip(x_BMN, unpack(got), strict=True):
    want = oracle.e5m6_copy(np.asarray(x_MN, np.float64))
    assert_same(got_MN, np.float32(want))
  vmapped = jax.jit(jax.vmap(e5m6.quantize))(x_BMN)
  np.testing.assert_array_equal(vmapped.codes, got.codes)


def test_a_packed_array_is_three_quarters_of_bf16_and_a_pytree():
  x_MN = jnp.ones((256, 512), jnp.bfloat16)
  packed = quantize(x_MN)
  assert packed.codes.nbytes == 0.75 * x_MN.nbytes
  assert packed.scales.nbytes == 256 * 4 * 4
  through = jax.jit(functools.partial(jax.tree.map, lambda x: x))(packed)
  assert through.columns == 512
  np.testing.assert_array_equal(unpack(through), x_MN)
