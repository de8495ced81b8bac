"""FP8 (e4m3) block quantisation of host arrays, for files (TR 3.3.2).

  scale = amax / 448 of the tile        value = e4m3(w * (1 / scale))
  w ~ value * scale                     |error| <= max(|w| / 17, scale / 1024)

The bound holds up to the rounding of f32. Weights have tiles of 128 x 128, as
in the published checkpoint, which calls the scales `weight_scale_inv`. Partial
tiles at the lower and right edges are padded with zeros. Unlike in released
code, amax is not clamped to 1e-4, so that tiny weights keep their digits.

The functions equal `pallas_kernels.fp8_matmul.reference` bit for bit, on NumPy
arrays; see there for zeros, denormals and the largest numbers. XLA compiles a
division by a broadcast or a constant to a multiplication by the reciprocal, so
this module multiplies by reciprocals, too.

Letters: M rows, N columns, m and n their tiles.
"""

import numpy as np
from jaxtyping import Float8e4m3fn, Float32

from dsv3_jax import errors
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import reference

Quantized = quantized.Quantized
E4M3 = quantized.E4M3
TILE = quantized.BLOCK

_INVERSE = np.float32(1.0 / 448.0)  # of the largest e4m3
# A table of all 256 codes: three times as fast as a cast.
_DECODED = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def quantize_host(
  w_MN: Float32[np.ndarray, 'M N'], name: str
) -> tuple[Float8e4m3fn[np.ndarray, 'M N'], Float32[np.ndarray, 'm n']]:
  """Quantises each block under its own scale: values_MN and scales_mn.

  Args:
    name: of the tensor, for the error message.
  Raises:
    InputError: a number is NaN or infinite.
  """
  (rows, columns), (high, wide) = w_MN.shape, TILE
  values_MN = np.empty(w_MN.shape, E4M3)
  scales_mn = np.empty((-(-rows // high), -(-columns // wide)), np.float32)
  # In bands of 128 rows, whose temporaries stay in the cache.
  for i, top in enumerate(range(0, rows, high)):
    band_MN = w_MN[top : top + high]
    amax_N = np.max(np.abs(band_MN), axis=0)
    if not np.all(np.isfinite(amax_N)):
      row, column = np.argwhere(~np.isfinite(band_MN))[0]
      raise errors.InputError(
        f'{name} holds a NaN or an infinity, first in row {top + row}, column '
        f'{column}: a tensor must be finite to be stored in FP8'
      )
    amax_N = np.pad(amax_N, (0, -columns % wide))
    scales_mn[i] = _scales(np.max(amax_N.reshape(-1, wide), axis=1))
    inverse_N = np.repeat(np.float32(1.0) / scales_mn[i], wide)[:columns]
    values_MN[top : top + high] = band_MN * inverse_N
  return values_MN, scales_mn


def dequantize_host(
  values_MN: Float8e4m3fn[np.ndarray, 'M N'],
  scales_mn: Float32[np.ndarray, 'm n'],
  first_row: int = 0,
) -> Float32[np.ndarray, 'M N']:
  """Dequantises a tensor, or some of its rows, to f32.

  Args:
    values_MN: rows from `first_row` of the tensor, any number of them.
    scales_mn: of the whole tensor.
  Raises:
    ValueError: there are too few scales.
  """
  (rows, columns), (high, wide) = values_MN.shape, TILE
  end = first_row + rows
  want = (-(-end // high), -(-columns // wide))
  if scales_mn.shape[0] < want[0] or scales_mn.shape[1] != want[1]:
    raise ValueError(
      f'scales_mn.shape={scales_mn.shape} must be at least {want[0]} by '
      f'{want[1]} for rows {first_row} to {end} of {columns} columns'
    )
  out_MN = np.empty(values_MN.shape, np.float32)
  codes_MN = values_MN.view(np.uint8)
  for i in range(first_row // high, want[0]):
    top, stop = max(i * high - first_row, 0), (i + 1) * high - first_row
    band_MN = out_MN[top:stop]
    np.take(_DECODED, codes_MN[top:stop], out=band_MN, mode='clip')
    band_MN *= np.repeat(scales_mn[i], wide)[:columns]
  return out_MN


def _scales(amax_mn):
  """Scales of blocks by their largest magnitudes."""
  held_mn = np.maximum(amax_mn * _INVERSE, reference.SMALLEST_SCALE)
  return np.where(amax_mn < reference.SMALLEST_NORMAL, np.float32(1.0), held_mn)
