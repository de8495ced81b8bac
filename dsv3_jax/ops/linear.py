"""Linear and SwiGLU in the precision that the policy names (TR 2.1.2, 3.3).

A weight is an array of any float dtype or, under an FP8 policy, an
`fp8_linear.Weight`. Arrays are cast to the dtype of the input. Rows are tokens;
sums are f32, and weight gradients have the dtype of the weight.
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


def operand(x_MD: Float[Array, 'M D'], policy: Policy) -> Operand:
  """An input that several linears share: quantised once, under FP8."""
  return fp8_linear.operand(x_MD, policy) if policy.fp8 else x_MD


def project(
  x: Operand, w: Weight, policy: Policy, *, pow2: bool = False
) -> Float[Array, 'M F']:
  """x W. Output dims of an array w [D, ...] come flattened.

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
def _product(x_MD, w_DF):
  """x W with f32 sums, rounded once."""
  return _sums('md,df->mf', x_MD, w_DF.astype(x_MD.dtype)).astype(x_MD.dtype)


def _product_fwd(x_MD, w_DF):
  return _product(x_MD, w_DF), (x_MD, w_DF)


def _product_bwd(residuals, dy_MF):
  x_MD, w_DF = residuals
  dx_MD = _sums('mf,df->md', dy_MF, w_DF.astype(dy_MF.dtype))
  dw_DF = _sums('md,mf->df', x_MD, dy_MF)
  return dx_MD.astype(x_MD.dtype), dw_DF.astype(w_DF.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _sums(subscripts, a, b):
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
