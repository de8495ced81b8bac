"""The FP8 products, layers and accumulator: loops, autograd and by hand."""

import math

import numpy as np
import pytest

from . import cases, fp8, fp8_formats, fp8_gemm, fp8_layers

POW2 = fp8_formats.Scaling(pow2=True)
FLOORED = fp8_formats.Scaling(floor=0.5)


def scale_at(x_IJ, i, j, tile, scaling):
  """Scale of the tile round one element."""
  top, left = i // tile[0] * tile[0], j // tile[1] * tile[1]
  part = x_IJ[top : top + tile[0], left : left + tile[1]]
  amax = max(scaling.floor, np.max(np.abs(part)))
  if not scaling.pow2:
    return amax / 448
  return next(2.0**k for k in range(-120, 120) if amax <= 448 * 2.0**k)


def loop_fake(x_IJ, tile, scaling):
  """Quantised and dequantised, element by element."""
  out_IJ = np.zeros_like(x_IJ)
  for i, j in np.ndindex(x_IJ.shape):
    scale = scale_at(x_IJ, i, j, tile, scaling)
    out_IJ[i, j] = float(fp8.round_e4m3(x_IJ[i, j] / scale)) * scale
  return out_IJ


@pytest.mark.parametrize('scaling', [fp8_formats.PLAIN, POW2, FLOORED])
def test_the_three_products_by_loops(scaling):
  """Which operand has which tile: 1 x 128, 128 x 1 or 128 x 128."""
  rng = np.random.default_rng(0)
  x_MD = rng.normal(size=(130, 132)) * np.exp2(rng.integers(-6, 6, (130, 1)))
  w_DF = rng.normal(size=(132, 5)) * np.exp2(rng.integers(-6, 6, (1, 5)))
  dy_MF = rng.normal(size=(130, 5)) * np.exp2(rng.integers(-6, 6, (130, 1)))
  plain = fp8_formats.PLAIN
  x_row_MD = loop_fake(x_MD, (1, 128), scaling)
  weight_DF = loop_fake(w_DF, (128, 128), plain)
  want = x_row_MD @ weight_DF
  got = fp8_gemm.fprop(x_MD, w_DF, scaling)
  np.testing.assert_allclose(got, want, rtol=cases.EXACT, atol=1e-10)
  want = loop_fake(dy_MF, (1, 128), scaling) @ weight_DF.T
  got = fp8_gemm.dgrad(dy_MF, w_DF, scaling)
  np.testing.assert_allclose(got, want, rtol=cases.EXACT, atol=1e-10)
  block = fp8_gemm.dgrad(dy_MF, w_DF, scaling, block=True)
  want = loop_fake(dy_MF, (128, 128), scaling) @ weight_DF.T
  np.testing.assert_allclose(block, want, rtol=cases.EXACT, atol=1e-10)
  want_MD = loop_fake(x_row_MD, (128, 1), scaling)
  want = want_MD.T @ loop_fake(dy_MF, (128, 1), scaling)
  got = fp8_gemm.wgrad(x_MD, dy_MF, scaling, scaling)
  np.testing.assert_allclose(got, want, rtol=cases.EXACT, atol=1e-10)


def test_in_blocks_a_small_row_loses_to_its_neighbours():
  """Within 2^17 of the block's amax rows keep digits; below, fewer to none."""
  rng = np.random.default_rng(0)
  dy_MF, w_DF = rng.normal(size=(128, 40)), rng.normal(size=(30, 40))
  dy_MF[3] *= 2.0**-24
  exact_D = dy_MF[3] @ w_DF.T
  rows_D = fp8_gemm.dgrad(dy_MF, w_DF)[3]
  blocks_D = fp8_gemm.dgrad(dy_MF, w_DF, block=True)[3]
  size = np.max(np.abs(exact_D))
  assert np.max(np.abs(rows_D - exact_D)) < 0.1 * size
  np.testing.assert_array_equal(blocks_D, 0)


