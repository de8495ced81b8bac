"""FP8 tiles: the oracle's numbers, the format's error, the host's same bits.

The jnp functions are those of the kernels' reference, at weights' tiles.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.checkpoint import fp8_blocks
from pallas_kernels.fp8_matmul import reference
from tests.oracles import fp8 as oracle


def quantize_blocks(w, tile=fp8_blocks.TILE):
  return reference.quantize(w, tile)


quantize = jax.jit(quantize_blocks, static_argnames='tile')
dequantize = jax.jit(reference.dequantize, static_argnames='dtype')

SIZES = [(1, 1), (1, 300), (300, 1), (127, 129), (128, 256), (257, 131)]
F32 = np.finfo(np.float32)


def draw(seed, shape, low=-38.0, high=38.0):
  """Tiles of all magnitudes; zeros, denormals and wide ranges within some."""
  rng = np.random.default_rng(seed)
  tiles = [-(-size // 128) for size in shape]
  scales_ij = 10.0 ** rng.uniform(low, high, tiles)
  kinds_ij = rng.integers(0, 6, tiles)
  scales_ij[kinds_ij == 0] = 0.0
  scales_ij[kinds_ij == 1] = 1e-40  # denormal
  w_IJ = rng.normal(size=shape)
  wide_IJ = 10.0 ** rng.uniform(-40, 0, shape)
  kinds_IJ = oracle.spread(kinds_ij, shape)
  w_IJ = np.where(kinds_IJ == 2, w_IJ * wide_IJ, w_IJ)
  w_IJ *= oracle.spread(scales_ij, shape)
  return np.clip(w_IJ, -F32.max, F32.max).astype(np.float32)


def bits(x):
  """The codes: as numbers, 0 equals -0, and NaN not itself."""
  x = np.asarray(x)
  return x.view(f'u{x.dtype.itemsize}')


def assert_same_bits(got, want):
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(bits(got), bits(want))


def assert_nearest(w_IJ, values_IJ, scales_ij, block=(128, 128)):
  """Values are the oracle's; a tie of f32's two roundings may go either way.

  Scales are within one ulp of f32(amax / 448): a product with f32(1 / 448).
  """
  w_IJ = np.asarray(w_IJ, np.float64)
  want_ij = np.float32(oracle.quantize_blocks(w_IJ, block)[1])
  assert np.all(np.abs(scales_ij - want_ij) <= np.spacing(want_ij))
  scales_IJ = oracle.spread(scales_ij, w_IJ.shape, block)
  exact_IJ = w_IJ / scales_IJ
  want_IJ = oracle.quantize_with(w_IJ, scales_ij, block)
  values_IJ = np.asarray(values_IJ).astype(np.float64)
  excess_IJ = np.abs(values_IJ - exact_IJ) - np.abs(want_IJ - exact_IJ)
  tie_IJ = np.abs(excess_IJ) <= 2.0**-22 * np.abs(exact_IJ)
  assert np.all((values_IJ == want_IJ) | tie_IJ)
  # Two nearest numbers are within a step: a tie is not an excuse for more.
  assert np.mean(values_IJ != want_IJ) < 1e-4


def assert_within_the_format(w_IJ, got_IJ, scales_ij, block=(128, 128)):
  """Half a step: 1/17 of w just above a power of two, or 2^-10 of the scale."""
  w_IJ = np.asarray(w_IJ, np.float64)
  got_IJ = np.asarray(got_IJ, np.float64)
  assert np.all(np.isfinite(got_IJ))
  scales_IJ = oracle.spread(scales_ij, w_IJ.shape, block)
  subnormal_IJ = scales_IJ * 2.0**-10
  # A tile of denormals is zero under scale 1, which says nothing of it.
  amax_IJ = oracle.spread(oracle.block_amax(w_IJ, block), w_IJ.shape, block)
  subnormal_IJ = np.where(amax_IJ < F32.tiny, F32.tiny, subnormal_IJ)
  bound_IJ = np.maximum(np.abs(w_IJ) / 17, subnormal_IJ)
  assert np.all(np.abs(got_IJ - w_IJ) <= bound_IJ + 2.0**-21 * np.abs(w_IJ))


@pytest.mark.parametrize('shape', SIZES)
@pytest.mark.parametrize('seed', range(3))
def test_matches_the_oracle(shape, seed):
  w_IJ = draw(seed, shape)
  q = quantize(w_IJ)
  assert q.values.dtype == fp8_blocks.E4M3 and q.scales.dtype == jnp.float32
  assert q.shape == shape
  assert_nearest(w_IJ, q.values, q.scales)
  got_IJ = dequantize(q)
  want_IJ = oracle.dequantize_blocks(q.values, q.scales)
  np.testing.assert_array_equal(got_IJ, np.float32(want_IJ))
  assert_within_the_format(w_IJ, got_IJ, q.scales)


@hypothesis.given(
  st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 300)
)
def test_odd_sizes_and_all_magnitudes_match_the_oracle(seed, rows, columns):
  w_IJ = draw(seed, (rows, columns))
  values_IJ, scales_ij = fp8_blocks.quantize_host(w_IJ, 'w')
  assert_nearest(w_IJ, values_IJ, scales_ij)
  got_IJ = fp8_blocks.dequantize_host(values_IJ, scales_ij)
  assert_within_the_format(w_IJ, got_IJ, scales_ij)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
  st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    min_size=45,
    max_size=45,
  )
)
def test_any_numbers_in_small_tiles(numbers):
  w_IJ = np.array(numbers, np.float32).reshape(5, 9)
  q = quantize(w_IJ, tile=(2, 4))
  assert q.scales.shape == (3, 3)
  assert_nearest(w_IJ, q.values, q.scales, (2, 4))
  assert_within_the_format(w_IJ, dequantize(q), q.scales, (2, 4))


@pytest.mark.parametrize('power', [-116, -60, -1, 0, 7, 100, 119])
def test_exact_where_f32_is(power):
  """All numbers and all ties under a scale of 2^power: the oracle's bits."""
  numbers = (
    np.arange(127, dtype=np.uint8).view(fp8_blocks.E4M3).astype(np.float64)
  )
  numbers = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
  numbers = np.resize(numbers, (2, 128))  # one tile
  w_IJ = np.float32(np.concatenate([numbers, -numbers]) * 2.0**power)
  want_IJ, want_ij = oracle.quantize_blocks(w_IJ)
  assert np.all(np.log2(want_ij) == power)
  q = quantize(w_IJ)
  np.testing.assert_array_equal(q.scales, want_ij)
  assert_same_bits(np.asarray(q.values), want_IJ.astype(fp8_blocks.E4M3))


