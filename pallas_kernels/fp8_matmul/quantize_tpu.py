"""Both quantised copies of an activation in one pass over it, on TPUs.

A Linear takes x with 1 x 128 tiles for Fprop and x^T with 1 x 128 tiles for
Wgrad (TR 3.3.2). Separate passes would read x twice and its transpose once
more. Here a block is read once and transposed in registers. The largest
magnitudes of either copy's tiles are then maxima over sublanes of the other
form, which are plain vector operations, and come out with the long dim in the
lanes, as they are stored.

Letters: M rows and N columns of one form of a block; m and n their tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import quantized, tpu
from pallas_kernels.fp8_matmul import pallas_tpu, reference

Quantized = quantized.Quantized
TILE = pallas_tpu.TILE


def choose_blocks(m: int, d: int) -> pallas_tpu.BlockSizes:
  """512 x 512, or even parts: 1 MiB of f32, held about six times over."""
  even = pallas_tpu.even
  return pallas_tpu.BlockSizes(m=even(m, 512), n=even(d, 512), k=TILE)


def quantize_both(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  blocks: pallas_tpu.BlockSizes | None = None,
  interpret=False,
) -> tuple[Quantized, Quantized]:
  """Rows of x and rows of its transpose, bitwise as `reference.quantize_both`.

  Args:
    blocks: None: `choose_blocks`; m rows and n columns of x, no k.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  rows, columns = x_MD.shape
  blocks = blocks or choose_blocks(rows, columns)
  # Zeros fill up tiles; the last blocks may be partial, by whole tiles.
  x_MD = pallas_tpu.pad(
    x_MD, (_beyond(rows, blocks.m), _beyond(columns, blocks.n))
  )
  (m, d), (block_m, block_d) = x_MD.shape, (blocks.m, blocks.n)
  grid = pl.cdiv(m, block_m), pl.cdiv(d, block_d)
  tiles_m, tiles_d = block_m // TILE, block_d // TILE
  shape = jax.ShapeDtypeStruct
  of_x, of_xT, scale_dM, scale_mD = pl.pallas_call(
    functools.partial(_kernel, pow2=pow2, floor=floor),
    out_shape=(
      shape((m, d), quantized.E4M3),
      shape((d, m), quantized.E4M3),
      shape((grid[1], tiles_d, m), jnp.float32),
      shape((grid[0], tiles_m, d), jnp.float32),
    ),
    grid=grid,
    in_specs=[pl.BlockSpec((block_m, block_d), lambda i, j: (i, j))],
    out_specs=(
      pl.BlockSpec((block_m, block_d), lambda i, j: (i, j)),
      pl.BlockSpec((block_d, block_m), lambda i, j: (j, i)),
      pl.BlockSpec((None, tiles_d, block_m), lambda i, j: (j, 0, i)),
      pl.BlockSpec((None, tiles_m, block_d), lambda i, j: (i, 0, j)),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=pallas_tpu.cost(4 * m * d, x_MD, 2 * m * d, quantized.E4M3),
    interpret=interpret,
    name='fp8_quantize_both',
  )(x_MD)
  return (
    _crop(of_x, scale_dM, rows, columns),
    _crop(of_xT, scale_mD, columns, rows),
  )


def _kernel(x_MD, of_x_MD, of_xT_DM, scale_dM, scale_mD, *, pow2, floor):
  """One block in both forms."""
  options = {'pow2': pow2, 'floor': floor, 'dtype': quantized.E4M3}
  block_MD = x_MD[...].astype(jnp.float32)
  block_DM = block_MD.T
  _quantize(block_MD, block_DM, of_x_MD, scale_dM, options)
  _quantize(block_DM, block_MD, of_xT_DM, scale_mD, options)


def _quantize(x_MN, x_NM, values_MN, scale_nM, options):
  """Writes the values and scales of 1 x 128 tiles of x_MN."""
  columns, rows = x_NM.shape
  tiles = jnp.abs(x_NM).reshape(columns // TILE, TILE, rows)
  scales = reference.scale_of(jnp.max(tiles, axis=1), **options)
  scale_nM[...] = scales
  inverse_Mn = (1.0 / scales).T
  for t in range(columns // TILE):
    at = slice(t * TILE, (t + 1) * TILE)
    values = x_MN[:, at] * inverse_Mn[:, t : t + 1]
    values_MN[:, at] = values.astype(values_MN.dtype)


def _crop(values_MN, scales, rows: int, columns: int) -> Quantized:
  """Without what was padded; scales [.., .., I] become [I, j]."""
  scale_nM = scales.reshape(-1, scales.shape[-1])
  tiles = pl.cdiv(columns, TILE)
  return Quantized(
    values_MN[:rows, :columns], scale_nM[:tiles, :rows].T, quantized.ROW
  )


def _beyond(size: int, block: int) -> int:
  """What `size` lacks to whole tiles and to a block."""
  return max(pl.cdiv(size, TILE) * TILE, block) - size
