"""Linear and SwiGLU in the precision that the policy names (TR 2.1.2, 3.3).

A weight is an array of any float dtype or, under an FP8 policy, an
`fp8_linear.Weight`. Arrays are cast to the dtype of the input. Rows are tokens;
sums are f32, and weight gradients are rounded to nothing less than the weight.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax import precision
from dsv3_jax.ops import fp8_linear

Policy = precision.Policy
Weight = Array | fp8_linear.Weight
Operand = Array | fp8_linear.Operand


def operand(x_MI: Float[Array, 'M I'], policy: Policy) -> Operand:
  """An input that several linears share: quantised once, under FP8."""
  return fp8_linear.operand(x_MI, policy) if policy.fp8 else x_MI


def project(
  x: Operand, w: Weight, policy: Policy, *, pow2: bool = False
) -> Float[Array, 'M O']:
  """x W. Output dims of an array w [I, ...] come flattened.

  Args:
    pow2: FP8 only, as in `fp8_linear.linear`.
  """
  if isinstance(w, fp8_linear.Weight):
    return fp8_linear.linear(x, w, policy, pow2=pow2)
  return _product(x, w.reshape(x.shape[-1], -1))


def swiglu(
  x_MD: Float[Array, 'M D'],
  w_gate_DF: Weight,
  w_up_DF: Weight,
  w_down_FD: Weight,
  policy: Policy,
) -> Float[Array, 'M D']:
  """W_down (silu(W_gate x) * W_up x)."""
  with jax.named_scope('swiglu'):
    x = operand(x_MD, policy)
    gate_MF = project(x, w_gate_DF, policy)
    up_MF = project(x, w_up_DF, policy)
    if policy.fp8:
      return fp8_linear.swiglu_linear(gate_MF, up_MF, w_down_FD, policy)
    gate_MF = checkpoint_name(gate_MF, 'swiglu_in')
    up_MF = checkpoint_name(up_MF, 'swiglu_in')
    return _product(jax.nn.silu(gate_MF) * up_MF, w_down_FD)


@jax.custom_vjp
def _product(x_MI, w_IO):
  """x W with f32 sums, rounded once."""
  return _sums('mi,io->mo', x_MI, w_IO.astype(x_MI.dtype)).astype(x_MI.dtype)


def _product_fwd(x_MI, w_IO):
  return _product(x_MI, w_IO), (x_MI, w_IO)


def _product_bwd(residuals, dy_MO):
  x_MI, w_IO = residuals
  dx_MI = _sums('mo,io->mi', dy_MO, w_IO.astype(dy_MO.dtype))
  dw_IO = _sums('mi,mo->io', x_MI, dy_MO)
  return dx_MI.astype(x_MI.dtype), dw_IO.astype(w_IO.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _sums(subscripts, a, b):
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
