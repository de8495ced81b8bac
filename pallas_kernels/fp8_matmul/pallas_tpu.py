"""The FP8 product on TPUs, through Pallas and Mosaic (TR 3.3.2).

A grid over blocks of M, N and K, K innermost. Per 128 of K one product of the
matrix unit into f32, then the promotion: + part * (scale_m scale_n) on the
vector unit. Before v7 the matrix unit has no e4m3; every e4m3 is a bf16, so
that the cast in the kernel changes no number.

Layout of scales. A TPU register is 8 x 128, and 8 tiles of K are 1,024 of it: a
block's scales come as [groups, 8, rows], the dim that is long in the lanes. So
they cost 1/32 of the values' traffic, where [rows, K / 128] padded to 128 lanes
could cost as much as the values. Those of b are rows already; those of a are
transposed into columns in registers, eight at once. A 128 x 128 tile's scale is
repeated for its rows, so that one body serves both tiles of b.

Letters: as in reference.py; g groups of eight tiles of K.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import quantized, tpu
from pallas_kernels.fp8_matmul import reference

Quantized = quantized.Quantized

TILE = 128  # of K between promotions; lanes of a register
GROUP = 8  # sublanes of a register


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Rows of a, rows of b and depth that a step of a kernel holds.

  All multiples of 128. The heuristics of the kernels give even blocks: few
  steps (each costs about 0.35 us) with little beyond the edges.
  """

  m: int
  n: int
  k: int

  def __post_init__(self):
    for name, size in dataclasses.asdict(self).items():
      if size <= 0 or size % TILE:
        raise ValueError(f'blocks.{name}={size} must be a multiple of {TILE}')


def choose_blocks(m: int, n: int, k: int) -> BlockSizes:
  """Square and large: 1,024^2 does 1,024 FLOPs a byte, v6e asks for 560.

  It also halves what the casts of the operands cost beside 512^2. Depths of
  whole groups of tiles need no second copy of the kernel's code for a rest.
  """
  whole = (size for size in (2048, 1024) if k % size == 0)
  depth = next(whole, None) or even(k, 2048)
  return BlockSizes(even(m, 1024), even(n, 1024), depth)


