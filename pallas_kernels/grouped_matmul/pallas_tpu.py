"""FP8 products of many experts on TPUs, through Pallas and Mosaic.

Which expert a block of 128 rows belongs to is known on the device only, so it
comes as a prefetched scalar, before the pipeline chooses what to copy.

  grouped    a grid over N, the blocks of rows, K: the expert chooses the block
             of b. Usually one step takes the whole of K, so that consecutive
             blocks of an expert share its weights in VMEM, cast for the matrix
             unit: casting for 128 rows only would cost too much.
  grouped_k  a grid over D, F and a list of steps: an expert's blocks one after
             the other, each added to the expert's output, which stays in VMEM
             for as long as they last. An expert without blocks has one step
             too, that writes zeros: an output block that no step visits would
             hold what was in memory before.

Letters: as in reference.py; i steps, one for each block and each expert, which
is the most there can be.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import quantized, tpu
from pallas_kernels.fp8_matmul import pallas_tpu as dense
from pallas_kernels.fp8_matmul import reference
from pallas_kernels.grouped_matmul.reference import ROWS

Quantized = quantized.Quantized
BlockSizes = dense.BlockSizes

FIRST, WORK = 1, 2  # bits of a step: begins an expert, has a block to add


def choose_grouped(n: int, k: int) -> BlockSizes:
  """The whole of K if it may be, beside 4 Mi numbers of weights."""
  depth = dense.even(k, 8192)
  most = min(max(2**22 // depth // 128 * 128, 128), 2048)
  return BlockSizes(ROWS, dense.even(n, most), depth)


def choose_grouped_k(m: int, n: int) -> BlockSizes:
  """Large outputs: a step takes 0.35 us, and has only 128 of K."""
  return BlockSizes(dense.even(m, 1024), dense.even(n, 2048), ROWS)


def grouped(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  out_dtype: jax.typing.DTypeLike,
  *,
  blocks: BlockSizes | None = None,
  interpret=False,
) -> Float[Array, 'J N']:
  """Each block of 128 rows times its expert's b^T; see `api.grouped`.

  Args:
    blocks: None: `choose_grouped`; m must be 128.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  rows, (experts, columns, depth) = a.shape[0], b.shape
  if not rows:
    return jnp.zeros((0, columns), out_dtype)
  blocks = blocks or choose_grouped(columns, depth)
  if blocks.m != ROWS:
    raise ValueError(f'blocks.m={blocks.m} must be {ROWS}')
  a_values, a_scales = dense.operand(a, ROWS, blocks.k)
  b_values, b_scales = dense.operand(b, blocks.n, blocks.k)
  n, k = b_values.shape[1:]
  used = jnp.asarray(num_blocks, jnp.int32)
  # Blocks not in use take the last one's expert, so that none is copied; what
  # they name may be none.
  last = jnp.minimum(jnp.arange(rows // ROWS), jnp.maximum(used - 1, 0))
  expert_j = jnp.clip(expert_j[last], 0, experts - 1).astype(jnp.int32)
  dtype = dense.operand_dtype(a, b, interpret)
  out_JN = pl.pallas_call(
    functools.partial(_grouped_kernel, dtype=dtype),
    out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
    grid_spec=_grouped_grid(rows, n, k, blocks, dtype != b_values.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=dense.cost(2 * rows * n * k, (a, b), rows * n, out_dtype),
    interpret=interpret,
    name='fp8_grouped',
  )(expert_j, used[None], a_values, b_values, a_scales, b_scales)
  return out_JN[:, :columns]


def _grouped_grid(rows: int, n: int, k: int, blocks: BlockSizes, cast: bool):
  """Grid and blocks; a block not in use reads what the last one left."""
  steps = k // blocks.k

  def row(j, used):
    return jnp.minimum(j, jnp.maximum(used[0] - 1, 0))

  def step(j, t, used):
    return jnp.where(j < used[0], t, steps - 1)

  def at_a(i, j, t, expert_j, used):
    return row(j, used), step(j, t, used)

  def at_b(i, j, t, expert_j, used):
    return expert_j[j], i, step(j, t, used)

  def at_scale_a(i, j, t, expert_j, used):
    return step(j, t, used), 0, row(j, used)

  def at_scale_b(i, j, t, expert_j, used):
    return expert_j[j], step(j, t, used), 0, i

  groups, eight = dense.groups_of(blocks.k), dense.GROUP
  scratch = [pltpu.VMEM((ROWS, blocks.n), jnp.float32)]
  if cast:
    scratch.append(pltpu.VMEM((blocks.n, blocks.k), jnp.bfloat16))
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=2,
    grid=(pl.cdiv(n, blocks.n), rows // ROWS, steps),
    in_specs=[
      pl.BlockSpec((ROWS, blocks.k), at_a),
      pl.BlockSpec((None, blocks.n, blocks.k), at_b),
      pl.BlockSpec((groups, eight, ROWS), at_scale_a),
      pl.BlockSpec((None, groups, eight, blocks.n), at_scale_b),
    ],
    out_specs=pl.BlockSpec((ROWS, blocks.n), lambda i, j, t, *_: (j, i)),
    scratch_shapes=scratch,
  )


def _grouped_kernel(
  expert_j,
  used,
  a_JK,
  b_NK,
  scale_a_gJ,
  scale_b_gN,
  out_JN,
  sum_JN,
  cast_NK=None,
  *,
  dtype,
):
  """One block of rows, N, K; b's blocks are the expert's already."""
  block, step = pl.program_id(1), pl.program_id(2)
  if cast_NK is None:
    cast_NK = b_NK
  else:
    # Have the weights in VMEM changed since the last step?
    changed = expert_j[block] != expert_j[jnp.maximum(block - 1, 0)]
    changed |= (block == 0) | (pl.num_programs(2) > 1)
    pl.when(changed)(lambda: _cast(b_NK, cast_NK))

  @pl.when(step == 0)
  def _():
    sum_JN[...] = jnp.zeros_like(sum_JN)

  @pl.when(block < used[0])
  def _():
    dense.add_tiles(sum_JN, a_JK, cast_NK, scale_a_gJ, scale_b_gN, dtype)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    out_JN[...] = sum_JN[...].astype(out_JN.dtype)


def _cast(b_NK, cast_NK):
  """Casts the weights, 1,024 of K at a time: a loop, for the code's size."""
  depth = b_NK.shape[1]
  part = math.gcd(depth, 1024)

  def cast(t, _):
    at = pl.ds(pl.multiple_of(t * part, part), part)
    cast_NK[:, at] = b_NK[:, at].astype(cast_NK.dtype)

  jax.lax.fori_loop(0, depth // part, cast, None)


def grouped_k(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  num_experts: int,
  *,
  blocks: BlockSizes | None = None,
  interpret=False,
) -> Float[Array, 'E D F']:
  """Sum over each expert's blocks of a b^T in f32; see `api.grouped_k`.

  Args:
    blocks: None: `choose_grouped_k`; k must be 128.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  (rows, depth), columns = a.shape, b.shape[0]
  if not depth:
    return jnp.zeros((num_experts, rows, columns), jnp.float32)
  blocks = blocks or choose_grouped_k(rows, columns)
  if blocks.k != ROWS:
    raise ValueError(f'blocks.k={blocks.k} must be {ROWS}')
  a_values, a_scales = _operand_k(a, blocks.m)
  b_values, b_scales = _operand_k(b, blocks.n)
  m, n = a_values.shape[0], b_values.shape[0]
  steps = grid_steps(expert_j, num_blocks, num_experts)
  kernel = functools.partial(
    _grouped_k_kernel, dtype=dense.operand_dtype(a, b, interpret)
  )
  out_EDF = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((num_experts, m, n), jnp.float32),
    grid_spec=_grouped_k_grid(m, n, len(steps.expert_i), blocks),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=dense.cost(
      2 * m * n * depth, (a, b), num_experts * m * n, jnp.float32
    ),
    interpret=interpret,
    name='fp8_grouped_k',
  )(*steps, a_values, b_values, a_scales, b_scales)
  return out_EDF[:, :rows, :columns]


class GridSteps(NamedTuple):
  """The work of each step: int32 [i] each, read before the step begins."""

  expert_i: jax.Array
  block_i: jax.Array
  bits_i: jax.Array


def grid_steps(expert_j, num_blocks, num_experts: int) -> GridSteps:
  """Each expert's blocks in order, or one step for none; then idle ones."""
  blocks = expert_j.shape[0]
  expert_E = jnp.arange(num_experts)[:, None]
  used_j = jnp.arange(blocks) < num_blocks
  blocks_E = jnp.sum((expert_j == expert_E) & used_j, 1)
  steps_E = jnp.maximum(blocks_E, 1)
  ends_E = jnp.cumsum(steps_E)
  step_i = jnp.arange(blocks + num_experts)
  expert_i = jnp.sum(ends_E[:, None] <= step_i, 0)
  expert_i = jnp.minimum(expert_i, num_experts - 1)
  place_i = step_i - (ends_E - steps_E)[expert_i]
  work_i = place_i < blocks_E[expert_i]
  # An idle step names the block of the step before: nothing is copied.
  first_E = jnp.cumsum(blocks_E) - blocks_E
  block_i = first_E[expert_i] + jnp.minimum(
    place_i, jnp.maximum(blocks_E[expert_i] - 1, 0)
  )
  block_i = jnp.minimum(block_i, blocks - 1)
  bits_i = FIRST * (place_i == 0) + WORK * work_i
  return GridSteps(*(x.astype(jnp.int32) for x in (expert_i, block_i, bits_i)))


def _grouped_k_grid(m: int, n: int, steps: int, blocks: BlockSizes):
  """Grid and blocks of `grouped_k`."""

  def at(rows, dim):
    values = pl.BlockSpec((rows, ROWS), lambda *at: (at[dim], at[4][at[2]]))
    scales = pl.BlockSpec(
      (None, 1, rows), lambda *at: (at[4][at[2]], 0, at[dim])
    )
    return values, scales

  (a, scale_a), (b, scale_b) = at(blocks.m, 0), at(blocks.n, 1)
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=3,
    grid=(pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), steps),
    in_specs=[a, b, scale_a, scale_b],
    out_specs=pl.BlockSpec(
      (None, blocks.m, blocks.n),
      lambda d, f, z, expert_i, *_: (expert_i[z], d, f),
    ),
  )


def _grouped_k_kernel(
  expert_i,
  block_i,
  bits_i,
  a_DJ,
  b_FJ,
  scale_a_1D,
  scale_b_1F,
  out_DF,
  *,
  dtype,
):
  """Adds one block of K = 128 to the expert's output in VMEM."""
  del expert_i, block_i
  bits = bits_i[pl.program_id(2)]

  @pl.when(bits & FIRST != 0)
  def _():
    out_DF[...] = jnp.zeros_like(out_DF)

  @pl.when(bits & WORK != 0)
  def _():
    part_DF = dense.product(a_DJ[...].astype(dtype), b_FJ[...].astype(dtype))
    out_DF[...] += part_DF * (scale_a_1D[...].T * scale_b_1F[...])


def _operand_k(q: Quantized, rows: int):
  """Values [I, J], at least a block of rows, and scales [j, 1, I]."""
  short = max(rows - q.shape[0], 0)
  scales = jnp.swapaxes(reference.row_scales(q), 0, 1)[:, None]
  return dense.pad(q.values, (short, 0)), dense.pad(scales, (0, short))