def test_products_of_numbers_of_the_format_are_exact():
  """With amax 448 in every tile nothing is rounded anywhere."""
  rng = np.random.default_rng(0)
  x_MD = rng.integers(-8, 9, (256, 128)).astype(float)
  dy_MF = rng.integers(-8, 9, (256, 128)).astype(float)
  w_DF = rng.integers(-8, 9, (128, 128)).astype(float)
  x_MD[np.arange(256), np.arange(256) % 128] = 448
  dy_MF[np.arange(256), np.arange(256) % 128] = 448
  w_DF[0, 0] = 448
  np.testing.assert_array_equal(fp8_gemm.fprop(x_MD, w_DF), x_MD @ w_DF)
  np.testing.assert_array_equal(fp8_gemm.dgrad(dy_MF, w_DF), dy_MF @ w_DF.T)
  np.testing.assert_array_equal(fp8_gemm.wgrad(x_MD, dy_MF), x_MD.T @ dy_MF)


def test_products_of_normal_data_differ_by_less_than_one_in_a_thousand():
  rng = np.random.default_rng(0)
  x_MD, dy_MF = rng.normal(size=(192, 300)), rng.normal(size=(192, 200))
  w_DF = rng.normal(size=(300, 200))
  for got, want in (
    (fp8_gemm.fprop(x_MD, w_DF), x_MD @ w_DF),
    (fp8_gemm.dgrad(dy_MF, w_DF), dy_MF @ w_DF.T),
    (fp8_gemm.wgrad(x_MD, dy_MF), x_MD.T @ dy_MF),
  ):
    assert 1e-5 < fp8_gemm.difference(got, want) < 1e-3


def test_the_difference_by_hand():
  assert fp8_gemm.difference([3.0, 4.0], [3.0, 4.0]) == 0
  assert fp8_gemm.difference([1.0, 0.0], [0.0, 1.0]) == 1
  assert fp8_gemm.difference([2.0], [1.0]) == pytest.approx(0.2)


@pytest.mark.parametrize('counts_E', [(3, 0, 130), (0, 0, 133), (128, 1, 4)])
def test_experts_are_linears_of_their_own(counts_E):
  rng = np.random.default_rng(0)
  x_AD, dy_AF = rng.normal(size=(133, 20)), rng.normal(size=(133, 30))
  w_EDF = rng.normal(size=(3, 20, 30))
  y_AF = fp8_gemm.grouped_fprop(x_AD, w_EDF, counts_E, POW2)
  dx_AD = fp8_gemm.grouped_dgrad(dy_AF, w_EDF, counts_E, POW2)
  dw_EDF = fp8_gemm.grouped_wgrad(x_AD, dy_AF, counts_E, POW2, POW2)
  x_ID = fp8_gemm.pad_groups(x_AD, counts_E)
  dy_IF = fp8_gemm.pad_groups(dy_AF, counts_E)
  row = padded = 0
  for e, count in enumerate(counts_E):
    rows = slice(row, row + count)
    high = math.ceil(count / 128) * 128
    inside = slice(padded, padded + high)
    np.testing.assert_array_equal(x_ID[padded : padded + count], x_AD[rows])
    assert not np.any(x_ID[padded + count : padded + high])
    if not count:
      assert not np.any(dw_EDF[e])
      continue
    want = fp8_gemm.fprop(x_AD[rows], w_EDF[e], POW2)
    np.testing.assert_array_equal(y_AF[rows], want)
    want = fp8_gemm.dgrad(dy_AF[rows], w_EDF[e], POW2)
    np.testing.assert_array_equal(dx_AD[rows], want)
    # Zero rows change neither the scales of a tile nor the sum.
    want = fp8_gemm.wgrad(x_ID[inside], dy_IF[inside], POW2, POW2)
    np.testing.assert_allclose(dw_EDF[e], want, rtol=cases.EXACT, atol=1e-12)
    row, padded = row + count, padded + high
  assert padded == len(x_ID)


def torch_swiglu(torch, gate, up, weight):
  return torch.nn.functional.silu(gate) * up * weight[:, None]


def test_swiglu_by_autograd(torch):
  """Gradients at the copies, not at the numbers that were copied."""
  rng = np.random.default_rng(0)
  gate_MF, up_MF, dout_MF = rng.normal(size=(3, 5, 200)) * 3
  weight_M = rng.uniform(size=5)
  got = fp8_layers.swiglu_cached(gate_MF, up_MF, dout_MF, weight_M, POW2)
  copies = [loop_fake(x, (1, 128), POW2) for x in (gate_MF, up_MF)]
  args = [torch.tensor(x, requires_grad=True) for x in (*copies, weight_M)]
  out = torch_swiglu(torch, *args)
  wants = [out, *torch.autograd.grad(out, args, torch.tensor(dout_MF))]
  for g, w in zip(got, wants, strict=True):
    np.testing.assert_allclose(g, w.detach(), rtol=1e-11, atol=1e-11)
  exact = fp8_layers.swiglu_backward(gate_MF, up_MF, dout_MF)
  assert exact[2] is None
  assert np.max(np.abs(exact[1] - got[2])) > 1e-3


