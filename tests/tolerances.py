"""The one table of tolerances, and how errors are measured against it.

An error is relative to the largest magnitude of the wanted array: entries that
cancel to almost nothing are not held to more digits than their terms have.
"""

import numpy as np

TOLERANCE = {'float64': 1e-12, 'float32': 2e-5, 'bfloat16': 3e-2}


def assert_close(got, want, dtype='float32'):
  """Raises unless max |got - want| <= TOLERANCE[dtype] * max |want|."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, f'shape {got.shape}, wanted {want.shape}'
  if not want.size:
    return
  atol = TOLERANCE[dtype] * np.max(np.abs(want))
  np.testing.assert_allclose(got, want, rtol=0.0, atol=atol)


def assert_trees_close(got, want, dtype='float32'):
  """`assert_close` for every leaf of two nested dicts of arrays."""
  assert got.keys() == want.keys()
  for key in want:
    if isinstance(want[key], dict):
      assert_trees_close(got[key], want[key], dtype)
    else:
      assert_close(got[key], want[key], dtype)
