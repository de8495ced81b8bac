"""Formats, scales, tiles and packing: all codes, other castings, by hand."""

import ml_dtypes
import numpy as np
import pytest

from . import fp8, fp8_formats
from .fp8_formats import E4M3, E5M2, E5M6

# Number of finite codes >= 0: e4m3 has one NaN, the others a top exponent.
FINITE = [(E4M3, 127), (E5M2, 31 * 4), (E5M6, 31 * 64)]


@pytest.mark.parametrize(('form', 'count'), FINITE)
def test_all_numbers_of_a_format(form, count):
  """Stay, come back from their code, and lie in the order of their codes."""
  code = np.arange(count)
  numbers = fp8_formats.decode(code, form)
  assert numbers[0] == 0 and numbers[-1] == form.largest
  assert numbers[1] == 2.0 ** (1 - form.bias - form.mantissa_bits)
  assert np.all(np.diff(numbers) > 0)
  sign = 1 << (form.bits - 1)
  np.testing.assert_array_equal(fp8_formats.decode(code + sign, form), -numbers)
  for signed, codes in ((numbers, code), (-numbers, code + sign)):
    np.testing.assert_array_equal(fp8_formats.round_to(signed, form), signed)
    np.testing.assert_array_equal(fp8_formats.encode(signed, form), codes)


@pytest.mark.parametrize(('form', 'count'), FINITE)
def test_between_two_numbers_the_nearer_wins_and_a_tie_the_even_code(
  form, count
):
  numbers = fp8_formats.decode(np.arange(count), form)
  low, high = numbers[:-1], numbers[1:]
  middle = (low + high) / 2
  even = np.where(np.arange(count - 1) % 2 == 0, low, high)
  got = fp8_formats.round_to(middle, form)
  np.testing.assert_array_equal(got, even)
  got = fp8_formats.round_to(np.nextafter(middle, 0), form)
  np.testing.assert_array_equal(got, low)
  got = fp8_formats.round_to(np.nextafter(middle, np.inf), form)
  np.testing.assert_array_equal(got, high)


@pytest.mark.parametrize(('form', 'count'), FINITE)
def test_a_search_for_the_nearest_agrees(form, count):
  """Brute force: the number with the least distance, over all of them."""
  rng = np.random.default_rng(count)
  powers = np.exp2(rng.uniform(-24, np.log2(form.largest), 2_000))
  x = np.concatenate([rng.normal(size=2_000), powers, [0, 1e9, -np.inf]])
  numbers = fp8_formats.decode(np.arange(count), form)
  size = np.minimum(np.abs(x), form.largest)
  nearest = numbers[np.argmin(np.abs(size[:, None] - numbers), axis=1)]
  want = np.copysign(nearest, x)
  np.testing.assert_array_equal(fp8_formats.round_to(x, form), want)
  assert np.isnan(fp8_formats.round_to(np.nan, form))


def test_e5m6_by_hand():
  pairs = [
    (1 + 1 / 64, 1 + 1 / 64),
    (1 + 1 / 128, 1.0),  # a tie
    (1 + 3 / 128, 1 + 2 / 64),  # a tie
    (65024.0, 65024.0),
    (65279.0, 65024.0),
    (1e6, 65024.0),
    (2.0**-20, 2.0**-20),
    (2.0**-21, 0.0),  # a tie with zero
    (1.5 * 2.0**-20, 2.0**-19),
    (-(2.0**-14) * (1 - 2**-9), -(2.0**-14)),  # up into the normals
  ]
  x, want = np.array(pairs).T
  np.testing.assert_array_equal(fp8_formats.round_to(x, E5M6), want)
  code = fp8_formats.encode([1.0, -2.0, 2.0**-20, 65024.0], E5M6)
  assert code.tolist() == [15 << 6, 1 << 11 | 16 << 6, 1, 30 << 6 | 63]


def test_other_castings_agree(torch):
  rng = np.random.default_rng(0)
  x = rng.normal(size=20_000) * np.exp2(rng.uniform(-22, 14, 20_000))
  x = x.astype(np.float32)
  for form, ours, theirs in (
    (E4M3, ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2, torch.float8_e5m2),
  ):
    inside = np.clip(x, -form.largest, form.largest)
    want = fp8_formats.round_to(x, form)
    got = inside.astype(ours).astype(np.float64)
    np.testing.assert_array_equal(got, want)
    got = torch.from_numpy(inside).to(theirs).to(torch.float64).numpy()
    np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(
    fp8_formats.round_to(x, E4M3), fp8.round_e4m3(x)
  )


def test_codes_of_the_eight_bit_formats_are_those_of_ml_dtypes():
  for form, dtype in (
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
  ):
    numbers = np.arange(256).astype(np.uint8).view(dtype).astype(np.float64)
    finite = np.isfinite(numbers)
    codes = fp8_formats.encode(numbers[finite], form)
    np.testing.assert_array_equal(codes, np.arange(256)[finite])
    np.testing.assert_array_equal(
      fp8_formats.decode(codes, form), numbers[finite]
    )


def test_an_eight_bit_mantissa_is_not_e5m6():
  """Between E5M6 and f16: all E5M6 numbers are f16, with the last bits 0."""
  numbers = fp8_formats.decode(np.arange(31 * 64), E5M6)
  half = numbers.astype(np.float16)
  np.testing.assert_array_equal(half.astype(np.float64), numbers)
  np.testing.assert_array_equal(half.view(np.uint16) >> 4, np.arange(31 * 64))
  np.testing.assert_array_equal(half.view(np.uint16) & 15, 0)


