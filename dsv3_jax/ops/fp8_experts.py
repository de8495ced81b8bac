"""The routed experts with every product in FP8 (TR 3.3; eq. 12).

  y_m = sum_k expert_{ids_mk}(x_m), the gate multiplied in before W_down

As `dispatch`, but a block always has 128 rows, so that a scale of 128 tokens x
1 channel belongs to one expert. What is sent to the experts is FP8 with scales
that are powers of two: tokens before gate and up projection, and the output's
gradient before W_down's Dgrad (TR 3.3.3); what comes back, outputs and the
tokens' gradients, is BF16. Kept for the backward pass: the FP8 tokens, gate and
up projections in FP8, the layout.

Letters: J padded rows of all blocks, j blocks; others as in the alphabet.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import precision
from dsv3_jax.ops import dispatch, fp8_linear
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import quantizers
from pallas_kernels.grouped_matmul import api

Quantized = quantized.Quantized
Policy = precision.Policy


def expert_ffn(
  x_MD: Float[Array, 'M D'],
  ids_MK: Int[Array, 'M K'],
  gates_MK: Float[Array, 'M K'],
  experts: dispatch.Experts,
  policy: Policy,
) -> Float[Array, 'M D']:
  """Sum of each token's chosen experts, weighted by its gates (TR eq. 12).

  Args:
    experts: `fp8_linear.Weight`s with a leading expert dim.
  """
  with jax.named_scope('experts'):
    return _experts(x_MD, gates_MK, experts, ids_MK, policy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(x_MD, gates_MK, experts, ids_MK, policy):
  return _experts_fwd(x_MD, gates_MK, experts, ids_MK, policy)[0]


def _experts_fwd(x_MD, gates_MK, experts, ids_MK, policy):
  top_k = ids_MK.shape[1]
  num_experts = experts.w_up_EDF.fprop.shape[0]
  layout = dispatch.block_layout(ids_MK, num_experts, api.ROWS)
  products = _grouped(layout, num_experts, policy)
  sent = quantizers.rows(
    x_MD,
    pow2=True,
    floor=precision.ACTIVATION_FLOOR,
    implementation=policy.implementation,
  )
  rows = permute(sent, layout, top_k)
  with jax.named_scope('fprop'):
    gate_JF = products.forward(rows, experts.w_gate_EDF.fprop)
    up_JF = products.forward(rows, experts.w_up_EDF.fprop)
  gates_J = dispatch.rows_of(gates_MK, layout)
  down = experts.w_down_EFD
  y_JD, kept = fp8_linear.swiglu_forward(
    gate_JF, up_JF, gates_J, down.fprop, products, policy
  )
  y_MD = dispatch.unpermute(y_JD, layout, top_k).astype(x_MD.dtype)
  transposes = [w.dgrad for w in experts]
  return y_MD, (sent, gates_MK, kept, layout, transposes)


def _experts_bwd(policy, residuals, dy_MD):
  sent, gates_MK, kept, layout, (gate, up, down) = residuals
  top_k, dtype = gates_MK.shape[1], dy_MD.dtype
  products = _grouped(layout, gate.shape[0], policy)
  dy = _received_gradient(dy_MD, layout, top_k, policy)
  gates_J = dispatch.rows_of(gates_MK, layout)
  dgate_JF, dup_JF, dgates_J, dw_down_EFD = fp8_linear.swiglu_backward(
    kept, gates_J, down, dy, products, policy, dtype
  )
  rows = permute(sent, layout, top_k)
  x = fp8_linear.transposed(rows, policy, pow2=True)
  dgate = fp8_linear.quantize_gradient(dgate_JF, policy)
  dup = fp8_linear.quantize_gradient(dup_JF, policy)
  with jax.named_scope('dgrad'):
    dx_JD = products.forward(dgate[0], gate) + products.forward(dup[0], up)
  with jax.named_scope('wgrad'):
    dw_gate_EDF = products.weight(x, dgate[1])
    dw_up_EDF = products.weight(x, dup[1])
  dx_MD = dispatch.unpermute(dx_JD, layout, top_k).astype(dtype)
  dgates_MK = dgates_J[layout.row_A].reshape(gates_MK.shape)
  grads = (dw_gate_EDF, dw_up_EDF, dw_down_EFD)
  grads = dispatch.Experts(*(fp8_linear.Weight(dw, None, None) for dw in grads))
  return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None


_experts.defvjp(_experts_fwd, _experts_bwd)


def permute(q: Quantized, layout: dispatch.Layout, top_k: int) -> Quantized:
  """Copies each token's values and scales to the rows of its assignments."""
  # Bytes are moved, not numbers: gathers of FP8 go through f32 on some devices.
  codes = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  codes = dispatch.permute(codes, layout, top_k)
  values = jax.lax.bitcast_convert_type(codes, q.values.dtype)
  scales = dispatch.permute(q.scales, layout, top_k)
  return Quantized(values, scales, q.tile)


def _received_gradient(dy_MD, layout, top_k, policy):
  """Rows and columns of the output's gradient, as they reach the experts."""
  chosen = policy.implementation
  sent = quantizers.rows(dy_MD, pow2=True, implementation=chosen)
  rows = permute(sent, layout, top_k)
  columns = quantizers.transposed(rows, pow2=True, implementation=chosen)
  if policy.block_dgrad:
    rows = fp8_linear.blockwise(dispatch.permute(dy_MD, layout, top_k))
  return rows, columns


def _grouped(
  layout: dispatch.Layout, num_experts: int, policy: Policy
) -> fp8_linear.Products:
  """Products of each block with its own expert's matrix."""
  where = (layout.expert_j, layout.num_blocks)
  chosen = policy.implementation
  dtype = jnp.dtype(policy.compute)
  forward: Callable = lambda a, b: api.grouped(a, b, *where, dtype, chosen)
  weight: Callable = lambda a, b: api.grouped_k(
    a, b, *where, num_experts, chosen
  )
  return fp8_linear.Products(forward, weight)
