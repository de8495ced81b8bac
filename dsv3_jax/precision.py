"""Which tensor is computed in which precision (TR 3.3).

  FP8   inputs, weights and gradients of the linears: MLA's projections, dense,
        shared and routed experts' SwiGLU; e4m3, scales per 1 x 128 of
        activations and 128 x 128 of weights, f32 sums
  BF16  embedding, output head, MTP's projection (eh_proj), attention core,
        residual stream, outputs of linears
  f32   master weights, norms, the gate, softmax, losses, gradients' sums

A `Policy` is what a `precision` of an experiment stands for; nothing else asks
for the name.
"""

import dataclasses
from typing import NamedTuple

# Scales of activations: released code holds amax at 1e-4 or more. Gradients of
# a mean over many tokens are smaller than that, so theirs go as low as f32.
ACTIVATION_FLOOR = 1e-4


class Matrix(NamedTuple):
  """How many of a parameter's last dims are inputs, and how many outputs."""

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
  """One precision of a whole experiment; hashable, static in every function.

  compute: dtype of activations and of products outside FP8. fp8: the linears'
  three products are FP8. block_dgrad: gradients of activations are quantised in
  128 x 128 blocks for Dgrad, which diverged in the report (TR 3.3.2, App. B).
  implementation: of the kernels, as in `pallas_kernels.dispatch`.
  """

  compute: str
  fp8: bool = False
  block_dgrad: bool = False
  implementation: str = 'auto'

  def of(self, name: str) -> str:
    """'fp8', 'float32' or the compute dtype, of a parameter by its last key."""
    if name == 'w_router' or name.endswith('norm'):
      return 'float32'
    return 'fp8' if self.fp8 and name in FP8_MATRICES else self.compute


POLICIES = {
  'bf16': Policy(compute='bfloat16'),
  'fp8': Policy(compute='bfloat16', fp8=True),
  'fp8_block_dgrad': Policy(compute='bfloat16', fp8=True, block_dgrad=True),
  'f32': Policy(compute='float32'),
}
