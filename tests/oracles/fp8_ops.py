"""SwiGLU and experts in FP8, forward and backward, in float64 (TR 3.3).

Roundings stand where the paper puts them, sums are exact: operands of every
product are e4m3 (`fp8_gemm`), outputs of products are BF16, gradients of
weights and gates are not rounded. Of SwiGLU's inputs the backward pass has e4m3
copies. What is sent to experts, tokens and gradients of outputs, has scales
that are powers of two (TR 3.3.3). Gradients of SwiGLU's inputs are rounded as
`between` says: to the dtype of activations.
"""

import ml_dtypes
import numpy as np

from . import fp8_formats as formats
from . import fp8_gemm, fp8_layers


def bf16(x):
  """The nearest BF16 numbers, in float64."""
  return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(float)


def columns(x, scaling):
  """Tiles of 128 tokens x 1 channel."""
  return formats.fake(x.T, formats.ROW, scaling).T


def exact(x):
  """Not rounded."""
  return x


def swiglu_linear(gate_MF, up_MF, w_FD, dy_MD, scaling, between=exact):
  """(y, dgate, dup, dw) of W_down (silu(gate) up).

  Args:
    scaling: of activations.
  """
  y_MD = fp8_gemm.fprop(fp8_layers.swiglu(gate_MF, up_MF), w_FD, scaling)
  dhidden_MF = bf16(fp8_gemm.dgrad(dy_MD, w_FD))
  again_MF, dgate_MF, dup_MF, _ = fp8_layers.swiglu_cached(
    gate_MF, up_MF, dhidden_MF, None, scaling
  )
  dw_FD = columns(again_MF, scaling).T @ columns(dy_MD, formats.PLAIN)
  return y_MD, between(dgate_MF), between(dup_MF), dw_FD


def experts(x_MD, ids_MK, gates_MK, weights, dy_MD, floor, between=exact):
  """Expert by expert: (y, dx, dgates, gradients of the three weights).

  Args:
    weights: w_gate_EDF, w_up_EDF, w_down_EFD. floor: smallest largest
      magnitude of a tile of activations.
  """
  plain = formats.Scaling(floor=floor)
  pow2, pow2_floor = (formats.Scaling(pow2=True, floor=x) for x in (0.0, floor))
  order = np.argsort(ids_MK.reshape(-1), kind='stable')
  tokens_A, gates_A = order // ids_MK.shape[1], gates_MK.reshape(-1)[order]
  sent_MD = formats.fake(x_MD, formats.ROW, pow2_floor)
  dsent_MD = formats.fake(dy_MD, formats.ROW, pow2)
  y_MD, dx_MD = np.zeros_like(x_MD), np.zeros_like(x_MD)
  dgates_A = np.zeros(len(order))
  grads = [np.zeros_like(w) for w in weights]
  counts_E = np.bincount(ids_MK.reshape(-1), minlength=len(weights[0]))
  for e, end in enumerate(np.cumsum(counts_E)):
    mine = slice(end - counts_E[e], end)
    if not counts_E[e]:
      continue
    rows, gate_A = tokens_A[mine], gates_A[mine]
    blocks = [formats.fake(w[e], formats.BLOCK) for w in weights]
    gate, up = (bf16(sent_MD[rows] @ w) for w in blocks[:2])
    hidden = fp8_layers.swiglu(gate, up, gate_A)
    hidden = formats.fake(hidden, formats.ROW, plain)
    np.add.at(y_MD, rows, bf16(hidden @ blocks[2]))
    dhidden = bf16(dsent_MD[rows] @ blocks[2].T)
    again, dgate, dup, dgates_A[order[mine]] = fp8_layers.swiglu_cached(
      gate, up, dhidden, gate_A, plain
    )
    dgate, dup = between(dgate), between(dup)
    row = lambda x: formats.fake(x, formats.ROW)
    dx = bf16(row(dgate) @ blocks[0].T) + bf16(row(dup) @ blocks[1].T)
    np.add.at(dx_MD, rows, bf16(dx))
    x_columns = columns(sent_MD[rows], pow2_floor)
    grads[0][e] = x_columns.T @ columns(dgate, formats.PLAIN)
    grads[1][e] = x_columns.T @ columns(dup, formats.PLAIN)
    dy_columns = columns(dsent_MD[rows], pow2)
    grads[2][e] = columns(again, plain).T @ dy_columns
  return y_MD, dx_MD, dgates_A.reshape(ids_MK.shape), grads