def matmul(
  a: Quantized,
  b: Quantized,
  out_dtype: jax.typing.DTypeLike,
  *,
  blocks: BlockSizes | None = None,
  interpret=False,
) -> Float[Array, 'M N']:
  """a b^T; see `api.matmul`.

  Args:
    blocks: None: `choose_blocks`.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  (rows, depth), columns = a.shape, b.shape[0]
  blocks = blocks or choose_blocks(rows, columns, depth)
  a_values, a_scales = operand(a, blocks.m, blocks.k)
  b_values, b_scales = operand(b, blocks.n, blocks.k)
  m, n, k = a_values.shape[0], b_values.shape[0], a_values.shape[1]
  groups = groups_of(blocks.k)
  out_MN = pl.pallas_call(
    functools.partial(_kernel, dtype=operand_dtype(a, b, interpret)),
    out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
    grid=(pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), k // blocks.k),
    in_specs=[
      pl.BlockSpec((blocks.m, blocks.k), lambda i, j, t: (i, t)),
      pl.BlockSpec((blocks.n, blocks.k), lambda i, j, t: (j, t)),
      pl.BlockSpec((groups, GROUP, blocks.m), lambda i, j, t: (t, 0, i)),
      pl.BlockSpec((groups, GROUP, blocks.n), lambda i, j, t: (t, 0, j)),
    ],
    out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, t: (i, j)),
    scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=cost(2 * m * n * k, (a, b), m * n, out_dtype),
    interpret=interpret,
    name='fp8_matmul',
  )(a_values, b_values, a_scales, b_scales)
  return out_MN[:rows, :columns]


def _kernel(a_MK, b_NK, scale_a_gM, scale_b_gN, out_MN, sum_MN, *, dtype):
  """One block of M, N, K; the sum stays in VMEM from step to step of K."""
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    sum_MN[...] = jnp.zeros_like(sum_MN)

  add_tiles(sum_MN, a_MK, b_NK, scale_a_gM, scale_b_gN, dtype)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    out_MN[...] = sum_MN[...].astype(out_MN.dtype)


def add_tiles(sum_MN, a_MK, b_NK, scale_a_gM, scale_b_gN, dtype):
  """Adds a block's product to `sum_MN`, tile of K by tile, all in VMEM.

  Groups of eight tiles are a loop, as their code would grow with K; the tiles
  within are written out, as a lane is cut from a register only where it is
  known. Tiles are added in order, as in the reference.
  """

  def add_group(g, tiles):
    scale_aT_M8, scale_b_8N = scale_a_gM[g].T, scale_b_gN[g]
    total_MN = sum_MN[...]
    for t in range(tiles):
      start = pl.multiple_of((g * GROUP + t) * TILE, TILE)
      cut = lambda ref: ref[:, pl.ds(start, TILE)].astype(dtype)
      part_MN = product(cut(a_MK), cut(b_NK))
      scale_MN = scale_aT_M8[:, t : t + 1] * scale_b_8N[t : t + 1]
      total_MN = total_MN + part_MN * scale_MN
    sum_MN[...] = total_MN

  whole, rest = divmod(a_MK.shape[1] // TILE, GROUP)
  if whole:
    jax.lax.fori_loop(0, whole, lambda g, _: add_group(g, GROUP), None)
  if rest:
    add_group(whole, rest)


def product(a_MK, b_NK):
  """a b^T of one tile of K: the matrix unit, f32 sums."""
  return jax.lax.dot_general(
    a_MK, b_NK, tpu.NT, preferred_element_type=jnp.float32
  )


def operand_dtype(a: Quantized, b: Quantized, interpret):
  """What the matrix unit multiplies: the operands' own type, or bf16."""
  if not interpret:
    own = a.values.dtype, b.values.dtype
    if own[0] == own[1] and pltpu.get_tpu_info().is_matmul_supported(*own):
      return own[0]
  return jnp.bfloat16


def operand(q: Quantized, rows: int, depth: int):
  """Values and scales of [..., I, K] as the kernels read them.

  Args:
    rows, depth: of a block.
  Returns:
    values [..., I', K'], K' whole blocks and I' at least one: padded with
    zeros. scales f32 [..., groups, 8, I'], groups per block of K padded to
    whole ones. A last block of rows may be partial: a row's sum is its own, and
    what is beyond the edge is not written.
  """
  short = max(rows - q.shape[-2], 0)
  steps, tiles = max(pl.cdiv(q.shape[-1], depth), 1), depth // TILE
  values = pad(q.values, (short, steps * depth - q.shape[-1]))
  scales = jnp.swapaxes(reference.row_scales(q), -1, -2)
  scales = pad(scales, (steps * tiles - scales.shape[-2], short))
  *lead, _, size = scales.shape
  scales = scales.reshape(*lead, steps, tiles, size)
  scales = pad(scales, (-tiles % GROUP, 0))
  return values, scales.reshape(*lead, -1, GROUP, size)


def groups_of(depth: int) -> int:
  """Groups of scales of a block of `depth`."""
  return pl.cdiv(depth, TILE * GROUP)


def even(size: int, most: int) -> int:
  """The block, a multiple of 128, of the fewest even blocks of <= `most`."""
  size = max(size, 1)
  return pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), TILE) * TILE


def cost(flops: int, operands, outputs: int, out_dtype) -> pl.CostEstimate:
  """Each operand read once, `outputs` numbers written."""
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(operands)]
  written = outputs * jnp.dtype(out_dtype).itemsize
  return pl.CostEstimate(
    flops=flops, transcendentals=0, bytes_accessed=sum(sizes) + written
  )


def pad(x, after: tuple[int, int]):
  """x with zeros after its last two dims."""
  if after == (0, 0):
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in after])
