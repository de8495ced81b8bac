"""The routed experts with every product in FP8 (TR 3.3; eq. 12).

  y_m = sum_k expert_{ids_mk}(x_m), the gate multiplied in before W_down

As `expert_products`, but a block always has 128 rows, so that a scale of 128
tokens x 1 channel belongs to one expert. Forward and backward pass are written
out, dispatch and combine within. What is sent to the experts is FP8 with scales
that are powers of two: tokens before gate and up projection, and the output's
gradient before W_down's Dgrad (TR 3.3.3). What comes back, outputs and the
tokens' gradients, is BF16. Saved for the backward pass: the FP8 tokens as they
were received, gate and up projections in FP8, plan and blocks.

Letters: I rows received from all devices (of one device: M), J padded rows of
all blocks, j blocks; others as in CONTRIBUTING.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax import precision
from dsv3_jax.ops import (
  all_to_all,
  expert_blocks,
  expert_products,
  fp8_linear,
)
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import quantizers
from pallas_kernels.grouped_matmul import api

Quantized = quantized.Quantized
Policy = precision.Policy
ExpertBlocks = expert_blocks.ExpertBlocks


def forward(
  x_MD: Float[Array, 'M D'],
  gates_MK: Float[Array, 'M K'],
  experts: expert_products.Experts,
  plan: all_to_all.AllToAllPlan,
  policy: Policy,
  most: int,
) -> tuple[Float[Array, 'M D'], tuple]:
  """Dispatch, product and combine (TR eq. 12), and what `backward` needs.

  Args:
    experts: `fp8_linear.Weight`s with a leading expert dim; this device's part,
      as are their gradients.
    most: assignments to experts here, as in `expert_blocks.make_blocks`.
  """
  top_k = gates_MK.shape[1]
  num_experts = experts.w_up_EDF.fprop.shape[0]
  ids_IK = plan.ids_IK
  blocks = expert_blocks.make_blocks(ids_IK, num_experts, api.ROWS, most)
  products = _grouped(blocks, num_experts, policy)
  sent = quantizers.rows(
    x_MD,
    pow2=True,
    floor=precision.ACTIVATION_FLOOR,
    implementation=policy.implementation,
  )
  received = send(sent, plan)
  gates_IK = all_to_all.dispatch(gates_MK, plan)
  rows = permute(received, blocks, top_k)
  with jax.named_scope('fprop'):
    gate_JF = products.forward(rows, experts.w_gate_EDF.fprop)
    up_JF = products.forward(rows, experts.w_up_EDF.fprop)
  gates_J = expert_blocks.rows_of(gates_IK, blocks)
  down = experts.w_down_EFD
  y_JD, saved = fp8_linear.swiglu_forward(
    gate_JF, up_JF, gates_J, down.fprop, products, policy
  )
  y_ID = expert_blocks.unpermute(y_JD, blocks, top_k, num_experts)
  y_MD = all_to_all.combine(y_ID.astype(x_MD.dtype), plan)
  transposes = [w.dgrad for w in experts]
  return y_MD, (received, gates_IK, saved, blocks, plan, transposes)


def backward(
  policy: Policy, residuals: tuple, dy_MD: Float[Array, 'M D']
) -> tuple:
  """Gradients of tokens, gates and experts."""
  received, gates_IK, saved, blocks, plan, (gate, up, down) = residuals
  num_experts, top_k, dtype = gate.shape[0], gates_IK.shape[1], dy_MD.dtype
  products = _grouped(blocks, num_experts, policy)
  dy = _received_gradient(dy_MD, plan, blocks, top_k, policy)
  gates_J = expert_blocks.rows_of(gates_IK, blocks)
  dgate_JF, dup_JF, dgates_J, dw_down_EFD = fp8_linear.swiglu_backward(
    saved, gates_J, down, dy, products, policy, dtype
  )
  rows = permute(received, blocks, top_k)
  x = fp8_linear.transposed(rows, policy, pow2=True)
  dgate = fp8_linear.quantize_gradient(dgate_JF, policy)
  dup = fp8_linear.quantize_gradient(dup_JF, policy)
  with jax.named_scope('dgrad'):
    dx_JD = products.forward(dgate[0], gate) + products.forward(dup[0], up)
  with jax.named_scope('wgrad'):
    dw_gate_EDF = products.weight(x, dgate[1])
    dw_up_EDF = products.weight(x, dup[1])
  dx_ID = expert_blocks.unpermute(dx_JD, blocks, top_k, num_experts).astype(
    dtype
  )
  dgates_IK = expert_blocks.gates_of(dgates_J, blocks).reshape(gates_IK.shape)
  dgates_IK = dgates_IK.astype(gates_IK.dtype)
  dx_MD, dgates_MK = (all_to_all.combine(d, plan) for d in (dx_ID, dgates_IK))
  grads = (dw_gate_EDF, dw_up_EDF, dw_down_EFD)
  grads = expert_products.Experts(
    *(fp8_linear.Weight(dw, None, None) for dw in grads)
  )
  return dx_MD, dgates_MK, grads


def send(q: Quantized, plan: all_to_all.AllToAllPlan) -> Quantized:
  """Each token's values and scales to the devices of its experts."""
  return _move(q, lambda x: all_to_all.dispatch(x, plan))


def permute(q: Quantized, blocks: ExpertBlocks, top_k: int) -> Quantized:
  """Copies each token's values and scales to the rows of its assignments."""
  return _move(q, lambda x: expert_blocks.permute(x, blocks, top_k))


def _move(q, move):
  # Bytes are moved, not numbers: gathers of FP8 go through f32 on some devices.
  codes = move(jax.lax.bitcast_convert_type(q.values, jnp.uint8))
  values = jax.lax.bitcast_convert_type(codes, q.values.dtype)
  return Quantized(values, move(q.scales), q.tile)


def _received_gradient(dy_MD, plan, blocks, top_k, policy):
  """Rows and columns of the output's gradient, as they reach the experts."""
  chosen = policy.implementation
  sent = quantizers.rows(dy_MD, pow2=True, implementation=chosen)
  # Permuted twice: a deferred Wgrad then holds what was received, K times less.
  received = send(sent, plan)
  rows, later = (permute(received, blocks, top_k) for _ in range(2))
  columns = quantizers.transposed(later, pow2=True, implementation=chosen)
  if policy.block_dgrad:
    dy_ID = all_to_all.dispatch(dy_MD, plan)
    rows = fp8_linear.blockwise(expert_blocks.permute(dy_ID, blocks, top_k))
  return rows, columns


def _grouped(
  blocks: ExpertBlocks, num_experts: int, policy: Policy
) -> fp8_linear.Products:
  """Products of each block with its own expert's matrix."""
  where = (blocks.expert_j, blocks.num_blocks)
  chosen = policy.implementation
  dtype = jnp.dtype(policy.compute)
  forward: Callable = lambda a, b: api.grouped(a, b, *where, dtype, chosen)
  weight: Callable = lambda a, b: api.grouped_k(
    a, b, *where, num_experts, chosen
  )
  return fp8_linear.Products(forward, weight)
