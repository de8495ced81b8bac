"""The FP8 product on Hopper: e4m3 wgmma, sums promoted every 128 of K (Mosaic).

A persistent program takes one output tile after another. Its third warpgroup
loads: tiles of a and b and their scales come by TMA into a ring of stages,
across the borders of output tiles. Two consumers take 64 rows each: per 128 of
K four wgmmas into a fresh accumulator, then

  sum_mn += product_mn * (scale_m * scale_n)      in f32 registers (TR 3.3.2)

so that one promotes while the other multiplies. (The product of a block of K
keeps about 14 bits on the device, TR 3.5.2; the reference's and the
interpreter's is f32.) Scales of a lie [K / 128, M] and are read in the row
layout of wgmma; those of b are scalars of 128 x 128 blocks, or lie [K / 128, N]
and are read in its column layout.

Budget of a tile of 128 x 192, as ptxas gives it (sm_90a): a consumer's thread
has 96 accumulators and 96 sums of its 232 registers, none spilled; the loader
has 40. Shared memory: a stage is 16 KB of a, 24 KB of b, 0.5 KB of scales; four
of them and two pieces of output for each consumer are 194 KB with BF16 output,
226 KB with f32, of 227 KB. With scales for rows of b a tile is 128 x 128: 64
accumulators, 64 sums and 32 column scales.

A program loads 128 (rows + columns) bytes for each 128 of K: 128 x 192 needs
17 % fewer bytes of L2 a FLOP than 128 x 128. (256 x 128 would need 25 % fewer,
and spills.)

M and N may end inside a tile: TMA fills what lies outside with zeros and drops
stores there. Padded are M and N to 8, K to 128 and the output's columns to 128
bytes, of which swizzled memory consists, and the scales' M and N to 4.

Letters: M rows, N columns, K contracted dim, E matrices of b, i of the output;
lower case: tiles of 128.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, quantized

Quantized = quantized.Quantized
plgpu = compat.mosaic_gpu

CONSUMERS = 2  # warpgroups that multiply; one more loads
ROWS = 64  # of a consumer: of one wgmma
TILE_ROWS = CONSUMERS * ROWS
DEPTH = 128  # of K between two promotions
PIECE = 64  # columns stored at once
GROUP, LINE = 8, 128  # rows, and bytes of a row, of swizzled memory
OUT_SLOTS = 2  # pieces on their way to memory
LOADER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of 512 for the three


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Columns of an output tile of 128 rows, and the order of tiles.

  columns: 64, 128 or 192 (not with scales for rows of b). stages: tiles of a
  and b in flight. programs: at most this many, one for each multiprocessor.
  strip: columns of tiles that are done before the next, for the L2 cache.
  """

  columns: int = 128
  stages: int = 4
  programs: int = 132  # of an H100 SXM and an H200
  strip: int = 8

  def __post_init__(self):
    if self.columns not in (64, 128, 192):
      raise ValueError(f'columns={self.columns} must be 64, 128 or 192')


class MatmulPlan(NamedTuple):
  """Constants of a launch. tiles: matrices, rows, columns.

  table_by: which of the tile's indices chooses the column of the table, 'row'
  or 'matrix'; None without a table.
  """

  tiles: tuple[int, int, int]
  depth: int
  row_scales: bool
  table_by: str | None
  blocks: BlockSizes

  @property
  def group(self) -> int:
    """Columns that share a scale of b: 192 may begin inside a block of 128."""
    return PIECE if self.blocks.columns == 192 else self.blocks.columns


class Tile(NamedTuple):
  """An output tile: its place, its matrix of b, and its blocks of K."""

  matrix: jax.Array
  row: jax.Array
  column: jax.Array
  weight: jax.Array
  first: jax.Array
  end: jax.Array


