"""Which tensor is computed in which precision (TR 3.3).

  FP8   inputs, weights and gradients of the linears: MLA's projections, dense,
        shared and routed experts' SwiGLU; e4m3, scales per 1 x 128 of
        activations and 128 x 128 of weights, f32 sums
  BF16  embedding, output head, MTP's projection (eh_proj), attention core,
        residual stream, outputs of linears
  f32   master weights, norms, the gate, softmax, losses, gradient sums

`POLICIES` maps the `precision` of an experiment to its `Policy`; all other code
takes the policy, never the name.
"""

import dataclasses
from typing import NamedTuple

# Released code clamps the amax of an activation tile to at least this. It does
# not apply to gradients: those of a mean over many tokens are smaller.
ACTIVATION_FLOOR = 1e-4


class Matrix(NamedTuple):
  """Number of input dims and of output dims, the last dims of a parameter."""

  inputs: int
  outputs: int


# Parameters that are FP8 under an FP8 policy, by the last key of their path.
FP8_MATRICES = {
  'w_dq': Matrix(1, 1),
  'w_uq': Matrix(1, 2),
  'w_q': Matrix(1, 2),
  'w_dkv': Matrix(1, 1),
  'w_uk': Matrix(1, 2),
  'w_uv': Matrix(1, 2),
  'w_o': Matrix(2, 1),
  'w_gate': Matrix(1, 1),
  'w_up': Matrix(1, 1),
  'w_down': Matrix(1, 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """The precision of an experiment; hashable, a static argument everywhere.

  compute: dtype of activations and of matmuls outside FP8.
  fp8: Fprop, Dgrad and Wgrad of the linears are FP8.
  block_dgrad: gradients of activations are quantised in 128 x 128 blocks for
    Dgrad, which diverged in the report (TR 3.3.2, App. B).
  implementation: of the kernels, as in `pallas_kernels.dispatch`.
  """

  compute: str
  fp8: bool = False
  block_dgrad: bool = False
  implementation: str = 'auto'

  def of(self, name: str) -> str:
    """The dtype that a parameter is multiplied in: 'fp8', or a NumPy name.

    Args:
      name: the last key of the parameter's path.
    """
    if name == 'w_router' or name.endswith('norm'):
      return 'float32'
    return 'fp8' if self.fp8 and name in FP8_MATRICES else self.compute


POLICIES = {
  'bf16': Policy(compute='bfloat16'),
  'fp8': Policy(compute='bfloat16', fp8=True),
  'fp8_block_dgrad': Policy(compute='bfloat16', fp8=True, block_dgrad=True),
  'f32': Policy(compute='float32'),
}
