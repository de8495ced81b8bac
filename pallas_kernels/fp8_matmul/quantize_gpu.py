"""Quantised copies of an activation in one pass over it, on Hopper (Mosaic).

A program has one tile of 128 x 128 in shared memory, brought by TMA, and two
warpgroups. `quantize_both`: one takes rows, the other, through loads that
transpose, columns. `requantize_transposed`: e4m3 becomes BF16, which holds it
and can be loaded transposed; then each takes half of the columns. Both then
compute the largest magnitude of each of 64 rows of 128 and its scale, round,
and store the 64 x 128 values and the 64 scales.

The bits are those of the reference, also where a device's quotient is an ulp
off. Scales lie [D / 128, M] and [M / 128, D], as the product reads them: the
transposes of the results cancel there. TMA fills what lies outside with zeros,
by which partial tiles are defined.

As ptxas gives it (sm_90a): 67 or 68 KB of shared memory and 256 threads of 102
to 108 registers, none spilled, so that two programs share a multiprocessor. An
element costs 4 bytes of device memory, or 2.

Letters: M, D rows and columns of x; lower case: tiles of 128.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16

from pallas_kernels import compat, quantized
from pallas_kernels.fp8_matmul import pallas_gpu, reference

Quantized = quantized.Quantized
plgpu = compat.mosaic_gpu
up = pallas_gpu.up

TILE = 128
ROWS = 64  # that a warpgroup rounds at once
GROUP = pallas_gpu.GROUP
ROW, COLUMN, WARPGROUP = 'row', 'column', 'warpgroup'


def quantize_both(
  x_MD: BFloat16[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  interpret: bool = False,
) -> tuple[Quantized, Quantized]:
  """Rows of x and rows of its transpose: tiles 1 x 128 of [M, D] and [D, M].

  Raises:
    NotImplementedError: x is not BF16; jax before 0.11.
  """
  if reason := unsupported(x_MD):
    raise NotImplementedError(reason)
  scratch = {
    'x_smem': pallas_gpu.swizzled((TILE, TILE), jnp.bfloat16),
    'values_smem': pallas_gpu.swizzled((2, 2, ROWS, TILE), quantized.E4M3),
    'scales_smem': plgpu.SMEM((2, 2, ROWS), jnp.float32),
    'full': plgpu.Barrier(),
  }
  options = {'pow2': pow2, 'floor': floor}
  outputs = (*_outputs(*x_MD.shape), *_outputs(*x_MD.shape[::-1]))
  kernel = _kernel(_both, x_MD.shape, outputs, scratch, options, interpret)
  *of_rows, values_DM, scale_mD = kernel(pallas_gpu.pad(x_MD, GROUP, 64))
  return (
    _result(*of_rows, x_MD.shape),
    _result(values_DM, scale_mD, x_MD.shape[::-1]),
  )


def unsupported(x_MD) -> str | None:
  """Why `quantize_both` does not take x, if it does not."""
  is_bf16 = x_MD.dtype == jnp.bfloat16
  return None if is_bf16 else f'x_MD is {x_MD.dtype}, not bfloat16'


def requantize_transposed(
  q: Quantized,
  *,
  pow2: bool = False,
  floor: float = 0.0,
  interpret: bool = False,
) -> Quantized:
  """1 x 128 tiles of [M, D] -> of [D, M]: dequantise, transpose, quantise.

  Raises:
    NotImplementedError: q is not e4m3 in tiles of 1 x 128; jax before 0.11.
  """
  if q.values.dtype != quantized.E4M3 or q.tile != quantized.ROW:
    raise NotImplementedError(
      f'q is {q.values.dtype} in tiles of {q.tile}, not e4m3 of {quantized.ROW}'
    )
  scratch = {
    'q_smem': pallas_gpu.swizzled((TILE, TILE), quantized.E4M3),
    'scale_smem': plgpu.SMEM((TILE,), jnp.float32),
    'x_smem': pallas_gpu.swizzled((TILE, TILE), jnp.bfloat16),
    'values_smem': pallas_gpu.swizzled((2, ROWS, TILE), quantized.E4M3),
    'scales_smem': plgpu.SMEM((2, ROWS), jnp.float32),
    'full': plgpu.Barrier(num_arrivals=2),
    'ready': plgpu.Barrier(num_arrivals=2),
  }
  options = {'pow2': pow2, 'floor': floor}
  outputs = _outputs(*q.shape[::-1])
  kernel = _kernel(_requantize, q.shape, outputs, scratch, options, interpret)
  values_DM, scale_mD = kernel(
    pallas_gpu.pad(q.values, GROUP, TILE), pallas_gpu.pad(q.scales.T, 1, 4)
  )
  return _result(values_DM, scale_mD, q.shape[::-1])


def _outputs(rows: int, columns: int):
  """Values and scales; these whole, as no store of a vector is dropped."""
  values = up(rows, GROUP), up(columns, TILE)
  return (
    jax.ShapeDtypeStruct(values, quantized.E4M3),
    jax.ShapeDtypeStruct((pl.cdiv(columns, TILE), up(rows, TILE)), jnp.float32),
  )


def _result(values, scales, shape: tuple[int, int]) -> Quantized:
  rows, columns = shape
  return Quantized(values[:rows, :columns], scales[:, :rows].T, quantized.ROW)


def _kernel(body, shape, outputs, scratch, options, interpret: bool):
  compat.require((0, 11), 'a load that transposes')
  return plgpu.kernel(
    functools.partial(body, **options),
    out_type=outputs,
    scratch_types=scratch,
    grid=tuple(pl.cdiv(size, TILE) for size in shape),
    grid_names=(ROW, COLUMN),
    num_threads=2,
    thread_name=WARPGROUP,
    kernel_name=body.__name__.strip('_'),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=compat.gpu_interpreter(interpret),
  )


def _both(
  x_MD,
  values_MD,
  scale_dM,
  values_DM,
  scale_mD,
  *,
  x_smem,
  values_smem,
  scales_smem,
  full,
  **options,
):
  """Rows of a tile of x, and rows of its transpose."""
  row, column = lax.axis_index(ROW), lax.axis_index(COLUMN)
  warpgroup = lax.axis_index(WARPGROUP)

  @pl.when(warpgroup == 0)
  def _():
    tile = x_MD.at[pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)]
    plgpu.copy_gmem_to_smem(tile, x_smem, full)

  plgpu.barrier_wait(full)

  def rows_of(x, outputs, row, column):
    for half in range(2):
      rows = pl.ds(half * ROWS, ROWS)
      smem = (values_smem.at[warpgroup, half], scales_smem.at[warpgroup, half])
      _round(
        _load(x.at[rows, :]), smem, outputs, 2 * row + half, column, **options
      )

  @pl.when(warpgroup == 0)
  def _():
    rows_of(x_smem, (values_MD, scale_dM), row, column)

  @pl.when(warpgroup == 1)
  def _():
    rows_of(x_smem.transpose((1, 0)), (values_DM, scale_mD), column, row)

  plgpu.wait_smem_to_gmem(0)


def _requantize(
  q_MD,
  scale_dM,
  values_DM,
  scale_mD,
  *,
  q_smem,
  scale_smem,
  x_smem,
  values_smem,
  scales_smem,
  full,
  ready,
  **options,
):
  """Half of the columns of a tile for each warpgroup."""
  row, column = lax.axis_index(ROW), lax.axis_index(COLUMN)
  warpgroup = lax.axis_index(WARPGROUP)

  @pl.when(warpgroup == 0)
  def _():
    rows = pl.ds(row * TILE, TILE)
    tile = q_MD.at[rows, pl.ds(column * TILE, TILE)]
    plgpu.copy_gmem_to_smem(tile, q_smem, full)
    plgpu.copy_gmem_to_smem(scale_dM.at[column, rows], scale_smem, full)

  plgpu.barrier_wait(full)
  mine = pl.ds(warpgroup * ROWS, ROWS)
  x_smem[mine, :] = _load(q_smem.at[mine, :]).astype(jnp.bfloat16)
  plgpu.barrier_arrive(ready)
  plgpu.barrier_wait(ready)
  x = _load(x_smem.transpose((1, 0)).at[mine, :])
  scale = plgpu.layout_cast(scale_smem[...], plgpu.Layout.WGMMA.reduce(0))
  x = x * lax.broadcast_in_dim(scale, x.shape, (1,))
  smem = (values_smem.at[warpgroup], scales_smem.at[warpgroup])
  _round(x, smem, (values_DM, scale_mD), 2 * column + warpgroup, row, **options)
  plgpu.wait_smem_to_gmem(0)


def _load(ref):
  x = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
  return x.astype(jnp.float32)


def _round(x, smem, outputs, row, column, *, pow2: bool, floor: float):
  """64 rows of 128: the `row`-th such rows and the `column`-th columns."""
  values_smem, scales_smem = smem
  values, scales = outputs
  amax = jnp.max(jnp.abs(x), axis=1)
  scale = reference.scale_of(amax, pow2=pow2, floor=floor, dtype=quantized.E4M3)
  inverse = lax.broadcast_in_dim(reciprocal(scale), x.shape, (0,))
  values_smem[...] = (x * inverse).astype(quantized.E4M3)
  scales_smem[...] = scale
  plgpu.commit_smem()
  rows = pl.ds(row * ROWS, ROWS)
  plgpu.copy_smem_to_gmem(
    values_smem, values.at[rows, pl.ds(column * TILE, TILE)]
  )
  plgpu.copy_smem_to_gmem(scales_smem, scales.at[column, rows])


def reciprocal(x):
  """1 / x to the nearest f32, and 0 for infinity, which times it is NaN.

  x is at least 2^-126. Of mantissas alone, so that no part is a denormal.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  exponent = bits >> 23
  mantissa = lax.bitcast_convert_type(bits - ((exponent - 127) << 23), x.dtype)
  power = lax.bitcast_convert_type(
    jnp.maximum(254 - exponent, 0) << 23, x.dtype
  )
  return refine(mantissa, 1.0 / mantissa) * power


def refine(x, quotient):
  """1 / x to the nearest, from a device's quotient that may be an ulp off.

  The residual is a sum of products of 12 by 12 bits: exact, fused or not.
  """

  def halves(x):
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(~0xFFF)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high

  (x_high, x_low), (high, low) = halves(x), halves(quotient)
  residual = 1.0 - x_high * high - x_high * low - x_low * high - x_low * low
  return quotient + quotient * residual