def matmul(
  a: Quantized,
  b: Quantized,
  out_dtype: jax.typing.DTypeLike,
  *,
  blocks: BlockSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'M N']:
  """a b^T with promotion every 128 of K.

  Args:
    a: [M, K], tiles 1 x 128. b: [N, K], tiles 128 x 128 or 1 x 128; e4m3.
  Raises:
    NotImplementedError: not e4m3; interpreted before jax 0.11.
  """
  b_ENK = Quantized(b.values[None], b.scales[None], b.tile)
  return launch(a, b_ENK, out_dtype, blocks=blocks, interpret=interpret)[0]


def unsupported(a: Quantized, b: Quantized) -> str | None:
  """Why the kernel does not take such operands, if it does not."""
  for name, q in (('a', a), ('b', b)):
    if q.values.dtype != quantized.E4M3:
      return f'{name} is {q.values.dtype}, not e4m3'
  return None


def launch(
  a: Quantized,
  b: Quantized,
  out_dtype: jax.typing.DTypeLike,
  *,
  matrices: int = 1,
  table: Int[Array, '3 i'] | None = None,
  table_by: str | None = None,
  blocks: BlockSizes | None = None,
  interpret: bool = False,
) -> Float[Array, 'i M N']:
  """`matrices` products of rows of a and a matrix of b, over parts of K.

  Args:
    a: [M, K]. b: [E, N, K]. table: int32 [3, number of rows of tiles or of
      matrices]: the matrix of b, the first block of K, and past the last.
  """
  if reason := unsupported(a, b):
    raise NotImplementedError(reason)
  (rows, depth), columns = a.shape, b.shape[1]
  row_scales = b.tile == quantized.ROW
  blocks = blocks or choose(matrices, rows, columns, row_scales)
  if row_scales and blocks.columns == 192:
    raise ValueError('columns=192 must be at most 128 with scales of rows of b')
  tiles = (matrices, pl.cdiv(rows, TILE_ROWS), pl.cdiv(columns, blocks.columns))
  plan = MatmulPlan(tiles, pl.cdiv(depth, DEPTH), row_scales, table_by, blocks)
  line = LINE // jnp.dtype(out_dtype).itemsize
  padded = (matrices, up(rows, GROUP), up(columns, line))
  kernel = plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=jax.ShapeDtypeStruct(padded, out_dtype),
    scratch_types=_scratch(plan, out_dtype),
    grid=(min(blocks.programs, math.prod(tiles)),),
    grid_names=('program',),
    num_threads=CONSUMERS + 1,
    thread_name='warpgroup',
    kernel_name='fp8_matmul',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=compat.gpu_interpreter(interpret),
  )
  operands = (
    pad(a.values, GROUP, DEPTH),
    pad(a.scales.T, 1, 4),
    pad(b.values, GROUP, DEPTH),
    pad(b.scales[0].T, 1, 4) if row_scales else b.scales,
  )
  out_iMN = kernel(*operands, *(() if table is None else (table,)))
  return out_iMN[:, :rows, :columns]


def choose(
  matrices: int, rows: int, columns: int, row_scales: bool
) -> BlockSizes:
  """Columns by the bytes that the busiest program loads."""

  def loads(width):
    tiles = matrices * pl.cdiv(rows, TILE_ROWS) * pl.cdiv(columns, width)
    return pl.cdiv(tiles, BlockSizes.programs) * (TILE_ROWS + width)

  return BlockSizes(min((128, 64) if row_scales else (192, 128, 64), key=loads))


def up(size: int, multiple: int) -> int:
  """The least multiple that is no smaller."""
  return pl.cdiv(size, multiple) * multiple


def pad(x, rows: int, columns: int):
  """Zeros up to multiples of the last two dims."""
  missing = (-x.shape[-2] % rows, -x.shape[-1] % columns)
  ends = [(0, 0)] * (x.ndim - 2) + [(0, size) for size in missing]
  return jnp.pad(x, ends) if any(missing) else x


