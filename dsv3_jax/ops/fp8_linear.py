"""A Linear with its three products in FP8, and SwiGLU behind it (TR 3.3).

  Fprop  y  = q(x) Q(W)                     x: tiles of 1 token x 128 channels
  Dgrad  dx = q(dy) Q(W)^T                  dy: the same
  Wgrad  dW = qT(x)^T qT(dy)                tiles of 128 tokens x 1 channel

Q are 128 x 128 blocks. For Wgrad the saved FP8 x is dequantised, transposed and
quantised anew; dy is quantised both ways at once. Outputs are BF16, dW is f32.

Saved for the backward pass are x in FP8 (in E5M6 if it is the input of
attention's output projection), and SwiGLU's two inputs in FP8, from which its
output is recomputed (TR 3.3.3). Nothing is quantised twice: `w` and `x` carry
their FP8 forms, made once a step for weights and once for all products of one
input. The gradient goes to the unquantised form, which no product reads.

Letters: M rows (tokens, or assignments sorted by expert); D inputs and F
outputs of any matrix; others as in CONTRIBUTING.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax import precision
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import api, e5m6, quantizers
from pallas_kernels.fp8_matmul import reference as formats

Quantized = quantized.Quantized
Policy = precision.Policy


class Weight(NamedTuple):
  """A matrix of parameters and its FP8 forms, made once a step.

  master: f32 [..., D, F]; gets the gradient, and no product reads it. fprop:
  [..., F, D]. dgrad: [..., D, F]. Tiles 128 x 128. Both orientations, as FP8
  products contract last dims.
  """

  master: Array
  fprop: Quantized
  dgrad: Quantized

  @property
  def shape(self) -> tuple[int, ...]:
    return self.dgrad.shape


class Operand(NamedTuple):
  """An input of linears and its FP8 form.

  value: [M, D]; gets the gradient. rows: its 1 x 128 tiles. saved: what the
  backward pass has instead, `Quantized` or `Packed`.
  """

  value: Array
  rows: Quantized
  saved: Any


class Products(NamedTuple):
  """The two kinds of product: of a matrix, or of each block's own expert."""

  forward: Callable[[Quantized, Quantized], Array]  # Fprop and Dgrad
  weight: Callable[[Quantized, Quantized], Array]  # Wgrad


def flat(
  w: Float[Array, '...'], matrix: precision.Matrix
) -> Float[Array, '*lead D F']:
  """A parameter as matrices; leading dims are layers and experts."""
  lead = w.shape[: w.ndim - matrix.inputs - matrix.outputs]
  inputs = w.shape[len(lead) : len(lead) + matrix.inputs]
  return w.reshape(*lead, math.prod(inputs), -1)


def operand(
  x_MD: Float[Array, 'M D'], policy: Policy, *, pow2: bool = False
) -> Operand:
  """Quantises an input for all linears that share it."""
  x = jax.lax.stop_gradient(x_MD)
  options = {'pow2': pow2, 'floor': precision.ACTIVATION_FLOOR}
  rows = quantizers.rows(x, **options, implementation=policy.implementation)
  return Operand(x_MD, rows, rows)


def linear(
  x: Operand, w: Weight, policy: Policy, *, pow2: bool = False
) -> Float[Array, 'M F']:
  """x W in FP8, forward and backward, BF16 (TR 3.3.1).

  Args:
    pow2: scales of the transposed x are powers of two (TR 3.3.3).
  """
  return _linear(x, w, policy, pow2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x, w, policy, pow2):
  return _linear_fwd(x, w, policy, pow2)[0]


def _linear_fwd(x, w, policy, pow2):
  del pow2
  with jax.named_scope('fprop'):
    y_MF = dense(policy).forward(x.rows, w.fprop)
  return y_MF.astype(x.value.dtype), (x.saved, w.dgrad)


def _linear_bwd(policy, pow2, residuals, dy_MF):
  saved, dgrad = residuals
  rows, columns = quantize_gradient(dy_MF, policy)
  products = dense(policy)
  with jax.named_scope('dgrad'):
    dx_MD = products.forward(rows, dgrad).astype(dy_MF.dtype)
  with jax.named_scope('wgrad'):
    dw_DF = products.weight(transposed(saved, policy, pow2=pow2), columns)
  return Operand(dx_MD, None, None), Weight(dw_DF, None, None)


_linear.defvjp(_linear_fwd, _linear_bwd)


