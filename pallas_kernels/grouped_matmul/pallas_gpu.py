"""FP8 products of many experts on Hopper: fp8_matmul's kernel with a table.

The table, on the device, gives each row of tiles (grouped) or each expert
(grouped_k) its matrix of b and its range of blocks of K. A range without blocks
loads nothing and stores zeros. A block of 128 rows is a row of tiles, so that a
tile has one expert whatever the order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import pallas_gpu
from pallas_kernels.grouped_matmul import reference

Quantized = quantized.Quantized
BlockSizes = pallas_gpu.BlockSizes

assert pallas_gpu.TILE_ROWS == pallas_gpu.DEPTH == reference.ROWS


def grouped(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  out_dtype: jax.typing.DTypeLike,
  *,
  blocks: BlockSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'J N']:
  """Each block of 128 rows of a times its expert's b^T; zeros past num_blocks.

  Args:
    a: [J, K], tiles 1 x 128. b: [E, N, K], tiles 128 x 128; e4m3.
  """
  depth = a.scales.shape[1]
  end_j = jnp.where(_used(expert_j, num_blocks), depth, 0)
  table = jnp.stack([expert_j, jnp.zeros_like(expert_j), end_j])
  out_iJN = pallas_gpu.launch(
    a,
    b,
    out_dtype,
    table=table.astype(jnp.int32),
    table_by='row',
    blocks=blocks,
    interpret=interpret,
  )
  return out_iJN[0]


def grouped_k(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  num_experts: int,
  *,
  blocks: BlockSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'E D F']:
  """Each expert's sum over its blocks of K = 128 of a b^T, in f32.

  Args:
    a: [D, J]. b: [F, J]. Tiles 1 x 128; e4m3. expert_j: sorted.
  """
  used_j = _used(expert_j, num_blocks).astype(jnp.int32)
  count_E = jnp.zeros(num_experts, jnp.int32).at[expert_j].add(used_j)
  end_E = jnp.cumsum(count_E)
  table = jnp.stack([jnp.zeros_like(end_E), end_E - count_E, end_E])
  return pallas_gpu.launch(
    a,
    Quantized(b.values[None], b.scales[None], b.tile),
    jnp.float32,
    matrices=num_experts,
    table=table.astype(jnp.int32),
    table_by='matrix',
    blocks=blocks,
    interpret=interpret,
  )


def _used(expert_j, num_blocks):
  return jnp.arange(expert_j.shape[0]) < num_blocks