@pytest.mark.parametrize('count', [0, 1, 2, 3, 128, 4095, 4096])
def test_twelve_bits_come_back(count):
  codes = np.random.default_rng(count).permutation(4096)[:count]
  bytes_ = fp8_formats.pack12(codes)
  assert bytes_.dtype == np.uint8 and len(bytes_) == 3 * -(-count // 2)
  got = fp8_formats.unpack12(bytes_, count)
  np.testing.assert_array_equal(got, codes)


def test_power_of_two_scales_are_the_least_that_hold_the_tile():
  """By search over all powers, on both sides of every border."""
  rng = np.random.default_rng(0)
  powers = np.exp2(np.arange(-116, 129.0))
  for form in (E4M3, E5M2, E5M6):
    borders = form.largest * np.exp2(rng.integers(-90, 100, 40).astype(float))
    amax = [
      *borders,
      *np.nextafter(borders, 0),
      *np.nextafter(borders, np.inf),
      *np.exp2(rng.uniform(-100, 127, 200)),
      2.0**-126,
      float(np.finfo(np.float32).max),
    ]
    for a in amax:
      want = powers[np.argmax(a <= form.largest * powers)]
      got = fp8_formats.scale_of(a, fp8_formats.Scaling(pow2=True), form)
      assert got == want
      plain = fp8_formats.scale_of(a, form=form)
      assert plain <= got < 2 * plain or got == 2.0**-116


def test_scales_by_hand():
  pow2 = fp8_formats.Scaling(pow2=True)
  floor = fp8_formats.Scaling(floor=1e-4)
  both = fp8_formats.Scaling(pow2=True, floor=1e-4)
  assert fp8_formats.scale_of(448.0, pow2) == 1.0
  assert fp8_formats.scale_of(np.nextafter(448.0, 449), pow2) == 2.0
  assert fp8_formats.scale_of(225.0, pow2) == 1.0
  assert fp8_formats.scale_of(224.0, pow2) == 0.5
  for scaling in (fp8_formats.PLAIN, pow2):
    assert fp8_formats.scale_of(0.0, scaling) == 1.0
    assert fp8_formats.scale_of(2.0**-127, scaling) == 1.0
    assert fp8_formats.scale_of(2.0**-126, scaling) == 2.0**-116
  assert fp8_formats.scale_of(0.0, floor) == 1e-4 / 448
  assert fp8_formats.scale_of(1e-5, floor) == 1e-4 / 448
  assert fp8_formats.scale_of(2e-4, floor) == 2e-4 / 448
  # 448 * 2^-23 is 5.3e-5, too small; 448 * 2^-22 is 1.07e-4.
  assert fp8_formats.scale_of(0.0, both) == 2.0**-22


@pytest.mark.parametrize('shape', [(1, 1), (3, 300), (130, 128), (257, 129)])
@pytest.mark.parametrize(
  'tile', [fp8_formats.ROW, fp8_formats.COLUMN, fp8_formats.BLOCK]
)
def test_every_tile_has_its_own_scale(shape, tile):
  """The scale of each element is that of its tile, found element by element."""
  rng = np.random.default_rng(0)
  x_IJ = rng.normal(size=shape) * np.exp2(rng.integers(-9, 9, shape))
  values_IJ, scales_ij = fp8_formats.quantize(x_IJ, tile)
  assert scales_ij.shape == (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
  top_ij = np.zeros(scales_ij.shape)
  for i, j in np.ndindex(shape):
    at = i // tile[0], j // tile[1]
    top_ij[at] = max(top_ij[at], abs(x_IJ[i, j]))
  np.testing.assert_array_equal(scales_ij, top_ij / 448)
  for i, j in zip(*(rng.integers(0, n, 50) for n in shape), strict=True):
    scale = scales_ij[i // tile[0], j // tile[1]]
    assert values_IJ[i, j] == fp8.round_e4m3(x_IJ[i, j] / scale)


def test_blocks_are_those_of_the_checkpoint_oracle():
  w_IJ = np.random.default_rng(0).normal(size=(200, 300))
  want = fp8.quantize_blocks(w_IJ)
  got = fp8_formats.quantize(w_IJ, fp8_formats.BLOCK)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g, w)


def test_powers_of_two_avoid_the_second_rounding():
  """What 1 x 128 under powers of two holds, 128 x 1 holds too, mostly.

  A value changes only where the column's scale is the larger one and pushes
  it into the subnormals; otherwise the mantissa stays. Plain scales change
  most values.
  """
  x_IJ = np.random.default_rng(0).normal(size=(128, 256))
  pow2 = fp8_formats.Scaling(pow2=True)
  changed = []
  for scaling in (pow2, fp8_formats.PLAIN):
    first_IJ = fp8_formats.fake(x_IJ, fp8_formats.ROW, scaling)
    second_IJ = fp8_formats.fake(first_IJ, fp8_formats.COLUMN, scaling)
    changed.append(np.mean(first_IJ != second_IJ))
  assert changed[0] < 0.02 and changed[1] > 0.5


def test_the_e5m6_copy_by_hand():
  """Scale 2 of the row's amax 500: 3 becomes 1.5, 1.9 the 64ths' nearest."""
  x_IJ = np.array([[500.0, 3.0, 1.9], [1.0, 0.0, 3e-9]])
  got_IJ = fp8_formats.e5m6_copy(x_IJ)
  # 1 / 2^-8 = 256; 3e-9 / 2^-8 = 7.7e-7 lies below 2^-20 but above its half.
  want_IJ = [[500.0, 3.0, 2 * 61 / 64], [1.0, 0.0, 2.0**-28]]
  np.testing.assert_array_equal(got_IJ, want_IJ)