def swiglu_linear(
  gate_MF: Float[Array, 'M F'],
  up_MF: Float[Array, 'M F'],
  w: Weight,
  policy: Policy,
) -> Float[Array, 'M D']:
  """W_down (silu(gate) up) in FP8; saves gate and up in FP8 (TR 3.3.3)."""
  return _swiglu_linear(gate_MF, up_MF, w, policy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu_linear(gate_MF, up_MF, w, policy):
  return _swiglu_linear_fwd(gate_MF, up_MF, w, policy)[0]


def _swiglu_linear_fwd(gate_MF, up_MF, w, policy):
  y_MD, saved = swiglu_forward(
    gate_MF, up_MF, None, w.fprop, dense(policy), policy
  )
  return y_MD.astype(gate_MF.dtype), (saved, w.dgrad)


def _swiglu_linear_bwd(policy, residuals, dy_MD):
  saved, dgrad = residuals
  dy = quantize_gradient(dy_MD, policy)
  dgate_MF, dup_MF, _, dw_FD = swiglu_backward(
    saved, None, dgrad, dy, dense(policy), policy, dy_MD.dtype
  )
  return dgate_MF, dup_MF, Weight(dw_FD, None, None)


_swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


class SwigluSaved(NamedTuple):
  """Both inputs of SwiGLU in FP8."""

  gate: Quantized
  up: Quantized


def swiglu_forward(gate_MF, up_MF, scale_M, down: Quantized, products, policy):
  """(silu(gate) up scale) W_down, and what is saved for the backward pass.

  Args:
    scale_M: a factor a row (the routing gate), or None.
  """
  hidden_MF, _ = _swiglu(gate_MF, up_MF, scale_M)
  options = {
    'floor': precision.ACTIVATION_FLOOR,
    'implementation': policy.implementation,
  }
  # From f32, as a fused kernel would: BF16 in between would round twice.
  rows = quantizers.rows(hidden_MF, **options)
  saved = SwigluSaved(
    named(quantizers.rows(gate_MF, **options), 'swiglu_in'),
    named(quantizers.rows(up_MF, **options), 'swiglu_in'),
  )
  with jax.named_scope('fprop'):
    return products.forward(rows, down), saved


def swiglu_backward(saved, scale_M, dgrad, dy, products, policy, dtype):
  """Gradients of gate, up, scale (None without) and W_down.

  Args:
    dy: rows and columns of the output's gradient, quantised.
  """
  with jax.named_scope('dgrad'):
    dhidden_MF = products.forward(dy[0], dgrad).astype(jnp.float32)
  with jax.named_scope('swiglu'):
    gate_MF, up_MF = (formats.dequantize(q) for q in saved)
    hidden_MF, silu_MF = _swiglu(gate_MF, up_MF, scale_M)
    dscale_M = None
    if scale_M is not None:
      dscale_M = jnp.sum(dhidden_MF * silu_MF * up_MF, axis=-1)
      dhidden_MF *= scale_M[:, None]
    sigmoid_MF = jax.nn.sigmoid(gate_MF)
    dup_MF = dhidden_MF * silu_MF
    dgate_MF = dhidden_MF * up_MF
    dgate_MF *= sigmoid_MF * (1.0 + gate_MF * (1.0 - sigmoid_MF))
  columns = quantizers.columns(
    hidden_MF,
    floor=precision.ACTIVATION_FLOOR,
    implementation=policy.implementation,
  )
  with jax.named_scope('wgrad'):
    dw = products.weight(columns, dy[1])
  return dgate_MF.astype(dtype), dup_MF.astype(dtype), dscale_M, dw


def _swiglu(gate_MF, up_MF, scale_M):
  """silu(gate) up (scale), and silu(gate), in f32."""
  gate_MF, up_MF = gate_MF.astype(jnp.float32), up_MF.astype(jnp.float32)
  silu_MF = jax.nn.silu(gate_MF)
  hidden_MF = silu_MF * up_MF
  if scale_M is not None:
    hidden_MF *= scale_M.astype(jnp.float32)[:, None]
  return hidden_MF, silu_MF


def dense(policy: Policy) -> Products:
  """Products of one matrix: outputs in the compute dtype, dW in f32."""
  chosen, dtype = policy.implementation, jnp.dtype(policy.compute)
  return Products(
    lambda a, b: api.matmul(a, b, dtype, chosen),
    lambda a, b: api.matmul(a, b, jnp.float32, chosen),
  )


def quantize_gradient(
  dy_MF: Float[Array, 'M F'], policy: Policy
) -> tuple[Quantized, Quantized]:
  """Rows (for Dgrad) and columns (for Wgrad) of an output's gradient."""
  chosen = policy.implementation
  if policy.block_dgrad:
    return blockwise(dy_MF), quantizers.columns(dy_MF, implementation=chosen)
  return quantizers.both(dy_MF, implementation=chosen)


def blockwise(dy_MF: Float[Array, 'M F']) -> Quantized:
  """Rows whose scales are those of 128 x 128 blocks: the negative ablation."""
  blocks = formats.quantize(dy_MF, quantized.BLOCK)
  return Quantized(blocks.values, formats.row_scales(blocks), quantized.ROW)


def transposed(
  saved: Quantized | quantized.Packed, policy: Policy, *, pow2: bool
) -> Quantized:
  """Tiles of 128 tokens x 1 channel of a saved input, [D, M]."""
  options = {
    'pow2': pow2,
    'floor': precision.ACTIVATION_FLOOR,
    'implementation': policy.implementation,
  }
  if isinstance(saved, quantized.Packed):
    x_MD = e5m6.unpack(saved).astype(jnp.bfloat16)  # exact: 7 digits of 8
    return quantizers.columns(x_MD, **options)
  return quantizers.transposed(saved, **options)


def named(saved: Any, name: str) -> Any:
  """Gives a checkpoint name to every saved array."""
  return jax.tree.map(lambda x: checkpoint_name(x, name), saved)
