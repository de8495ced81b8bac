"""The reference of paged decoding against float64, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics, quantized
from pallas_kernels.mla_decode import api, cases, parts
from pallas_kernels.mla_decode import cache as caches
from tests import nightly
from tests.oracles import fp8 as fp8_oracle
from tests.pallas import decoding, products

SOME = pytest.mark.parametrize(
  'name',
  nightly.daily(['ragged', 'speculative', 'empty_row'], 'speculative'),
)
SMALL = [
  *('page_border', 'ragged', 'empty_row', 'shorter_than_queries'),
  'v3_heads_128',
]
FORMS = [(name, 'bfloat16') for name in SMALL] + [('four_queries', 'float32')]
MORE = [(name, 'bfloat16') for name in cases.SMALL if name not in SMALL]
MORE += [('ragged', 'float32')]


@functools.partial(jax.jit, static_argnames=('scale', 'splits'))
def reference(q_BTNY, cache, table_Bb, lengths_B, scale, splits=None):
  return api.decode(
    q_BTNY, cache, table_Bb, lengths_B, scale, 'reference', splits
  )


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [*FORMS, *(pytest.param(*form, marks=pytest.mark.nightly) for form in MORE)],
)
def test_is_the_naive_attention_over_poisoned_pages(name, dtype):
  args = decoding.draw(cases.SMALL[name], dtype)
  decoding.assert_close(reference(*args), decoding.naive(args), dtype)


@SOME
def test_an_fp8_cache_is_what_it_stands_for(name):
  args = decoding.draw(cases.SMALL[name], fp8=True)
  decoding.assert_close(reference(*args), decoding.naive(args), 'bfloat16')


@pytest.mark.parametrize(
  ('name', 'splits'),
  [
    ('ragged', 2),
    ('tiny', 7),
    pytest.param('speculative', 3, marks=pytest.mark.nightly),
    pytest.param('empty_row', 2, marks=pytest.mark.nightly),
  ],
)
def test_splits_change_nothing(name, splits):
  args = decoding.draw(cases.SMALL[name], 'float32')
  unsplit, split = reference(*args), reference(*args, splits=splits)
  decoding.assert_close(split, unsplit, 'float32')


@pytest.mark.usefixtures('optimized')
@SOME
def test_where_pages_lie_changes_no_bit(name):
  args = decoding.draw(cases.SMALL[name])
  products.assert_bitwise(reference(*decoding.permuted(args)), reference(*args))


@pytest.mark.usefixtures('optimized')
def test_poison_changes_no_bit():
  case = cases.SMALL['ragged']
  clean, poisoned = (
    decoding.draw(case, poison=poison) for poison in (False, True)
  )
  assert np.isnan(np.asarray(poisoned.cache.c_psC, np.float32)).any()
  products.assert_bitwise(reference(*poisoned), reference(*clean))


def test_a_row_depends_on_itself_only():
  args = decoding.draw(cases.SMALL['ragged'])
  got = reference(*args._replace(q_BTNY=args.q_BTNY.at[1].set(jnp.nan)))
  want = reference(*args)
  assert np.isnan(np.asarray(got[0][1], np.float32)).all()
  others = np.array([0, 2, 3])
  for x, y in zip(got, want, strict=True):
    products.assert_bitwise(x[others], y[others])


def test_queries_are_causal_among_themselves():
  """Each of several is the single query of a row cut after it."""
  case = cases.SMALL['four_queries']
  args = decoding.draw(case, 'float32')
  o_BTNC, lse_BNT = reference(*args)
  for t in range(case.queries):
    before = case.queries - 1 - t
    alone = args._replace(
      q_BTNY=args.q_BTNY[:, t : t + 1], lengths_B=args.lengths_B - before
    )
    want = reference(*alone)
    got = o_BTNC[:, t : t + 1], lse_BNT[:, :, t : t + 1]
    decoding.assert_close(got, want, 'float32')


def test_log_sum_exp_is_that_of_the_scores():
  """Equal scores: log of the number of tokens, and the mean of latents."""
  args = decoding.draw(cases.SMALL['tiny'], 'float32', poison=False)
  args = args._replace(q_BTNY=jnp.zeros_like(args.q_BTNY))
  o_BTNC, lse_BNT = reference(*args)
  want = np.log(np.asarray(args.lengths_B, np.float32))
  np.testing.assert_allclose(lse_BNT[:, 0, 0], want, rtol=1e-6)
  page = args.table_Bb[1, 0]
  mean = np.mean(np.asarray(args.cache.c_psC[page, :5]), axis=0)
  np.testing.assert_allclose(o_BTNC[1, 0, 0], mean, rtol=1e-5, atol=1e-6)


def test_large_scores_stay_finite():
  args = decoding.draw(cases.SMALL['tiny'], 'float32')
  args = args._replace(q_BTNY=args.q_BTNY * 1e4)
  o_BTNC, lse_BNT = reference(*args)
  assert np.all(np.isfinite(o_BTNC)) and np.all(np.isfinite(lse_BNT))


def test_vmap_is_a_loop():
  args = decoding.draw(cases.SMALL['tiny'], 'float32')
  q_2BTNY = jnp.stack([args.q_BTNY, -args.q_BTNY])
  run = lambda q_BTNY: reference(q_BTNY, *args[1:])
  got = jax.vmap(run)(q_2BTNY)
  for at, q_BTNY in enumerate(q_2BTNY):
    one = jax.tree.map(lambda x, at=at: x[at], got)
    decoding.assert_close(one, run(q_BTNY), 'float32')


def test_combine_weighs_parts_by_their_tokens():
  """Two parts of equal scores, 3 and 1 tokens, and one without any."""
  o_iBTNC = jnp.asarray([1.0, 5.0, 0.0]).reshape(3, 1, 1, 1, 1)
  lse_iBNT = jnp.log(jnp.asarray([3.0, 1.0, 0.0])).reshape(3, 1, 1, 1)
  o_BTNC, lse_BNT = parts.combine(o_iBTNC, lse_iBNT, jnp.float32)
  np.testing.assert_allclose(o_BTNC.item(), 2.0, rtol=1e-6)
  np.testing.assert_allclose(lse_BNT.item(), np.log(4.0), rtol=1e-6)


def test_combine_of_nothing_is_empty():
  o_BTNC, lse_BNT = parts.combine(
    jnp.zeros((2, 1, 1, 1, 3)), jnp.full((2, 1, 1, 1), -jnp.inf), jnp.bfloat16
  )
  assert o_BTNC.dtype == jnp.bfloat16 and not np.any(o_BTNC)
  assert np.isneginf(lse_BNT).all()


@pytest.mark.parametrize('splits', [1, 3, 8])
def test_parts_tile_every_row(splits):
  for length in (0, 1, 64, 65, 200, 300, 512):
    ends = [0]
    for part in range(splits):
      first, end = parts.bounds(jnp.int32(length), part, splits)
      assert first == ends[-1] and first <= end
      ends.append(int(end))
    assert ends[-1] == -(-length // api.PAGE)
    sizes = np.diff(ends)
    assert max(sizes) == -(-ends[-1] // splits)


def test_a_token_of_v3_in_fp8_has_656_bytes():
  args = decoding.draw(cases.SMALL['v3_heads_16'], fp8=True)
  assert caches.bytes_per_token(args.cache) == 656
  bf16 = decoding.draw(cases.SMALL['v3_heads_16'])
  assert caches.bytes_per_token(bf16.cache) == 1152


def test_fp8_round_trip_has_the_rounding_of_e4m3():
  rng = np.random.default_rng(0)
  wide = np.exp2(rng.integers(-20, 20, (3, 64, 4))).repeat(128, -1)
  c_psC = jnp.asarray(rng.normal(size=(3, 64, 512)) * wide, jnp.float32)
  k_rope_psR = jnp.asarray(rng.normal(size=(3, 64, 64)), jnp.bfloat16)
  cache = api.quantize(api.LatentPages(c_psC, k_rope_psR))
  assert cache.c_psC.scales.shape == (3, 64, 4)
  back = api.dequantize(cache, jnp.float32)
  products.assert_bitwise(back.k_rope_psR, k_rope_psR)
  tokens = np.asarray(c_psC, np.float64).reshape(192, 512)
  values, scales = fp8_oracle.quantize_blocks(tokens, (1, 128))
  want = fp8_oracle.dequantize_blocks(values, scales, (1, 128))
  got = np.asarray(back.c_psC, np.float64).reshape(192, 512)
  # A value at a tie may go either way: the scale is f32 here.
  close = np.abs(got - want) <= 1e-6 * np.abs(want)
  assert np.mean(close) > 0.999
  largest = fp8_oracle.spread(scales, got.shape, (1, 128)) * 448
  assert np.max(np.abs(got - tokens) / largest) <= 1 / 28 + 1e-6


def test_a_token_is_quantised_by_itself():
  """Appending to a page rounds no other token again."""
  args = decoding.draw(cases.SMALL['v3_heads_16'], poison=False)
  pages = api.quantize(args.cache).c_psC
  token = api.quantize(
    api.LatentPages(args.cache.c_psC[:, 3:4], args.cache.k_rope_psR[:, 3:4])
  ).c_psC
  products.assert_bitwise(token.values, pages.values[:, 3:4])
  products.assert_bitwise(token.scales, pages.scales[:, 3:4])


def test_fp8_error_of_the_output_is_that_of_the_format():
  """Against the unrounded cache: e4m3's relative step is 2^-3, rms 2.6 %."""
  exact = decoding.draw(cases.SMALL['v3_heads_16'])
  rounded = exact._replace(cache=api.quantize(exact.cache))
  got, want = reference(*rounded)[0], decoding.naive(exact)[0]
  error = numerics.difference(got, want)
  assert 1e-6 < error < numerics.FP8_DIFFERENCE


