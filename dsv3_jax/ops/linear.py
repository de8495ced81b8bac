"""SwiGLU, the feed-forward of dense layers and experts (TR 2.1.2)."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def swiglu(
  x_BTD: Float[Array, 'B T D'],
  w_gate_DF: Float[Array, 'D F'],
  w_up_DF: Float[Array, 'D F'],
  w_down_FD: Float[Array, 'F D'],
) -> Float[Array, 'B T D']:
  """W_down (silu(W_gate x) * W_up x)."""
  with jax.named_scope('swiglu'):
    gate_BTF = jnp.einsum('btd,df->btf', x_BTD, w_gate_DF)
    up_BTF = jnp.einsum('btd,df->btf', x_BTD, w_up_DF)
    gate_BTF = checkpoint_name(gate_BTF, 'swiglu_in')
    up_BTF = checkpoint_name(up_BTF, 'swiglu_in')
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
    return jnp.einsum('btf,fd->btd', hidden_BTF, w_down_FD)
