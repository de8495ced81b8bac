"""Weights that are no numbers, found by their bits.

Read as integers, floats of one sign are in order, and infinities and NaN lie on
top: the largest signed integer tells of the positive ones, the largest unsigned
one of the negative ones. Two maxima need no memory and no second pass.
"""

import ml_dtypes
import numpy as np

from dsv3_jax import errors

# The least bits without sign that are no finite number.
_FIRST = {
  np.dtype(np.float32): 0x7F80_0000,
  np.dtype(np.float16): 0x7C00,
  np.dtype(ml_dtypes.bfloat16): 0x7F80,
  np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
# Times the largest e4m3 it is still an f32.
_LARGEST_SCALE = np.float32(np.finfo(np.float32).max / 448)


def check(rows: np.ndarray, what: str, first_row: int = 0) -> None:
  """Refuses NaN and infinities.

  Args:
    rows: contiguous, of a dtype that weights have in files.
    what: file and tensor, for the error.
    first_row: of the tensor, that `rows` begin with.

  Raises:
    InputError: names the first element that is not finite.
  """
  first, bits = _FIRST[rows.dtype], rows.view(f'u{rows.dtype.itemsize}')
  sign = 1 << (8 * rows.dtype.itemsize - 1)
  signed = bits.view(f'i{rows.dtype.itemsize}')
  if not rows.size or (signed.max() < first and bits.max() < first + sign):
    return
  at = np.argwhere((bits & (sign - 1)) >= first)[0]
  kind = 'NaN' if np.isnan(rows[tuple(at)]) else 'infinity'
  at[0] += first_row
  raise errors.InputError(
    f'{what} holds a NaN or an infinity, first {kind} at {at.tolist()}'
  )


def check_scales(scales_ij: np.ndarray, what: str) -> None:
  """Refuses what no block of finite weights has as its scale.

  Raises:
    InputError: a scale is not finite, not > 0, or makes infinities.
  """
  good = (scales_ij > 0) & (scales_ij <= _LARGEST_SCALE)
  if not good.all():
    at = np.argwhere(~good)[0]
    raise errors.InputError(
      f'{what} holds the scale {scales_ij[tuple(at)]} at {at.tolist()}: it '
      f'must be > 0 and at most {_LARGEST_SCALE:.3g}'
    )
