"""The TPU kernel of paged decoding, interpreted, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import compile_kernels_tpu as without_tpu
from pallas_kernels.mla_decode import (
  api,
  cases,
  pallas_gpu,
  pallas_tpu,
  reference,
)
from tests import nightly
from tests.pallas import decoding, products

BlockSizes = pallas_tpu.BlockSizes
V3 = [n for n in without_tpu.programs() if n.startswith('decode')]


@functools.partial(jax.jit, static_argnames=('scale', 'splits', 'pages'))
def decode(q_BTNY, cache, table_Bb, lengths_B, scale, splits=None, pages=None):
  args = (q_BTNY, cache, table_Bb, lengths_B, scale)
  if pages is None:
    return api.decode(*args, 'pallas_interpret', splits)
  options = {'blocks': BlockSizes(pages), 'interpret': True}
  return pallas_tpu.decode(*args, splits=splits, **options)


reference_decode = jax.jit(reference.decode, static_argnames='scale')


@pytest.mark.parametrize(
  'name',
  nightly.daily(
    cases.SMALL, 'page_border', 'ragged', 'shorter_than_queries', 'v3_heads_16'
  ),
)
def test_is_the_reference_over_poisoned_pages(name):
  args = decoding.draw(cases.SMALL[name])
  got = decode(*args)
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')
  decoding.assert_close(got, decoding.naive(args), 'bfloat16')
  products.assert_bitwise(decode(*args), got)


@pytest.mark.parametrize('queries', nightly.daily([16, 17, 40], '17'))
def test_many_queries_come_in_slices(queries):
  case = cases.Case((130, 40, 3, 0), 2, queries=queries, latent=128)
  args = decoding.draw(case, 'float32')
  want = reference_decode(*args)
  decoding.assert_close(decode(*args), want, 'float32')
  decoding.assert_close(want, decoding.naive(args), 'float32')


@pytest.mark.parametrize(
  'name',
  nightly.daily(['ragged', 'speculative', 'v3_heads_16'], 'speculative'),
)
def test_fp8_cache(name):
  args = decoding.draw(cases.SMALL[name], fp8=True)
  decoding.assert_close(decode(*args), reference_decode(*args), 'bfloat16')


@pytest.mark.parametrize(
  ('name', 'splits', 'pages'),
  [
    pytest.param('ragged', 1, 1, marks=pytest.mark.nightly),
    pytest.param('ragged', 2, 1, marks=pytest.mark.nightly),
    ('ragged', 3, 3),
    ('empty_row', 2, 2),
    ('shorter_than_queries', 7, 1),
  ],
)
def test_parts_and_steps_give_the_same(name, splits, pages):
  args = decoding.draw(cases.SMALL[name], 'float32')
  got = decode(*args, splits=splits, pages=pages)
  decoding.assert_close(got, reference_decode(*args), 'float32')


def test_where_pages_lie_changes_no_bit():
  args = decoding.draw(cases.SMALL['ragged'])
  products.assert_bitwise(decode(*decoding.permuted(args)), decode(*args))


def test_poison_changes_no_bit():
  case = cases.SMALL['ragged']
  clean, poisoned = (
    decoding.draw(case, poison=poison) for poison in (False, True)
  )
  products.assert_bitwise(decode(*poisoned), decode(*clean))


def test_a_row_depends_on_itself_only():
  args = decoding.draw(cases.SMALL['ragged'])
  bad = args._replace(q_BTNY=args.q_BTNY.at[1].set(np.nan))
  others = np.array([0, 2, 3])
  for x, y in zip(decode(*bad), decode(*args), strict=True):
    assert np.isnan(np.asarray(x[1], np.float32)).all()
    products.assert_bitwise(x[others], y[others])


def test_vmap_is_a_loop():
  args = decoding.draw(cases.SMALL['tiny'])
  q_2BTNY = np.stack([args.q_BTNY, -args.q_BTNY])
  got = jax.vmap(lambda q_BTNY: decode(q_BTNY, *args[1:]))(q_2BTNY)
  for at, q_BTNY in enumerate(q_2BTNY):
    one = jax.tree.map(lambda x, at=at: x[at], got)
    want = decode(jax.numpy.asarray(q_BTNY), *args[1:])
    decoding.assert_close(one, want, 'bfloat16')


def test_no_race_and_nothing_read_that_was_not_written(capfd):
  args = decoding.draw(cases.SMALL['speculative'])
  strict = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    num_cores_or_threads=2,
    random_seed=0,
  )
  got = pallas_tpu.decode(
    *args, splits=2, blocks=BlockSizes(1), interpret=strict
  )
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')
  assert 'RACE' not in capfd.readouterr().out


@pytest.mark.parametrize('chip', nightly.daily(['v5p', 'v7x'], 'v5p'))
@pytest.mark.parametrize('name', V3)
def test_lowers_for_a_tpu(name, chip):
  program = without_tpu.programs()[name]
  text = without_tpu.lower(program, without_tpu.CHIPS[chip]).as_text()
  assert text.count('@tpu_custom_call') == 1


@pytest.mark.parametrize('kernel', [pallas_tpu.decode, pallas_gpu.decode])
def test_nothing_is_made_of_the_whole_cache(kernel):
  """A call costs what its rows have, however many pages there are."""
  shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
  cache = api.LatentPages(shape(5000, 64, 512), shape(5000, 64, 64))
  table = shape(2, 3, dtype=jnp.int32), shape(2, dtype=jnp.int32)
  for kept in (cache, jax.eval_shape(api.quantize, cache)):
    traced = jax.make_jaxpr(lambda *args: kernel(*args, 0.1, splits=1))(
      shape(2, 1, 16, 576), kept, *table
    )
    shapes = [x.aval.shape for e in traced.eqns for x in e.outvars]
    assert shapes and not [dims for dims in shapes if dims[:1] == (5000,)]


def test_blocks_have_pages():
  with pytest.raises(ValueError, match=r'blocks\.pages=0 must be at least 1'):
    BlockSizes(0)
  assert pallas_tpu.choose_blocks(3, 16).pages == 3
  assert pallas_tpu.choose_blocks(128, 512).pages < 8
