"""Products of many experts in plain jnp against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import reference as dense
from pallas_kernels.grouped_matmul import api, cases
from tests import nightly
from tests.oracles import fp8_formats as oracle
from tests.oracles import fp8_gemm

quantize = jax.jit(dense.quantize, static_argnames=('tile', 'pow2'))
grouped = jax.jit(
  functools.partial(api.grouped, implementation='reference'), static_argnums=4
)
grouped_k = jax.jit(
  functools.partial(api.grouped_k, implementation='reference'),
  static_argnums=4,
)
POW2 = oracle.Scaling(pow2=True)
UNUSED = 2  # blocks


def layout(sizes):
  """(expert_j, num_blocks) with two unused blocks at the end."""
  blocks = [-(-size // 128) for size in sizes]
  expert_j = np.repeat(np.arange(len(sizes)), blocks)
  # Unused blocks name an expert, too: it must not matter.
  expert_j = np.concatenate([expert_j, [len(sizes) - 1] * UNUSED])
  return jnp.asarray(expert_j, jnp.int32), jnp.int32(sum(blocks))


def padded(x_AD, sizes, fill=0.0):
  """Rows as the product wants them; unused blocks hold `fill`."""
  x_JD = fp8_gemm.pad_groups(x_AD, sizes)
  rest = np.full((UNUSED * 128, x_AD.shape[1]), fill)
  return np.float32(np.concatenate([x_JD, rest]))


def compact(y_JF, sizes):
  """The experts' rows, sorted, without padding."""
  rows, start = [], 0
  for size in sizes:
    rows.append(np.asarray(y_JF[start : start + size], np.float64))
    start += -(-size // 128) * 128
  return np.concatenate(rows)


def draw(case):
  rng = np.random.default_rng(0)
  x_AD = rng.normal(size=(sum(case.sizes), case.k))
  dy_AF = rng.normal(size=(sum(case.sizes), case.n))
  w_EDF = rng.normal(size=(len(case.sizes), case.k, case.n))
  # Experts of different sizes: one that took another's weight would show.
  w_EDF *= np.exp2(np.arange(len(case.sizes)))[:, None, None]
  return np.float32(x_AD), np.float32(dy_AF), np.float32(w_EDF)


def assert_same_operands(got, want, dtype):
  error = numerics.relative_error(got, want)
  assert error <= numerics.SAME_OPERANDS[jnp.dtype(dtype).name]


@pytest.mark.parametrize(
  'name', nightly.daily(cases.SMALL, 'ragged', 'none', 'odd')
)
def test_rows_times_the_weight_of_their_expert(name):
  """Fprop and Dgrad from the unquantised arrays; padding gives zeros."""
  case = cases.SMALL[name]
  x_AD, dy_AF, w_EDF = draw(case)
  straight = quantize(w_EDF, quantized.BLOCK, pow2=True)
  turned = dense.transpose(straight)
  expert_j, num_blocks = layout(case.sizes)
  for a_AK, b, want in (
    (
      x_AD,
      turned,
      fp8_gemm.grouped_fprop(x_AD, w_EDF, case.sizes, POW2, POW2),
    ),
    (
      dy_AF,
      straight,
      fp8_gemm.grouped_dgrad(dy_AF, w_EDF, case.sizes, POW2, POW2),
    ),
  ):
    a = quantize(padded(a_AK, case.sizes, fill=7.0), pow2=True)
    for dtype in (jnp.float32, jnp.bfloat16):
      y_JN = grouped(a, b, expert_j, num_blocks, dtype)
      assert y_JN.dtype == dtype and y_JN.shape == (a.shape[0], b.shape[1])
      y_JN = np.asarray(y_JN, np.float64)
      assert_same_operands(compact(y_JN, case.sizes), want, dtype)
      rows = np.ones((len(a_AK), 1))
      empty_J = padded(rows, case.sizes)[:, 0] == 0
      np.testing.assert_array_equal(y_JN[empty_J], 0)


@pytest.mark.parametrize(
  'name', nightly.daily(cases.SMALL, 'empty', 'none', 'odd')
)
def test_gradients_of_the_weights(name):
  """Wgrad from the unquantised arrays; an expert without rows has zeros."""
  case = cases.SMALL[name]
  x_AD, dy_AF, _ = draw(case)
  expert_j, num_blocks = layout(case.sizes)
  first = quantize(padded(x_AD, case.sizes, fill=7.0), pow2=True)
  a = quantize(dense.dequantize(first).T, pow2=True)
  b = quantize(padded(dy_AF, case.sizes, fill=7.0).T, pow2=True)
  got_EDF = grouped_k(a, b, expert_j, num_blocks, len(case.sizes))
  assert got_EDF.dtype == jnp.float32
  want_EDF = fp8_gemm.grouped_wgrad(x_AD, dy_AF, case.sizes, POW2, POW2)
  assert got_EDF.shape == want_EDF.shape
  for got_DF, want_DF, size in zip(got_EDF, want_EDF, case.sizes, strict=True):
    assert_same_operands(got_DF, want_DF, jnp.float32)
    assert size or not np.any(got_DF)


def test_plain_scales_stay_under_the_difference():
  """As trained: scales that are no powers of two, BF16 out."""
  case = cases.Case((60, 0, 300), 384, 512)
  x_AD, dy_AF, w_EDF = draw(case)
  expert_j, num_blocks = layout(case.sizes)
  a = quantize(padded(x_AD, case.sizes))
  turned = dense.transpose(quantize(w_EDF, quantized.BLOCK))
  y_JF = grouped(a, turned, expert_j, num_blocks, jnp.bfloat16)
  exact = [
    part @ w_EDF[e]
    for e, part in enumerate(np.split(x_AD, np.cumsum(case.sizes)[:-1]))
  ]
  got = compact(y_JF, case.sizes)
  difference = numerics.difference(got, np.concatenate(exact))
  assert 1e-5 < difference < numerics.FP8_DIFFERENCE
  b = quantize(padded(dy_AF, case.sizes).T)
  a = quantize(dense.dequantize(a).T)
  got = grouped_k(a, b, expert_j, num_blocks, 3)
  split = lambda x: np.split(x, np.cumsum(case.sizes)[:-1])
  exact = [x.T @ dy for x, dy in zip(split(x_AD), split(dy_AF), strict=True)]
  difference = numerics.difference(got, exact)
  assert 1e-5 < difference < numerics.FP8_DIFFERENCE


def test_blocks_in_any_order():
  """Fprop asks for no order of experts: permuted blocks permute the output."""
  case = cases.Case((200, 128, 250), 128, 256)
  x_AD, _, w_EDF = draw(case)
  x_JD = padded(x_AD, case.sizes)
  expert_j, num_blocks = layout(case.sizes)
  turned = dense.transpose(quantize(w_EDF, quantized.BLOCK))
  want = grouped(quantize(x_JD), turned, expert_j, num_blocks, jnp.float32)
  order = np.random.default_rng(0).permutation(int(num_blocks))
  order = np.concatenate([order, num_blocks + np.arange(UNUSED)])
  blocks = lambda x: np.asarray(x).reshape(len(order), 128, -1)
  x_JD = blocks(x_JD)[order].reshape(x_JD.shape)
  got = grouped(
    quantize(x_JD), turned, expert_j[order], num_blocks, jnp.float32
  )
  np.testing.assert_array_equal(blocks(got), blocks(want)[order])


def test_api_names_what_does_not_fit():
  expert_j, num_blocks = jnp.zeros(2, jnp.int32), jnp.int32(2)
  ones = lambda *shape: jnp.ones(shape)
  a = quantize(ones(256, 128))
  b = quantize(ones(3, 64, 128), quantized.BLOCK)

  def check(message, *args, function=api.grouped, **options):
    with pytest.raises(ValueError, match=message):
      function(*args, **options)

  check(r'b\.tile=', a, quantize(ones(3, 64, 128)), expert_j, num_blocks)
  wide = quantize(ones(3, 64, 256), quantized.BLOCK)
  check(r'b\.shape=\(3, 64, 256\)', a, wide, expert_j, num_blocks)
  short = quantized.Quantized(a.values, a.scales[:1], a.tile)
  check(r'a\.scales\.shape=', short, b, expert_j, num_blocks)
  check(r'256 rows', a, b, expert_j[:1], num_blocks)
  check(r'200 rows', quantize(ones(200, 128)), b, expert_j, num_blocks)
  check("'quick'", a, b, expert_j, num_blocks, implementation='quick')
  k = functools.partial(check, function=api.grouped_k)
  k(r'b\.tile=', a, quantize(ones(4, 128), (128, 128)), expert_j, num_blocks, 3)
  short = quantize(ones(4, 128))
  k(r'b\.shape=\(4, 128\)', quantize(ones(5, 256)), short, expert_j, 2, 3)
  long = quantize(ones(5, 256))
  k(r'256 rows', long, long, expert_j[:1], num_blocks, 3)


def test_under_vmap_and_checkpoint():
  case = cases.SMALL['empty']
  x_AD, _, w_EDF = draw(case)
  expert_j, num_blocks = layout(case.sizes)
  turned = dense.transpose(quantize(w_EDF, quantized.BLOCK))
  a = quantize(padded(x_AD, case.sizes))
  run = lambda a: grouped(a, turned, expert_j, num_blocks, jnp.float32)
  want = run(a)
  twice = jax.tree.map(lambda x: jnp.stack([x, x]), a)
  got = jax.vmap(run)(twice)
  np.testing.assert_allclose(got[1], want, rtol=1e-6, atol=1e-4)
  weighted = lambda weight, a: jnp.sum(run(a) * weight)
  grad = jax.grad(jax.checkpoint(weighted))(want, a)
  np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-4)
