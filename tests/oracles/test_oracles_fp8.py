"""The e4m3 oracle against the format's definition and two other castings."""

import ml_dtypes
import numpy as np

from . import fp8


def all_numbers():
  """Every finite e4m3 number >= 0 by its code: (-1)^s 2^(e-7) 1.m."""
  numbers = []
  for code in range(127):  # 127 is the NaN
    exponent, fraction = code >> 3, code & 7
    if exponent:
      numbers.append(2.0 ** (exponent - 7) * (1 + fraction / 8))
    else:
      numbers.append(2.0**-6 * fraction / 8)
  return np.array(numbers)


def test_the_numbers_of_the_format_stay():
  numbers = all_numbers()
  assert numbers[1] == 2.0**-9 and numbers[-1] == 448
  np.testing.assert_array_equal(fp8.round_e4m3(numbers), numbers)
  np.testing.assert_array_equal(fp8.round_e4m3(-numbers), -numbers)
  assert np.signbit(fp8.round_e4m3(-0.0))


def test_between_two_numbers_the_nearer_wins_and_a_tie_the_even_code():
  numbers = all_numbers()
  low, high = numbers[:-1], numbers[1:]
  middle = (low + high) / 2
  even = np.where(np.arange(126) % 2 == 0, low, high)
  np.testing.assert_array_equal(fp8.round_e4m3(middle), even)
  below, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
  np.testing.assert_array_equal(fp8.round_e4m3(below), low)
  np.testing.assert_array_equal(fp8.round_e4m3(above), high)


def test_beyond_the_largest_it_saturates_and_nan_stays():
  np.testing.assert_array_equal(
    fp8.round_e4m3([448.1, 465.0, 1e300, np.inf, -np.inf, np.nan]),
    [448, 448, 448, 448, -448, np.nan],
  )


def test_two_other_castings_agree(torch):
  rng = np.random.default_rng(0)
  x = rng.normal(size=20_000) * np.exp2(rng.uniform(-12, 6, 20_000))
  x = np.clip(x, -448, 448).astype(np.float32)
  want = fp8.round_e4m3(x)
  got = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  np.testing.assert_array_equal(got, want)
  got = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float64)
  np.testing.assert_array_equal(got.numpy(), want)


def test_blocks_by_hand():
  """2 x 2 blocks of a 3 x 3 matrix: scales 1, 2, 1 (of zeros) and 1/2."""
  w_IJ = np.array([[448.0, 1.0625, 896.0], [-1.2, 0.0, 3.0], [0, 0, -224.0]])
  values_IJ, scales_ij = fp8.quantize_blocks(w_IJ, (2, 2))
  np.testing.assert_array_equal(scales_ij, [[1.0, 2.0], [1.0, 0.5]])
  np.testing.assert_array_equal(
    values_IJ, [[448.0, 1.0, 448.0], [-1.25, 0.0, 1.5], [0.0, 0.0, -448.0]]
  )
  np.testing.assert_array_equal(
    fp8.dequantize_blocks(values_IJ, scales_ij, (2, 2)),
    [[448.0, 1.0, 896.0], [-1.25, 0.0, 3.0], [0.0, 0.0, -224.0]],
  )


def test_scales_are_held_where_f32_ends():
  assert fp8.block_scale(0.0) == fp8.block_scale(1e-40) == 1.0
  assert fp8.block_scale(2.0**-126) == fp8.block_scale(1e-36) == 2.0**-116
  assert fp8.block_scale(1e-30) == 1e-30 / 448
  assert fp8.block_scale(448e30) == 1e30
