"""Error measures of kernels, and the bound of each kind of result."""

import numpy as np

# Largest `difference` from the exact product of the *unquantised* operands
# that an FP8 product may have (the measure and bound of DeepGEMM's own tests).
FP8_DIFFERENCE = 1e-3
# Relative to the largest magnitude of the wanted array, when two
# implementations multiply the same quantised operands: f32 sums in another
# order, then the output's own rounding.
SAME_OPERANDS = {'float32': 1e-5, 'bfloat16': 8e-3}


def difference(got, want) -> float:
  """1 - 2 <x, y> / (|x|^2 + |y|^2) in f64; 0 for two arrays of zeros."""
  got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
  norms = got @ got + want @ want
  return 1.0 - 2.0 * (got @ want) / norms if norms else 0.0


def scale_and_direction(got, want) -> tuple[float, float]:
  """|<x, y> / <y, y> - 1| and 1 - cosine in f64; zeros equal zeros."""
  got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
  if not got.any() and not want.any():
    return 0.0, 0.0
  inner, square = got @ want, want @ want
  length = np.sqrt(got @ got) * np.sqrt(square)
  if not length:
    return np.inf, 1.0
  return float(abs(inner / square - 1.0)), float(1.0 - inner / length)


def relative_error(got, want) -> float:
  """Largest |got - want| over the largest |want|."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  largest = np.max(np.abs(want), initial=0.0)
  return float(np.max(np.abs(got - want), initial=0.0) / max(largest, 1e-300))