def swizzled(shape, dtype, line: int = LINE):
  """Shared memory of matrices as wgmma and TMA have it."""
  tiling = plgpu.TilingTransform((GROUP, line // jnp.dtype(dtype).itemsize))
  swizzle = plgpu.SwizzleTransform(line)
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _scratch(plan: MatmulPlan, out_dtype) -> dict:
  blocks = plan.blocks
  ring = lambda *shape: (blocks.stages, *shape)
  scratch = {
    'a': swizzled(ring(TILE_ROWS, DEPTH), quantized.E4M3),
    'b': swizzled(ring(blocks.columns, DEPTH), quantized.E4M3),
    'scale_a': plgpu.SMEM(ring(TILE_ROWS), jnp.float32),
    'out': swizzled((CONSUMERS, OUT_SLOTS, ROWS, PIECE), out_dtype),
  }
  if plan.row_scales:
    scratch['scale_b'] = plgpu.SMEM(ring(blocks.columns), jnp.float32)
  barrier = functools.partial(plgpu.Barrier, num_barriers=blocks.stages)
  scratch['full'] = barrier(num_arrivals=3 + plan.row_scales)
  scratch['empty'] = barrier(num_arrivals=CONSUMERS)
  return {'scratch': scratch}


def _kernel(
  a_MK, scale_kM, b_ENK, scale_b, *rest, plan: MatmulPlan, scratch: dict
):
  """The body of every warpgroup.

  rest: the table if there is one, and the output.
  """
  *table, out_iMN = rest
  warpgroup = lax.axis_index('warpgroup')
  each_tile = functools.partial(
    plgpu.nd_loop, (math.prod(plan.tiles),), collective_axes='program'
  )

  def load():
    plgpu.set_max_registers(LOADER_REGISTERS, action='decrease')

    @each_tile(init_carry=jnp.int32(0))
    def steps(loop, carry):
      tile = _tile(loop.index[0], table, plan)
      sources = (a_MK, scale_kM, b_ENK, scale_b)
      body = functools.partial(_load, tile, sources, scratch, plan)
      return lax.fori_loop(tile.first, tile.end, body, carry)

    # Waits for the last use of every stage: barriers must end in phase.
    @pl.loop(lax.max(steps - plan.blocks.stages, 0), steps)
    def _(step):
      plgpu.barrier_wait(scratch['empty'].at[_slot(step, plan)])

  def consume():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')

    @each_tile(init_carry=jnp.int32(0))
    def _(loop, carry):
      tile = _tile(loop.index[0], table, plan)
      body = functools.partial(
        _multiply, tile, scale_b, scratch, plan, warpgroup
      )
      zeros = tuple(
        plgpu.layout_cast(
          jnp.zeros((ROWS, plan.group), jnp.float32), plgpu.Layout.WGMMA
        )
        for _ in range(plan.blocks.columns // plan.group)
      )
      step, sums = lax.fori_loop(tile.first, tile.end, body, (carry, zeros))
      _store(sums, tile, out_iMN, scratch['out'].at[warpgroup], plan, warpgroup)
      return step

    plgpu.wait_smem_to_gmem(0)

  lax.cond(warpgroup == CONSUMERS, load, consume)


def _slot(step, plan: MatmulPlan):
  return lax.rem(step, jnp.int32(plan.blocks.stages))


def _tile(index, table: list, plan: MatmulPlan) -> Tile:
  """Output tile number `index`: matrix by matrix, strip by strip of columns.

  Within a strip rows go back and forth, so that the L2 cache is used again.
  """
  _, rows, columns = plan.tiles
  matrix = lax.div(index, jnp.int32(rows * columns))
  within = lax.rem(index, jnp.int32(rows * columns))
  row, column = plgpu.planar_snake(
    within, (rows, columns), 1, plan.blocks.strip
  )
  if not table:
    none = jnp.int32(0)
    return Tile(matrix, row, column, none, none, jnp.int32(plan.depth))
  by = row if plan.table_by == 'row' else matrix
  return Tile(matrix, row, column, *(table[0][at, by] for at in range(3)))


def _load(tile: Tile, sources, scratch, plan: MatmulPlan, k, step):
  """Fills the stage of `step` with block k of K."""
  a_MK, scale_kM, b_ENK, scale_b = sources
  slot = _slot(step, plan)

  @pl.when(step >= plan.blocks.stages)
  def _():
    plgpu.barrier_wait(scratch['empty'].at[slot])

  def copy(source, name):
    full = scratch['full'].at[slot]
    plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], full)

  rows = pl.ds(tile.row * TILE_ROWS, TILE_ROWS)
  width = plan.blocks.columns
  columns = pl.ds(tile.column * width, width)
  depth = pl.ds(k * DEPTH, DEPTH)
  copy(a_MK.at[rows, depth], 'a')
  copy(b_ENK.at[tile.weight, columns, depth], 'b')
  copy(scale_kM.at[k, rows], 'scale_a')
  if plan.row_scales:
    copy(scale_b.at[k, columns], 'scale_b')
  return step + 1


def _multiply(
  tile: Tile, scale_b, scratch, plan: MatmulPlan, warpgroup, k, carry
):
  """Adds block k of K, in the stage of `step`, to the sums of 64 rows."""
  step, sums = carry
  slot = _slot(step, plan)
  width = plan.blocks.columns
  rows = pl.ds(warpgroup * ROWS, ROWS)
  plgpu.barrier_wait(scratch['full'].at[slot])

  def product(acc):
    b_KN = scratch['b'].at[slot].transpose((1, 0))
    plgpu.wgmma(acc, scratch['a'].at[slot, rows], b_KN)
    by_row, by_column = (
      plgpu.Layout.WGMMA.reduce(1),
      plgpu.Layout.WGMMA.reduce(0),
    )
    scale_a = plgpu.layout_cast(scratch['scale_a'][slot, rows], by_row)
    if plan.row_scales:
      others = [plgpu.layout_cast(scratch['scale_b'][slot], by_column)]
    else:
      others = [
        scale_b[tile.weight, _block(tile, group, plan, scale_b), k]
        for group in range(len(sums))
      ]
    # TMA, another proxy, may overwrite the scales only after they were read;
    # the wgmmas are running meanwhile.
    plgpu.commit_smem()
    return acc[...], scale_a, others

  acc = plgpu.ACC((ROWS, width), jnp.float32)
  product_MN, scale_a, others = pl.run_scoped(product, acc)
  plgpu.barrier_arrive(scratch['empty'].at[slot])
  shape = (ROWS, plan.group)
  promoted = []
  for group, (total, other) in enumerate(zip(sums, others, strict=True)):
    part = product_MN[:, group * plan.group : (group + 1) * plan.group]
    rows_of = lambda x: lax.broadcast_in_dim(x, shape, (0,))
    if plan.row_scales:
      scale = rows_of(scale_a) * lax.broadcast_in_dim(other, shape, (1,))
    else:
      scale = rows_of(scale_a * other)
    promoted.append(total + part * scale)
  return step + 1, tuple(promoted)


def _block(tile: Tile, group: int, plan: MatmulPlan, scale_b):
  """The 128 x 128 blocks of a group of columns; the last for those outside."""
  column = tile.column * plan.blocks.columns + group * plan.group
  return lax.min(lax.div(column, jnp.int32(128)), scale_b.shape[1] - 1)


def _store(sums, tile: Tile, out_iMN, out_smem, plan: MatmulPlan, warpgroup):
  """Stores 64 rows, 64 columns at a time."""
  rows = pl.ds(tile.row * TILE_ROWS + warpgroup * ROWS, ROWS)
  for piece in range(plan.blocks.columns // PIECE):
    group, at = divmod(piece * PIECE, plan.group)
    smem = out_smem.at[piece % OUT_SLOTS]
    plgpu.wait_smem_to_gmem(OUT_SLOTS - 1 if piece else 0, wait_read_only=True)
    smem[...] = sums[group][:, at : at + PIECE].astype(out_iMN.dtype)
    plgpu.commit_smem()
    column = tile.column * plan.blocks.columns + piece * PIECE
    plgpu.copy_smem_to_gmem(
      smem, out_iMN.at[tile.matrix, rows, pl.ds(column, PIECE)]
    )
