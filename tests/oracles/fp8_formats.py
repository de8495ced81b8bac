"""Formats, scales and tiles of FP8 training in float64 (TR 3.3).

  e4m3  sign, 4 exponent bits (bias 7), 3 mantissa bits; largest 448
  e5m2  sign, 5 (bias 15), 2; as IEEE, the top exponent is taken; 57344
  e5m6  sign, 5 (bias 15), 6; likewise; 65024. 12 bits, two in three bytes

  x ~ value * scale,  scale = max(amax of the tile, floor) / largest,  or the
  least power of two that is not below that quotient (UE8M0, TR 3.3.3)

From the facts alone. Tiles are (rows, columns): 1 x 128 for activations and
their gradients, 128 x 1 for the same along tokens, 128 x 128 for weights; the
ones at the lower and right edges are as small as they must be.

Ours, where the facts are silent: a tile whose amax is no normal f32 number has
scale 1; other scales are at least 2^-116. How two numbers of 12 bits lie in
three bytes is not published; here the first one has the lower bits.

Letters: I rows, J columns, i and j their tiles.
"""

import math
from typing import NamedTuple

import numpy as np

from . import fp8


class Format(NamedTuple):
  exponent_bits: int
  bias: int
  mantissa_bits: int
  largest: float

  @property
  def bits(self):
    return 1 + self.exponent_bits + self.mantissa_bits


E4M3 = Format(4, 7, 3, 448.0)
E5M2 = Format(5, 15, 2, 57344.0)
E5M6 = Format(5, 15, 6, 65024.0)


class Scaling(NamedTuple):
  """How a tensor gets its scales: as powers of two, from amax >= floor."""

  pow2: bool = False
  floor: float = 0.0


PLAIN = Scaling()
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)


def round_to(x, form):
  """The nearest number of a format, ties to even, saturating; NaN stays."""
  x = np.asarray(x, np.float64)
  size = np.minimum(np.abs(x), form.largest)
  exponent = np.maximum(np.frexp(size)[1] - 1, 1 - form.bias)
  step = np.exp2(exponent - float(form.mantissa_bits))
  return np.copysign(np.rint(size / step) * step, x)


def decode(code, form):
  """The number of a finite code: (-1)^s 2^(e - bias) 1.m, or subnormal."""
  code = np.asarray(code, np.int64)
  fraction = code % 2**form.mantissa_bits
  exponent = code >> form.mantissa_bits
  negative = exponent >> form.exponent_bits
  exponent = exponent % 2**form.exponent_bits
  normal = (exponent > 0).astype(np.int64)
  power = np.exp2(np.maximum(exponent, 1) - form.bias - 0.0)
  size = power * (normal + fraction / 2.0**form.mantissa_bits)
  return np.where(negative > 0, -size, size)


def encode(x, form):
  """The code of numbers that are already of the format."""
  x = np.asarray(x, np.float64)
  size = np.abs(x)
  exponent = np.maximum(np.frexp(size)[1] - 1, 1 - form.bias)
  mantissa = size / np.exp2(exponent - float(form.mantissa_bits))
  normal = mantissa >= 2**form.mantissa_bits
  code = np.where(normal, exponent + form.bias - 1, 0) * 2**form.mantissa_bits
  code = code + mantissa.astype(np.int64)
  assert np.all(mantissa == np.floor(mantissa))
  return code + (np.signbit(x).astype(np.int64) << (form.bits - 1))


def pack12(code_J):
  """Three bytes for every two codes of 12 bits; an odd one gets a zero."""
  code_J = np.asarray(code_J, np.int64)
  code_J = np.concatenate([code_J, np.zeros(len(code_J) % 2, np.int64)])
  first, second = code_J[0::2], code_J[1::2]
  word = first + (second << 12)
  bytes_ = np.stack([word & 255, word >> 8 & 255, word >> 16], axis=-1)
  return bytes_.reshape(-1).astype(np.uint8)


def unpack12(bytes_, count):
  """The first `count` codes that `pack12` packed."""
  triple = np.asarray(bytes_, np.int64).reshape(-1, 3)
  word = triple[:, 0] + (triple[:, 1] << 8) + (triple[:, 2] << 16)
  return np.stack([word & 4095, word >> 12], axis=-1).reshape(-1)[:count]


def scale_of(amax, scaling=PLAIN, form=E4M3):
  """Scale of a tile by its largest magnitude."""
  amax = max(float(amax), scaling.floor)
  if amax < fp8.SMALLEST_NORMAL:
    return 1.0
  if not scaling.pow2:
    return max(amax / form.largest, fp8.SMALLEST_SCALE)
  # Fractions of 2 in [0.5, 1): no quotient, hence no rounding, is involved.
  fraction, exponent = math.frexp(amax)
  largest, top = math.frexp(form.largest)
  power = exponent - top + (fraction > largest)
  return max(math.ldexp(1.0, power), fp8.SMALLEST_SCALE)


def quantize(x_IJ, tile, scaling=PLAIN, form=E4M3):
  """values_IJ of the format and the scales_ij of the tiles."""
  x_IJ = np.asarray(x_IJ, np.float64)
  high, wide = (math.ceil(n / t) for n, t in zip(x_IJ.shape, tile, strict=True))
  scales_ij = np.empty((high, wide))
  for i, j in np.ndindex(high, wide):
    rows = slice(i * tile[0], (i + 1) * tile[0])
    columns = slice(j * tile[1], (j + 1) * tile[1])
    amax = np.max(np.abs(x_IJ[rows, columns]))
    scales_ij[i, j] = scale_of(amax, scaling, form)
  scale_IJ = fp8.spread(scales_ij, x_IJ.shape, tile)
  return round_to(x_IJ / scale_IJ, form), scales_ij


def fake(x_IJ, tile, scaling=PLAIN, form=E4M3):
  """What is left of an array that is quantised and dequantised."""
  values_IJ, scales_ij = quantize(x_IJ, tile, scaling, form)
  return fp8.dequantize_blocks(values_IJ, scales_ij, tile)


def e5m6_copy(x_IJ):
  """The 12-bit copy of TR 3.3.3 under the power-of-two scales of e4m3."""
  _, scales_ij = quantize(x_IJ, ROW, Scaling(pow2=True))
  scale_IJ = fp8.spread(scales_ij, np.shape(x_IJ), ROW)
  return round_to(np.asarray(x_IJ, np.float64) / scale_IJ, E5M6) * scale_IJ