def attention_case():
  rng = np.random.default_rng(0)
  tokens, heads = 9, 3
  shapes = [(heads, 4), (heads, 2), (heads, 4), (2,), (heads, 5)]
  qkv = [rng.normal(size=(tokens, *shape)) for shape in shapes]
  return qkv, rng.normal(size=(tokens, heads, 5)), 0.4


def torch_attention(torch, qkv, scale):
  q_nope, q_rope, k_nope, k_rope, v = qkv
  logits = torch.einsum('tnh,snh->nts', q_nope, k_nope)
  logits = logits + torch.einsum('tnr,sr->nts', q_rope, k_rope)
  above = torch.triu(torch.ones(logits.shape[1:]), diagonal=1).bool()
  logits = (logits * scale).masked_fill(above, -math.inf)
  return torch.einsum('nts,snu->tnu', torch.softmax(logits, -1), v), logits


def test_attention_by_autograd(torch):
  qkv, do_TNU, scale = attention_case()
  o_TNU, lse_NT = fp8_layers.attention(*qkv, scale)
  args = [torch.tensor(x, requires_grad=True) for x in qkv]
  out, logits = torch_attention(torch, args, scale)
  np.testing.assert_allclose(o_TNU, out.detach(), atol=cases.EXACT)
  lse = torch.logsumexp(logits, -1).detach()
  np.testing.assert_allclose(lse_NT, lse, atol=cases.EXACT)
  wants = torch.autograd.grad(out, args, torch.tensor(do_TNU))
  got = fp8_layers.attention_backward(qkv, lse_NT, o_TNU, do_TNU, scale)
  for g, w in zip(got, wants, strict=True):
    np.testing.assert_allclose(g, w, atol=cases.EXACT)


def test_attention_from_the_e5m6_copy(torch):
  """Only delta changes: dv stays, dq moves by p times delta's error."""
  qkv, do_TNU, scale = attention_case()
  o_TNU, lse_NT = fp8_layers.attention(*qkv, scale)
  copy_TNU = fp8_layers.e5m6_output(o_TNU)
  args = qkv, lse_NT
  exact = fp8_layers.attention_backward(*args, o_TNU, do_TNU, scale)
  got = fp8_layers.attention_backward(*args, copy_TNU, do_TNU, scale)
  np.testing.assert_array_equal(got[4], exact[4])
  error_NT = np.einsum('tnu,tnu->nt', copy_TNU - o_TNU, do_TNU)
  assert 1e-4 < np.max(np.abs(error_NT)) < 0.1
  logits = torch_attention(torch, [torch.tensor(x) for x in qkv], scale)[1]
  probs_NTS = torch.softmax(logits, -1).numpy()
  for i, spec, k in ((0, 'nts,snh->tnh', qkv[2]), (1, 'nts,sr->tnr', qkv[3])):
    moved = -scale * np.einsum(spec, probs_NTS * error_NT[..., None], k)
    np.testing.assert_allclose(got[i] - exact[i], moved, atol=cases.EXACT)


def test_e5m6_tiles_run_over_the_heads_of_a_token():
  """Two heads of 64 share a scale, so a small head loses to its neighbour."""
  o_TNU = np.random.default_rng(0).normal(size=(2, 4, 64))
  o_TNU[:, 1] *= 2.0**-26
  copy_TNU = fp8_layers.e5m6_output(o_TNU)
  scale_T = [
    2.0 ** math.ceil(math.log2(abs(x).max() / 448)) for x in o_TNU[:, 0]
  ]
  ratio = copy_TNU[:, 1] / (np.array(scale_T)[:, None] * 2.0**-20)
  np.testing.assert_array_equal(ratio, np.rint(ratio))
  assert np.max(np.abs(copy_TNU[:, 1] / o_TNU[:, 1] - 1)) > 0.1
  apart = fp8_layers.e5m6_output(o_TNU[:, 1:2])
  assert np.max(np.abs(apart / o_TNU[:, 1:2] - 1)) < 2.0**-6
