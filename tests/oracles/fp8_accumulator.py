"""The tensor cores' accumulator of limited precision (TR 3.3.2, 3.5.2).

  one instruction takes 32 products and the running register; all are aligned
  to the largest exponent among them, of each the highest 14 bits from there on
  are kept and the rest is cut off (towards zero); they are added exactly, and
  of the sum again the highest 14 bits are the new register.

  promotion: every N_C = 128 products the register is added, times the scales
  of its operands, to an f32 number, and starts at zero again.

Aligned is by the exponent of the value, floor(log2 |x|), and "the highest 14
bits" count the leading one: 13 bits of fraction. Numbers of every step are
multiples of one power of two with few bits, so float64 is exact here.

From the facts alone. Letters: M rows, N columns, K summed, W products of one
instruction.
"""

import numpy as np

CHUNK, BITS, PROMOTE = 32, 14, 128
NOTHING = -(2**20)  # exponent of zero


def exponents(x):
  """floor(log2 |x|); of zero something lower than all."""
  return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def truncate(x, exponent, bits):
  """Multiples of 2^(exponent - bits + 1), towards zero."""
  step = np.where(exponent == NOTHING, 1.0, np.exp2(exponent - bits + 1.0))
  return np.trunc(x / step) * step


def add_products(register_MN, products_MNW, bits=BITS):
  """The register after one instruction."""
  terms_MNW = np.concatenate([register_MN[..., None], products_MNW], axis=-1)
  exponent_MN1 = np.max(exponents(terms_MNW), axis=-1, keepdims=True)
  sum_MN = np.sum(truncate(terms_MNW, exponent_MN1, bits), axis=-1)
  return truncate(sum_MN, exponents(sum_MN), bits)


def accumulate(a_MK, b_KN, bits=BITS, chunk=CHUNK):
  """a b as one register per entry would leave it, from zero to the end."""
  register_MN = np.zeros((len(a_MK), b_KN.shape[1]))
  for start in range(0, a_MK.shape[1], chunk):
    a_M1W = a_MK[:, None, start : start + chunk]
    b_NW = b_KN[start : start + chunk].T
    register_MN = add_products(register_MN, a_M1W * b_NW, bits)
  return register_MN


def matmul(a_MK, b_KN, scale_Mk=None, scale_kN=None, bits=BITS, every=PROMOTE):
  """a b with promotion to f32 every so many products, or never (0).

  Args:
    a_MK, b_KN: values of FP8.
    scale_Mk, scale_kN: of each part of `every` products; ones if None. Their
      product, its product with the register and the sum are rounded to f32.
      Without promotion there is one scale per row and column, k = 1.
  """
  a_MK, b_KN = np.asarray(a_MK, np.float64), np.asarray(b_KN, np.float64)
  length = a_MK.shape[1]
  every = every or length
  parts = -(-length // every)
  scale_Mk = np.ones((len(a_MK), parts)) if scale_Mk is None else scale_Mk
  scale_kN = np.ones((parts, b_KN.shape[1])) if scale_kN is None else scale_kN
  total_MN = np.zeros((len(a_MK), b_KN.shape[1]), np.float32)
  for k in range(parts):
    part = slice(k * every, (k + 1) * every)
    register_MN = accumulate(a_MK[:, part], b_KN[part], bits)
    scale_MN = np.float32(scale_Mk[:, k, None]) * np.float32(scale_kN[k])
    total_MN += np.float32(register_MN) * scale_MN
  return total_MN


def errors(got_MN, exact_MN):
  """How far off, by four measures.

  Returns:
    largest |error| over the root mean square of the exact product, over its
    mean magnitude, and over its largest one; the largest |error| / |exact|
    among entries that are not small (|exact| >= their root mean square).
  """
  error_MN = np.abs(np.asarray(got_MN, np.float64) - exact_MN)
  size_MN = np.abs(exact_MN)
  rms = np.sqrt(np.mean(exact_MN**2))
  large_MN = size_MN >= rms
  return {
    'of_rms': np.max(error_MN) / rms,
    'of_mean': np.max(error_MN) / np.mean(size_MN),
    'of_max': np.max(error_MN) / np.max(size_MN),
    'of_large': np.max(error_MN[large_MN] / size_MN[large_MN]),
  }
