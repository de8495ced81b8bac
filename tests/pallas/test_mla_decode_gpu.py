"""Paged decoding on Hopper against the reference, and its machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import machine_code
from pallas_kernels.mla_decode import api, cases, pallas_gpu, reference
from tests import nightly
from tests.pallas import decoding, gpu, products

STATIC = ('scale', 'splits')
reference_decode = jax.jit(reference.decode, static_argnames=STATIC)
decode = jax.jit(
  functools.partial(pallas_gpu.decode, interpret=True), static_argnames=STATIC
)


FEW = cases.Case((130, 33), 3, latent=128)
LOWERED = [
  ('heads_128_speculative', False),
  ('heads_16', True),
  ('empty_row', False),
  ('many_turns', True),
]
FP8 = {
  'v3': cases.SMALL['v3_heads_16'],
  'many_turns': cases.Case((64 * 5 + 1, 64 * 4), 3, latent=256),
  'ragged': cases.Case((200, 1, 0, 66), 3, queries=2, latent=256),
}


def structs(case, fp8=False):
  """Shapes of the arguments without the scale."""
  rows = len(case.lengths)
  page = lambda width: jax.ShapeDtypeStruct(
    (rows * case.blocks, api.PAGE, width), jnp.bfloat16
  )
  width = case.latent + case.rotary
  cache = api.LatentPages(page(case.latent), page(case.rotary))
  return (
    jax.ShapeDtypeStruct((rows, case.queries, case.heads, width), jnp.bfloat16),
    jax.eval_shape(api.quantize, cache) if fp8 else cache,
    jax.ShapeDtypeStruct((rows, case.blocks), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  )


@gpu.interpreted
@pytest.mark.parametrize(
  'name',
  nightly.daily(
    cases.SMALL,
    'page_border',
    'v3_heads_128',
  ),
)
def test_is_the_reference_over_poisoned_pages_without_races(name, capfd):
  args = decoding.draw(cases.SMALL[name])
  with gpu.no_races(capfd):
    got = jax.block_until_ready(decode(*args, splits=1))
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')
  decoding.assert_close(got, decoding.naive(args), 'bfloat16')


@gpu.interpreted
@pytest.mark.parametrize(
  ('name', 'splits'),
  [
    ('ragged', 2),
    pytest.param('ragged', 4, marks=pytest.mark.nightly),
    pytest.param('empty_row', 3, marks=pytest.mark.nightly),
    pytest.param('speculative', 2, marks=pytest.mark.nightly),
  ],
)
def test_parts_give_the_whole(name, splits, capfd):
  args = decoding.draw(cases.SMALL[name])
  with gpu.no_races(capfd):
    got = jax.block_until_ready(decode(*args, splits=splits))
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')


@gpu.interpreted
@pytest.mark.parametrize(
  ('name', 'splits'),
  [
    ('many_turns', 1),
    pytest.param('ragged', 2, marks=pytest.mark.nightly),
    pytest.param('v3', 1, marks=pytest.mark.nightly),
    pytest.param('v3', 2, marks=pytest.mark.nightly),
    pytest.param('many_turns', 2, marks=pytest.mark.nightly),
    pytest.param('ragged', 1, marks=pytest.mark.nightly),
  ],
)
def test_fp8_cache(name, splits, capfd):
  args = decoding.draw(FP8[name], fp8=True)
  with gpu.no_races(capfd):
    got = jax.block_until_ready(decode(*args, splits=splits))
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')
  decoding.assert_close(got, decoding.naive(args), 'bfloat16')


@gpu.interpreted
def test_many_pages_go_round_the_two_buffers(capfd):
  args = decoding.draw(cases.Case((64 * 6 + 1,), 3, latent=256))
  with gpu.no_races(capfd):
    got = jax.block_until_ready(decode(*args, splits=1))
  decoding.assert_close(got, reference_decode(*args), 'bfloat16')


@gpu.interpreted
@pytest.mark.nightly
def test_again_gives_the_same_bits_also_without_jit():
  args = decoding.draw(FEW)
  first = decode(*args, splits=1)
  products.assert_bitwise(decode(*args, splits=1), first)
  eager = pallas_gpu.decode(*args, splits=1, interpret=True)
  products.assert_bitwise(eager, first)


@gpu.interpreted
def test_neither_poison_nor_the_place_of_pages_changes_a_bit():
  clean, poisoned = (
    decoding.draw(FEW, poison=poison) for poison in (False, True)
  )
  want = decode(*clean, splits=1)
  products.assert_bitwise(decode(*poisoned, splits=1), want)
  products.assert_bitwise(decode(*decoding.permuted(clean), splits=1), want)


@gpu.interpreted
def test_a_row_depends_on_itself_only():
  args = decoding.draw(FEW)
  bad = args._replace(q_BTNY=args.q_BTNY.at[1].set(jnp.nan))
  got, want = decode(*bad, splits=1), decode(*args, splits=1)
  for x, y in zip(got, want, strict=True):
    assert np.isnan(np.asarray(x[1], np.float32)).all()
    products.assert_bitwise(x[0], y[0])


@pytest.mark.parametrize(
  ('name', 'fp8'),
  [
    *LOWERED,
    *(
      pytest.param(*form, marks=pytest.mark.nightly)
      for form in [
        *((name, False) for name in cases.V3 | cases.SMALL),
        *((name, True) for name in cases.V3 | FP8),
      ]
      if form not in LOWERED
    ),
  ],
)
def test_all_shapes_are_lowered_to_wgmma(name, fp8):
  """Whole: the interpreter takes sizes that TMA would not."""
  case = (cases.V3 | cases.SMALL | FP8)[name]
  run = functools.partial(pallas_gpu.decode, scale=decoding.SCALE)
  widths = {api.PAGE, case.latent // 2}
  want = {f'm64n{width}k16.f32.bf16.bf16' for width in widths}
  assert gpu.multiplications(gpu.lower(run, *structs(case, fp8))) == want


@gpu.compiled
@pytest.mark.parametrize('fp8', [False, True])
@pytest.mark.parametrize('name', ['heads_128', 'heads_128_speculative'])
def test_registers_suffice_for_output_and_scores(name, fp8):
  run = functools.partial(pallas_gpu.decode, scale=decoding.SCALE, splits=1)
  machine = machine_code.compile_kernel(run, *structs(cases.V3[name], fp8))
  assert machine.spilled == 0
  assert machine.count(r'HGMMA\.64x256x16\.F32\.BF16') == 4
  assert machine.count(r'HGMMA\.64x64x16\.F32\.BF16') == 36


@gpu.interpreted
@pytest.mark.nightly
def test_vmap_is_a_loop():
  args = decoding.draw(cases.SMALL['tiny'])
  q_2BTNY = jnp.stack([args.q_BTNY, -args.q_BTNY])
  run = lambda q_BTNY: decode(q_BTNY, *args[1:], splits=1)
  got = jax.vmap(run)(q_2BTNY)
  for at, q_BTNY in enumerate(q_2BTNY):
    one = jax.tree.map(lambda x, at=at: x[at], got)
    want = reference_decode(q_BTNY, *args[1:])
    decoding.assert_close(one, want, 'bfloat16')


@pytest.mark.parametrize(
  ('programs', 'blocks', 'want'),
  [(256, 128, 1), (16, 128, 8), (1, 4, 4), (132, 9, 1), (1, 500, 132)],
)
def test_parts_fill_the_multiprocessors_once(programs, blocks, want):
  assert pallas_gpu.choose_splits(programs, blocks) == want


@pytest.mark.parametrize(
  ('case', 'options', 'message'),
  [
    (cases.SMALL['tiny'], {'dtype': 'float32'}, 'cache is float32, not bfloat'),
    (cases.SMALL['tiny'], {'fp8': True}, r'128 \+ 64 must be one of \(256'),
    (cases.Case((3,), 2, latent=192), {}, r'widths 192 \+ 64 must be'),
    (cases.Case((3,), 2, rotary=32), {}, r'widths 512 \+ 32 must be'),
  ],
)
def test_what_the_kernel_does_not_do_is_named(case, options, message):
  with pytest.raises(NotImplementedError, match=message):
    pallas_gpu.decode(*decoding.draw(case, **options))