def test_the_bound_is_the_formats():
  """Midway above 2^e the error is 1/17, midway to 2^-9 it is scale / 1024."""
  w_IJ = np.float32([[448.0, 1.0625, 2.0**-10]])
  got_IJ = np.asarray(dequantize(quantize(w_IJ)))
  np.testing.assert_array_equal(got_IJ, [[448.0, 1.0, 0.0]])
  assert (w_IJ - got_IJ)[0, 1] / w_IJ[0, 1] == np.float32(1 / 17)


def test_where_f32_ends():
  for amax, scale in [
    (0.0, 1.0),
    (1e-45, 1.0),  # denormal
    (F32.tiny, 2.0**-116),
    (1e-36, 2.0**-116),
    (F32.max, F32.max / 448),
  ]:
    w_IJ = np.float32([[amax, -amax / 2]])
    q = quantize(w_IJ)
    assert q.scales == scale
    assert_within_the_format(w_IJ, dequantize(q), q.scales)


@pytest.mark.parametrize('shape', SIZES)
@pytest.mark.parametrize('seed', range(3))
def test_the_hosts_functions_give_the_same_bits(shape, seed):
  w_IJ = draw(seed, shape)
  q = quantize(w_IJ)
  values_IJ, scales_ij = fp8_blocks.quantize_host(w_IJ, 'w')
  assert_same_bits(values_IJ, np.asarray(q.values))
  assert_same_bits(scales_ij, np.asarray(q.scales))
  got_IJ = fp8_blocks.dequantize_host(values_IJ, scales_ij)
  assert_same_bits(got_IJ, np.asarray(dequantize(q)))
  transposed = np.ascontiguousarray(w_IJ.T).T  # as export passes it
  assert_same_bits(fp8_blocks.quantize_host(transposed, 'w')[0], values_IJ)


