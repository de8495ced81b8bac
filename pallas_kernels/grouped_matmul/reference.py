"""FP8 products of many experts, in plain jnp (TR 3.3; DeepGEMM's layouts).

Rows are sorted by expert, and each expert's rows padded with zeros to blocks of
128, so that a block belongs to one expert: `expert_j` names it; the first
`num_blocks` blocks are in use, the rest give zeros. An expert may have none.

  grouped    y_J  = a_J b_e^T    for the block's expert e     (Fprop, Dgrad)
  grouped_k  w_e  = sum over the blocks of e of a_j b_j^T      (Wgrad)

Letters: J padded rows, j blocks, E experts; others as in fp8_matmul.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import reference

Quantized = quantized.Quantized
ROWS = 128  # of a block


def grouped(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  out_dtype: jax.typing.DTypeLike,
) -> Float[Array, 'J N']:
  """Each block of 128 rows of a times its expert's b^T.

  Args:
    a: [J, K], tiles 1 x 128. b: [E, N, K], tiles 128 x 128.
  """

  def body(j, y_JN):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, j * ROWS, ROWS, 0)
    rows = Quantized(cut(a.values), cut(a.scales), a.tile)
    e = expert_j[j]
    mine = Quantized(b.values[e], b.scales[e], b.tile)
    block = reference.matmul(rows, mine, out_dtype)
    return jax.lax.dynamic_update_slice_in_dim(y_JN, block, j * ROWS, 0)

  zeros_JN = jnp.zeros((a.shape[0], b.shape[1]), out_dtype)
  return jax.lax.fori_loop(0, num_blocks, body, zeros_JN)


def grouped_k(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  num_experts: int,
) -> Float[Array, 'E D F']:
  """Each expert's sum, over its blocks of K = 128, of a b^T, in f32.

  Args:
    a: [D, J]. b: [F, J]. Both with tiles 1 x 128.
  """

  def body(j, sum_EDF):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, j * ROWS, ROWS, 1)
    at = lambda x: jax.lax.dynamic_slice_in_dim(x, j, 1, 1)
    part = lambda q: Quantized(cut(q.values), at(q.scales), q.tile)
    product_DF = reference.matmul(part(a), part(b), jnp.float32)
    return sum_EDF.at[expert_j[j]].add(product_DF)

  shape = (num_experts, a.shape[0], b.shape[0])
  zeros_EDF = jnp.zeros(shape, jnp.float32)
  return jax.lax.fori_loop(0, num_blocks, body, zeros_EDF)