def _replaced(args, **changes):
  return args._replace(
    cache=api.LatentPages(
      changes.pop('c', args.cache.c_psC),
      changes.pop('k_rope', args.cache.k_rope_psR),
    ),
    **changes,
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'q_BTNY': jnp.ones((2, 1, 192), jnp.bfloat16)}, 'q.shape='),
    ({'q_BTNY': jnp.ones((2, 0, 2, 192), jnp.bfloat16)}, 'q.shape='),
    ({'q_BTNY': jnp.ones((2, 1, 2, 192), jnp.float16)}, 'q.dtype=float16'),
    ({'q_BTNY': jnp.ones((2, 1, 2, 191), jnp.bfloat16)}, r'\[-1\]=191 must be'),
    ({'q_BTNY': jnp.ones((2, 1, 2, 192))}, 'k_rope.dtype=bfloat16 must be f'),
    ({'c': jnp.ones((5, 32, 128), jnp.bfloat16)}, r'c.shape=.* \[pages, 64'),
    ({'c': jnp.ones((7, 64, 128), jnp.bfloat16)}, 'must have as many pages'),
    ({'c': jnp.ones((5, 64, 128))}, 'cache.c.dtype=float32 must be bfloat16'),
    ({'table_Bb': jnp.zeros((3, 2), jnp.int32)}, r'table.shape=\(3, 2\)'),
    ({'table_Bb': jnp.zeros((2, 2))}, 'table.dtype=float32 must be int32'),
    ({'lengths_B': jnp.zeros((3,), jnp.int32)}, r'lengths.shape=\(3,\)'),
  ],
)
def test_wrong_arguments_are_named(changes, message):
  args = _replaced(decoding.draw(cases.SMALL['tiny']), **changes)
  with pytest.raises(ValueError, match=message):
    api.decode(*args, 'reference')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tile': quantized.BLOCK}, r'cache.c.tile=\(128, 128\) must be \(1, 128'),
    ({'scales': jnp.ones((5, 64, 3))}, r'cache.c.scales.shape=\(5, 64, 3\)'),
    ({'values': jnp.ones((5, 64, 128), jnp.float8_e5m2)}, 'must be e4m3'),
  ],
)
def test_wrong_fp8_caches_are_named(changes, message):
  args = decoding.draw(cases.SMALL['tiny'], fp8=True)
  assert args.cache.pages == 5
  c_psC = quantized.Quantized(**vars(args.cache.c_psC) | changes)
  with pytest.raises(ValueError, match=message):
    api.decode(*_replaced(args, c=c_psC), 'reference')


def test_other_wrong_arguments():
  args = decoding.draw(cases.SMALL['tiny'])
  with pytest.raises(ValueError, match='splits=0 must be at least 1'):
    api.decode(*args, 'reference', 0)
  with pytest.raises(ValueError, match="implementation='triton' must be in"):
    api.decode(*args, 'triton')