def test_the_hosts_functions_break_ties_alike():
  """Numbers an ulp or less from a tie, where a quotient would round apart."""
  rng = np.random.default_rng(6)
  scales_ij = np.float32(rng.uniform(0.01, 10.0, (40, 40)))
  numbers = (
    np.arange(127, dtype=np.uint8).view(fp8_blocks.E4M3).astype(np.float32)
  )
  ties_IJ = rng.choice((numbers[1:] + numbers[:-1]) / 2, (640, 640))
  ties_IJ[::16, ::16] = 448.0
  w_IJ = ties_IJ * np.repeat(np.repeat(scales_ij, 16, 0), 16, 1)
  w_IJ = (bits(w_IJ) + rng.integers(-1, 2, w_IJ.shape, np.int32)).astype('u4')
  w_IJ = w_IJ.view(np.float32).reshape(40, 16, 40, 16).transpose(0, 2, 1, 3)
  for tile_IJ in w_IJ.reshape(-1, 16, 16)[:200]:
    q = quantize(tile_IJ)
    values_IJ, scales_ij = fp8_blocks.quantize_host(tile_IJ, 'w')
    assert_same_bits(values_IJ, np.asarray(q.values))
    assert_same_bits(scales_ij, np.asarray(q.scales))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shape', SIZES)
def test_quantizing_again_changes_no_value(shape, dtype):
  """Of tiles that reach 448, and so of all that are neither zero nor held."""
  w_IJ = draw(7, shape, low=-30, high=30)
  q = quantize(w_IJ)
  again = quantize(dequantize(q, dtype=dtype))
  full_ij = oracle.block_amax(np.asarray(q.values).astype(np.float64)) == 448
  assert np.all(full_ij | (oracle.block_amax(w_IJ) < F32.tiny))
  full_IJ = oracle.spread(full_ij, shape) > 0
  got, want = bits(again.values), bits(q.values)
  np.testing.assert_array_equal(got[full_IJ], want[full_IJ])
  if dtype == jnp.float32:
    change_ij = np.abs(np.asarray(again.scales) - np.asarray(q.scales))
    assert np.all(change_ij <= np.spacing(np.asarray(q.scales)))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_the_host_refuses_what_is_not_finite(bad):
  w_IJ = np.ones((200, 150), np.float32)
  w_IJ[130, 140] = w_IJ[199, 0] = bad
  expected = (
    'kv_a_proj holds a NaN or an infinity, first in row 130, column 140'
  )
  with pytest.raises(errors.InputError, match=expected):
    fp8_blocks.quantize_host(w_IJ, 'kv_a_proj')


def test_what_is_not_finite_becomes_nan_and_spoils_its_own_tile_only():
  w_IJ = np.ones((200, 150), np.float32)
  bad = (np.array([0, 127, 0, 128]), np.array([0, 127, 149, 5]))
  w_IJ[bad] = [np.nan, np.nan, np.inf, -np.inf]
  got_IJ = np.asarray(dequantize(quantize(w_IJ)))
  assert np.all(np.isnan(got_IJ[bad]))
  assert np.all(got_IJ[128:, 128:] == 1.0)


def test_all_codes_of_a_file_are_read():
  """Also the two NaNs, which no export writes."""
  codes_IJ = np.arange(256, dtype=np.uint8).reshape(2, 128)
  values_IJ, scales_ij = codes_IJ.view(fp8_blocks.E4M3), np.float32([[0.5]])
  got_IJ = fp8_blocks.dequantize_host(values_IJ, scales_ij)
  want_IJ = oracle.dequantize_blocks(values_IJ, scales_ij)
  np.testing.assert_array_equal(got_IJ, want_IJ)
  assert np.argwhere(np.isnan(got_IJ)).tolist() == [[0, 127], [1, 127]]
  q = fp8_blocks.Quantized(values_IJ, scales_ij, fp8_blocks.TILE)
  np.testing.assert_array_equal(dequantize(q), want_IJ)


