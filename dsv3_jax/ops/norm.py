"""RMSNorm: the only normalisation in DeepSeek-V3 (TR 2.1)."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def rms_norm(
  x: Float[Array, '*batch D'], weight_D: Float[Array, 'D'], eps: float
) -> Float[Array, '*batch D']:
  """Scales each vector to unit root mean square, then by `weight_D`.

  Statistics are f32 whatever the dtype of `x`, which the result keeps.
  """
  with jax.named_scope('rms_norm'):
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    y = x_f32 * jax.lax.rsqrt(mean_square + eps) * weight_D
    return checkpoint_name(y.astype(x.dtype), 'norm')
