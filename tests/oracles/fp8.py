"""FP8 weights in float64: e4m3 values, one scale per block (TR 3.3.2).

  w ~ value * scale,  scale = amax / 448 of the block,  value = e4m3(w / scale)

From the facts on the format and on the published checkpoint: sign, 4 exponent
bits with bias 7, 3 mantissa bits; no infinity, and the code S.1111.111 is the
NaN, so that the largest value is 2^8 * 1.75 = 448. Blocks are 128 x 128, the
partial ones at the lower and right edges padded with zeros. Released code holds
amax at 1e-4 or more when it quantises online; the layout of the checkpoint does
not ask for it, and blocks here go as low as f32 lets them.

Ours, where the facts are silent, so that nothing hangs on f32 denormals: a
block without a normal f32 number is zero, with scale 1; other scales are at
least 2^-116.

Letters: I rows, J columns, i and j their blocks.
"""

import math

import numpy as np

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-116
SMALLEST_NORMAL = 2.0**-126


def round_e4m3(x):
  """The nearest e4m3 number, ties to even; beyond 448 it is 448, NaN stays."""
  x = np.asarray(x, np.float64)
  size = np.minimum(np.abs(x), LARGEST)
  # Normals are 2^e * 1.mmm with e >= -6; below, subnormals keep the step 2^-9.
  exponent = np.maximum(np.frexp(size)[1] - 1, -6)
  step = np.exp2(exponent - 3.0)
  return np.copysign(np.rint(size / step) * step, x)


def block_scale(amax):
  """Scale of a block by its largest magnitude."""
  if amax < SMALLEST_NORMAL:
    return 1.0
  return max(amax / LARGEST, SMALLEST_SCALE)


def spread(scales_ij, shape, block=(128, 128)):
  """The scale of every element."""
  i_I = np.arange(shape[0]) // block[0]
  j_J = np.arange(shape[1]) // block[1]
  return np.asarray(scales_ij, np.float64)[i_I][:, j_J]


def block_amax(w_IJ, block=(128, 128)):
  """Largest magnitude of every zero-padded block."""
  rows, columns = np.shape(w_IJ)
  high, wide = math.ceil(rows / block[0]), math.ceil(columns / block[1])
  padded_IJ = np.zeros((high * block[0], wide * block[1]))
  padded_IJ[:rows, :columns] = w_IJ
  amax_ij = np.empty((high, wide))
  for i, j in np.ndindex(high, wide):
    top, left = i * block[0], j * block[1]
    part_IJ = padded_IJ[top : top + block[0], left : left + block[1]]
    amax_ij[i, j] = np.max(np.abs(part_IJ))
  return amax_ij


def quantize_blocks(w_IJ, block=(128, 128)):
  """values_IJ and scales_ij, in float64."""
  amax_ij = block_amax(w_IJ, block)
  scales_ij = np.array([[block_scale(a) for a in row] for row in amax_ij])
  return quantize_with(w_IJ, scales_ij, block), scales_ij


def quantize_with(w_IJ, scales_ij, block=(128, 128)):
  """values_IJ under scales that are given."""
  w_IJ = np.asarray(w_IJ, np.float64)
  return round_e4m3(w_IJ / spread(scales_ij, w_IJ.shape, block))


def dequantize_blocks(values_IJ, scales_ij, block=(128, 128)):
  """w_IJ = value * scale."""
  values_IJ = np.asarray(values_IJ, np.float64)
  return values_IJ * spread(scales_ij, values_IJ.shape, block)