def test_other_float_dtypes_are_read_as_f32():
  w_IJ = jnp.bfloat16(draw(3, (130, 140), low=-20, high=20))
  got, want = quantize(w_IJ), quantize(w_IJ.astype(jnp.float32))
  jax.tree.map(assert_same_bits, *jax.tree.map(np.asarray, (got, want)))
  got_IJ = dequantize(got, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(got_IJ, dequantize(got).astype(jnp.bfloat16))


@pytest.mark.parametrize('tile', [(128, 128), (1, 128), (128, 1), (3, 5)])
def test_leading_dims_are_a_loop(tile):
  w_ELIJ = np.stack([draw(seed, (130, 140)) for seed in range(6)])
  w_ELIJ = w_ELIJ.reshape(2, 3, 130, 140)
  q = quantize(w_ELIJ, tile=tile)
  assert q.scales.shape[:2] == (2, 3)
  over = functools.partial(quantize_blocks, tile=tile)
  vmapped = jax.jit(jax.vmap(jax.vmap(over)))(w_ELIJ)
  jax.tree.map(assert_same_bits, *jax.tree.map(np.asarray, (vmapped, q)))
  back, vmapped = dequantize(q), jax.lax.map(reference.dequantize, q)
  np.testing.assert_array_equal(back, vmapped)
  for e, layer in np.ndindex(2, 3):
    one = quantize(w_ELIJ[e, layer], tile=tile)
    assert_nearest(w_ELIJ[e, layer], one.values, one.scales, tile)
    part = jax.tree.map(lambda x: x[e, layer], q)
    jax.tree.map(assert_same_bits, *jax.tree.map(np.asarray, (part, one)))
    np.testing.assert_array_equal(back[e, layer], dequantize(one))


def test_one_program_rounds_as_two_do():
  """XLA may keep excess precision across casts; here that would be a bug."""
  w_IJ = draw(5, (140, 150))
  both = jax.jit(lambda w_IJ: reference.dequantize(quantize_blocks(w_IJ)))
  assert_same_bits(
    np.asarray(both(w_IJ)), np.asarray(dequantize(quantize(w_IJ)))
  )


def test_a_pytree_with_a_static_tile():
  q = quantize_blocks(jnp.ones((4, 6)), (2, 3))
  assert len(jax.tree.leaves(q)) == 2
  shapes = jax.tree.map(lambda x: x.shape, q)
  assert shapes == fp8_blocks.Quantized((4, 6), (2, 2), (2, 3))
  out = jax.jit(lambda q: jax.tree.map(lambda x: x[:2, :2], q))(q)
  assert isinstance(out, fp8_blocks.Quantized) and out.tile == (2, 3)
  assert out.shape == (2, 2)
  other = quantize_blocks(jnp.ones((4, 6)), (2, 4))
  assert jax.tree.structure(q) != jax.tree.structure(other)
  named = jax.tree_util.tree_flatten_with_path(q)[0]
  names = [jax.tree_util.keystr(path) for path, _ in named]
  assert names == ['.values', '.scales']


@hypothesis.given(
  st.integers(0, 10**6),
  st.integers(1, 300),
  st.integers(1, 300),
  st.lists(st.integers(0, 300), max_size=4),
)
def test_any_rows_dequantize_by_themselves(seed, rows, columns, cuts):
  values_IJ, scales_ij = fp8_blocks.quantize_host(
    draw(seed, (rows, columns)), 'w'
  )
  cuts = [0, *sorted(min(cut, rows) for cut in cuts), rows]
  parts = [
    fp8_blocks.dequantize_host(values_IJ[start:stop], scales_ij, start)
    for start, stop in itertools.pairwise(cuts)
  ]
  want_IJ = fp8_blocks.dequantize_host(values_IJ, scales_ij)
  assert_same_bits(np.concatenate(parts), want_IJ)


@pytest.mark.parametrize('shape', [(1, 2), (2, 1), (2, 3)])
def test_scales_of_another_tensor_are_refused(shape):
  values_IJ = np.zeros((100, 200), fp8_blocks.E4M3)
  with pytest.raises(ValueError, match='must be at least 2 by 2 for rows 100'):
    fp8_blocks.dequantize_host(values_IJ, np.ones(shape, np.float32), 100)


@pytest.mark.parametrize(
  ('shape', 'scales'),
  [
    ((1536, 7168), (12, 56)),  # q_a_proj
    ((24576, 1536), (192, 12)),  # q_b_proj
    ((576, 7168), (5, 56)),  # kv_a_proj_with_mqa
    ((32768, 512), (256, 4)),  # kv_b_proj
    ((7168, 16384), (56, 128)),  # o_proj
    ((18432, 7168), (144, 56)),  # gate_proj and up_proj of a dense layer
    ((7168, 2048), (56, 16)),  # down_proj of an expert
  ],
)
def test_the_published_layout(shape, scales):
  w_IJ = jax.ShapeDtypeStruct(shape, jnp.float32)
  q = jax.eval_shape(quantize_blocks, w_IJ)
  assert (q.shape, q.scales.shape) == (shape, scales)


def test_the_last_scales_of_kv_a_proj_are_the_rotary_rows():
  w_IJ = np.full((576, 7168), 448.0, np.float32)
  w_IJ[512:] *= 2
  values_IJ, scales_ij = fp8_blocks.quantize_host(w_IJ, 'kv_a_proj')
  np.testing.assert_array_equal(scales_ij, [[1.0] * 56] * 4 + [[2.0] * 56])
  rotary_IJ = fp8_blocks.dequantize_host(values_IJ[512:], scales_ij, 512)
  np.testing.assert_array_equal(rotary_IJ, w_IJ[512:])
