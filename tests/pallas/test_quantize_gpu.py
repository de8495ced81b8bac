"""Quantisers on Hopper: the reference's bits, and their machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import machine_code
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import quantize_gpu, reference
from tests.pallas import gpu

HOW = ('pow2', 'floor')
reference_both = jax.jit(reference.quantize_both, static_argnames=HOW)
reference_again = jax.jit(reference.requantize_transposed, static_argnames=HOW)
SHAPES = [(128, 128), (200, 136), (65, 33), (1, 300)]
EACH = pytest.mark.parametrize(
  ('shape', 'pow2', 'floor'),
  [
    ((200, 136), False, 0.0),
    ((65, 33), True, 1e-4),
    *(
      pytest.param(*form, marks=pytest.mark.nightly)
      for form in [
        ((256, 192), False, 0.0),
        ((256, 192), True, 0.0),
        ((256, 192), False, 1e-4),
        *((shape, True, 1e-4) for shape in SHAPES if shape != (65, 33)),
      ]
    ),
  ],
)


def draw(shape):
  """Rows and columns of many magnitudes, zeros, ties and denormals."""
  rng = np.random.default_rng(shape)
  x_MD = rng.normal(size=shape) * np.exp2(rng.integers(-50, 50, (shape[0], 1)))
  x_MD *= np.exp2(rng.integers(-20, 20, (1, shape[1])))
  x_MD[rng.uniform(size=shape) < 0.1] = 0
  x_MD[:, shape[1] // 2] = 0
  x_MD[shape[0] // 2] *= 2.0**-60  # a scale would be less than 2^-116
  return jnp.asarray(x_MD, jnp.bfloat16)


def assert_bits(got, want):
  assert got.tile == want.tile and got.shape == want.shape
  for x, y in ((got.scales, want.scales), (got.values, want.values)):
    np.testing.assert_array_equal(
      np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
    )


@gpu.interpreted
@EACH
def test_both_copies_have_the_bits_of_the_reference(shape, pow2, floor, capfd):
  x_MD = draw(shape)
  with gpu.no_races(capfd):
    got = quantize_gpu.quantize_both(
      x_MD, pow2=pow2, floor=floor, interpret=True
    )
  want = reference_both(x_MD, pow2=pow2, floor=floor)
  for one, other in zip(got, want, strict=True):
    assert_bits(one, other)


@gpu.interpreted
@EACH
def test_requantised_have_the_bits_of_the_reference(shape, pow2, floor, capfd):
  q, _ = reference_both(draw(shape), pow2=pow2, floor=floor)
  with gpu.no_races(capfd):
    got = quantize_gpu.requantize_transposed(
      q, pow2=pow2, floor=floor, interpret=True
    )
  assert_bits(got, reference_again(q, pow2=pow2, floor=floor))


@gpu.interpreted
def test_under_jit_and_vmap():
  x_BMD = jnp.stack([draw((130, 200)), draw((130, 200))[::-1]])
  run = functools.partial(quantize_gpu.quantize_both, interpret=True)
  got = jax.jit(jax.vmap(run))(x_BMD)
  want = jax.vmap(reference_both)(x_BMD)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_array_equal(one.scales, other.scales)
    np.testing.assert_array_equal(
      np.asarray(one.values, np.float32), np.asarray(other.values, np.float32)
    )


@gpu.interpreted
@pytest.mark.parametrize('pow2', [False, True])
def test_what_is_not_finite_is_nan_and_spoils_no_other_tile(pow2):
  places = np.array([[3, 5], [7, 9]])
  x_MD = (
    draw((128, 256))
    .at[tuple(places.T)]
    .set(jnp.asarray([jnp.nan, -jnp.inf], jnp.bfloat16))
  )
  got = quantize_gpu.quantize_both(x_MD, pow2=pow2, interpret=True)
  want = reference_both(x_MD, pow2=pow2)
  orders = (places, places[:, ::-1])
  for one, other, places in zip(got, want, orders, strict=True):
    one, other = (np.asarray(q.values, np.float32) for q in (one, other))
    assert np.isnan(one[tuple(places.T)]).all()
    for row, _ in places:  # the rest of these tiles is undefined
      one[row, :128] = other[row, :128] = 0
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('ulps', [-1, 0, 1])
def test_reciprocals_are_refined_to_the_nearest(ulps):
  """The GPU's quotient is an approximation, at most an ulp off."""
  x = np.linspace(1, 2, 100_000, endpoint=False, dtype=np.float32)
  want = np.float32(1) / x
  rough = (want.view(np.int32) + np.int32(ulps)).view(np.float32)
  got = jax.jit(quantize_gpu.refine)(x, rough)
  np.testing.assert_array_equal(np.asarray(got), want)


def test_reciprocals_of_all_scales():
  rng = np.random.default_rng(0)
  x = np.exp2(rng.uniform(-116, 121, 100_000)).astype(np.float32)
  x = np.concatenate([x, np.exp2(np.arange(-116, 122, dtype=np.float32))])
  got = np.asarray(jax.jit(quantize_gpu.reciprocal)(x))
  np.testing.assert_array_equal(got, np.float32(1) / x)
  assert quantize_gpu.reciprocal(jnp.float32(jnp.inf)) == 0


@gpu.transposing
@pytest.mark.parametrize(
  'shape',
  [
    (4096, 7168),
    (65, 33),
    *(
      pytest.param(shape, marks=pytest.mark.nightly)
      for shape in SHAPES
      if shape != (65, 33)
    ),
  ],
)
def test_shapes_are_lowered(shape):
  x_MD = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  text = gpu.lower(quantize_gpu.quantize_both, x_MD)
  assert 'cvt.rn.satfinite.e4m3x2.f32' in text
  scales = (shape[0], -(-shape[1] // 128))
  q = quantized.Quantized(
    jax.ShapeDtypeStruct(shape, quantized.E4M3),
    jax.ShapeDtypeStruct(scales, jnp.float32),
    quantized.ROW,
  )
  text = gpu.lower(quantize_gpu.requantize_transposed, q)
  assert 'cvt.rn.satfinite.e4m3x2.f32' in text


@gpu.compiled
def test_registers_suffice_and_transposing_loads_are_used():
  x_MD = jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16)
  machine = machine_code.compile_kernel(quantize_gpu.quantize_both, x_MD)
  assert machine.spilled == 0
  # 64 x 128 numbers are 16 loads of four 8 x 8 matrices; two of each way.
  assert machine.count(r'LDSM\.16\.M88\.4') == 16
  assert machine.count(r'LDSM\.16\.MT88\.4') == 16


def test_foreign_arguments_are_named():
  with pytest.raises(NotImplementedError, match='x_MD is float32'):
    quantize_gpu.quantize_both(jnp.ones((8, 8)))
  q = reference.quantize(jnp.ones((8, 8)), dtype=jnp.float8_e5m2)
  with pytest.raises(NotImplementedError, match='q is float8_e5m2'):
    quantize_gpu.requantize_transposed(q)
