"""The limited accumulator in jnp: the oracle's bits; what promotion repairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import limited, reference
from tests.oracles import fp8_accumulator as oracle

HOW = ('bits', 'chunk', 'promote_every')
quantize = jax.jit(reference.quantize, static_argnames=('tile', 'pow2'))
matmul_limited = jax.jit(limited.matmul_limited, static_argnames=HOW)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_scale(x_IJ):
  """One scale for all."""
  return quantize(x_IJ, x_IJ.shape)


def values(q):
  return np.asarray(q.values.astype(jnp.float32), np.float64)


def scaled(q):
  """value * scale in f64, for one scale."""
  return values(q) * float(q.scales.item())


@pytest.mark.parametrize(
  ('bits', 'every'),
  [
    (14, 0),
    (14, 128),
    (4, 32),
    (18, 128),
    *(
      pytest.param(bits, every, marks=pytest.mark.nightly)
      for bits, every in [
        *((14, 32), (4, 0), (4, 128), (18, 0), (18, 32)),
        *((10, 0), (10, 32), (10, 128)),
      ]
    ),
  ],
)
def test_registers_are_the_oracles_bit_for_bit(bits, every):
  """Scales 1, an odd K, rows of zeros, and E5M2 with its wider exponents."""
  a_MK = np.asarray(normal(0, 5, 300) * 40, np.float64)
  a_MK[1], a_MK[2, 64:200] = 0, 0
  b_NK = normal(1, 7, 300) * np.exp2(np.arange(300) % 9 - 4)
  for dtype in (quantized.E4M3, jnp.float8_e5m2):
    ones = lambda x, dtype=dtype: quantized.Quantized(
      jnp.asarray(x).astype(dtype), jnp.ones((1, 1)), x.shape
    )
    a, b = ones(a_MK), ones(np.float32(b_NK))
    got_MN = matmul_limited(a, b, bits=bits, promote_every=every)
    want_MN = oracle.matmul(values(a), values(b).T, bits=bits, every=every)
    np.testing.assert_array_equal(got_MN, want_MN)


def test_scales_of_tiles_are_applied_at_the_promotion():
  """Powers of two: bit for bit. Others: but for the order of two products."""
  x_MK = normal(0, 5, 300) * np.exp2(np.arange(300) // 128 * 7)
  w_NK = normal(1, 200, 300)
  for pow2 in (True, False):
    a, b = quantize(x_MK, pow2=pow2), quantize(w_NK, (128, 128), pow2=pow2)
    got_MN = matmul_limited(a, b)
    scale_kN = np.repeat(np.asarray(b.scales), 128, axis=0)[:200].T
    scale_Mk = np.asarray(a.scales)
    want_MN = oracle.matmul(values(a), values(b).T, scale_Mk, scale_kN)
    if pow2:
      np.testing.assert_array_equal(got_MN, want_MN)
    largest = np.max(np.abs(want_MN))
    np.testing.assert_allclose(got_MN, want_MN, rtol=0, atol=1e-6 * largest)


def test_instructions_of_other_lengths():
  """16 products: truncated twice as often, and never promoted."""
  a, b = one_scale(normal(0, 3, 256)), one_scale(normal(1, 4, 256))
  scale = np.float32(a.scales.item()) * np.float32(b.scales.item())
  got_MN = matmul_limited(a, b, chunk=16, promote_every=0)
  want_MN = oracle.accumulate(values(a), values(b).T, chunk=16)
  np.testing.assert_array_equal(got_MN, np.float32(want_MN) * scale)
  assert np.any(got_MN != matmul_limited(a, b, promote_every=0))


def test_promotion_repairs_what_4096_products_lose():
  """Without it nearly 2 % (TR 3.3.2) of the mean magnitude; with it 0.1 %.

  The longer the sum, the more is lost without and the less with it.
  """
  errors = {}
  for depth in (512, 4096):
    a, b = one_scale(normal(0, 128, depth)), one_scale(normal(1, 128, depth))
    exact_MN = scaled(a) @ scaled(b).T
    for every in (0, 128):
      got_MN = matmul_limited(a, b, promote_every=every)
      errors[depth, every] = oracle.errors(got_MN, exact_MN)['of_mean']
  assert 0.015 < errors[4096, 0] < 0.022
  assert errors[4096, 128] < 0.001
  assert errors[512, 0] < errors[4096, 0] / 2
  assert errors[512, 128] > errors[4096, 128]


def test_with_promotion_it_is_near_the_product_of_training():
  a, b = quantize(normal(0, 64, 512)), quantize(normal(1, 64, 512), (128, 128))
  want_MN = np.asarray(reference.matmul(a, b, jnp.float32), np.float64)
  got_MN = matmul_limited(a, b)
  assert 1e-5 < oracle.errors(got_MN, want_MN)['of_rms'] < 1e-3
  assert oracle.errors(matmul_limited(a, b, bits=18), want_MN)['of_rms'] < 5e-5


def test_what_does_not_fit_is_named():
  tiles, row = quantize(normal(0, 4, 256)), one_scale(normal(0, 4, 256))

  def check(message, *args, **options):
    with pytest.raises(ValueError, match=message):
      limited.matmul_limited(*args, **options)

  check('share K', row, one_scale(normal(0, 4, 128)))
  check(r'a\.tile=\(1, 128\) must span K=256', tiles, row, promote_every=0)
  check(r'b\.tile=\(1, 128\) must span K=256', row, tiles, promote_every=0)
  check(r'promote_every=192 columns', tiles, row, promote_every=192)
  check('promote_every=100 must be a multiple', tiles, row, promote_every=100)
  check('bits=19', tiles, row, bits=19)
