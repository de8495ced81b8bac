"""Targets of multi-token prediction (TR 2.2, eqs. 24-25).

Depth k predicts t_{i+k+1} from position i, for i = 1..T-k. The sum of its
losses is divided by T, or by the targets that count.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mtp_shift(x_BT: Array, depth: int) -> Array:
  """x_{i+depth} at i; zeros where the sequence ends first."""
  shifted = x_BT[:, depth:]
  return jnp.pad(shifted, ((0, 0), (0, depth)))


def mtp_weights(
  weights_BT: Float[Array, 'B T'],
  segments_BT: Int[Array, 'B T'],
  depth: int,
  isolated: bool,
) -> Float[Array, 'B T']:
  """Which of the targets t_{i+depth+1} count (TR 2.2).

  Args:
    weights_BT: of the main targets t_{i+1}; segments_BT: of the inputs t_i.
    isolated: samples do not see each other: a target counts only if no border
      lies between position i and it.
  """
  shifted_BT = mtp_shift(weights_BT, depth)
  if isolated:
    same = mtp_shift(segments_BT, depth) == segments_BT
    shifted_BT = jnp.where(same, shifted_BT, 0.0)
  return shifted_BT
