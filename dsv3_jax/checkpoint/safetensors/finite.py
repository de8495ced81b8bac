"""Checks that weights are finite, by their bits.

The bits of floats of one sign, read as integers, sort like the floats, with
infinities and NaN above all others. So the maximum of the bits as signed
integers finds positive ones, the maximum as unsigned integers negative ones.
Two maxima need no temporaries.
"""

import ml_dtypes
import numpy as np

from dsv3_jax import errors

# The smallest bits, without the sign, of a value that is not finite.
_FIRST = {
  np.dtype(np.float32): 0x7F80_0000,
  np.dtype(np.float16): 0x7C00,
  np.dtype(ml_dtypes.bfloat16): 0x7F80,
  np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
# Its product with the largest e4m3 is still finite in f32.
_LARGEST_SCALE = np.float32(np.finfo(np.float32).max / 448)


def check(rows: np.ndarray, what: str, first_row: int = 0) -> None:
  """Refuses NaN and infinities.

  Args:
    rows: contiguous, of a float dtype of `header.DTYPES`.
    what: file and tensor, for the error message.
    first_row: index of the first row in the tensor.

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
  """Refuses scales that no block of finite weights has.

  Raises:
    InputError: a scale is not finite, not > 0, or so large that e4m3 values
      times the scale overflow.
  """
  good = (scales_ij > 0) & (scales_ij <= _LARGEST_SCALE)
  if not good.all():
    at = np.argwhere(~good)[0]
    raise errors.InputError(
      f'{what} holds the scale {scales_ij[tuple(at)]} at {at.tolist()}: it '
      f'must be > 0 and at most {_LARGEST_SCALE:.3g}'
    )
