"""The TPU kernel of the FP8 product, interpreted, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import compile_kernels_tpu as without_tpu
from pallas_kernels.fp8_matmul import api, cases, pallas_tpu, reference
from tests import nightly
from tests.pallas import products

OPERAND_B = {'rows': products.rows, 'blocks': products.blocks}
FORMS = [
  ('one_row', 'blocks', 'float32'),
  ('rope_row', 'rows', 'float32'),
  ('ragged', 'blocks', 'float32'),
  ('odd', 'rows', 'float32'),
  ('two_tiles', 'blocks', 'bfloat16'),
]
MORE = [(name, tile, 'float32') for name in cases.SMALL for tile in OPERAND_B]
MORE = [form for form in MORE if form not in FORMS]
MORE += [('odd', 'blocks', 'bfloat16')]
V3 = [n for n in without_tpu.programs() if n.startswith('matmul')]
SMALLEST = pallas_tpu.BlockSizes(128, 128, 128)
reference_product = jax.jit(reference.matmul, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(2, 3))
def product(a, b, dtype=jnp.float32, blocks=None):
  if blocks is None:
    return api.matmul(a, b, dtype, implementation='pallas_interpret')
  return pallas_tpu.matmul(a, b, dtype, blocks=blocks, interpret=True)


def operands(case, tile):
  a = products.rows(0, case.m, case.k)
  return a, OPERAND_B[tile](1, case.n, case.k)


@pytest.mark.parametrize(
  ('name', 'tile', 'dtype'),
  [*FORMS, *(pytest.param(*form, marks=pytest.mark.nightly) for form in MORE)],
)
def test_is_the_reference(name, tile, dtype):
  a, b = operands(cases.SMALL[name], tile)
  got = product(a, b, dtype)
  products.assert_same(got, reference_product(a, b, dtype))
  products.assert_bitwise(product(a, b, dtype), got)


@pytest.mark.parametrize(
  ('m', 'n', 'k', 'blocks'),
  [
    (200, 300, 640, (128, 128, 256)),  # partial blocks of rows, padded K
    (130, 100, 128 * 18, (256, 128, 128 * 9)),  # a group of scales and a rest
    (1, 1, 1, (384, 256, 512)),  # blocks larger than the arrays
  ],
)
def test_any_blocks_give_the_same(m, n, k, blocks):
  a, b = products.rows(0, m, k), products.rows(1, n, k)
  got = product(a, b, jnp.float32, pallas_tpu.BlockSizes(*blocks))
  products.assert_same(got, reference_product(a, b, jnp.float32))


@pytest.mark.parametrize('shape', [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
def test_nothing_to_multiply(shape):
  m, n, k = shape
  got = product(products.rows(0, m, k), products.rows(1, n, k))
  np.testing.assert_array_equal(got, np.zeros((m, n), np.float32))


def test_zeros_and_large_scales_stay_finite():
  a, b = operands(cases.SMALL['ragged'], 'blocks')
  zero = jax.tree.map(jnp.zeros_like, a)
  assert not np.any(product(zero, b))
  large = reference.quantize(jnp.full((8, 256), 1e18))
  got = product(large, large)
  products.assert_same(got, reference_product(large, large, jnp.float32))
  assert np.all(np.isfinite(got))


def test_a_row_depends_on_itself_only():
  a, b = operands(cases.SMALL['ragged'], 'rows')
  at = a.values.at[7].set(jnp.nan)
  got = product(type(a)(at, a.scales, a.tile), b)
  assert np.all(np.isnan(got[7]))
  others = np.delete(np.arange(a.shape[0]), 7)
  products.assert_bitwise(got[others], product(a, b)[others])


def test_vmap_is_a_loop():
  pairs = [operands(cases.SMALL['odd'], 'blocks')]
  pairs.append(jax.tree.map(lambda x: x[::-1], pairs[0]))
  a, b = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
  want = jnp.stack([product(*pair) for pair in pairs])
  products.assert_same(jax.vmap(product)(a, b), want)
  shared = jax.vmap(product, in_axes=(0, None))(a, pairs[0][1])
  products.assert_same(shared[0], want[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x_MD, w_DF, implementation):
  return _forward(x_MD, w_DF, implementation)[0]


def _forward(x_MD, w_DF, implementation):
  x, _ = reference.quantize_both(x_MD)
  w_FD, _ = reference.quantize_weight(w_DF)
  y_MF = api.matmul(x, w_FD, jnp.float32, implementation)
  return y_MF, (x_MD, w_DF)


def _backward(implementation, saved, dy_MF):
  x_MD, w_DF = saved
  _, x_DM = reference.quantize_both(x_MD)
  dy, dy_FM = reference.quantize_both(dy_MF)
  _, w = reference.quantize_weight(w_DF)
  return (
    api.matmul(dy, w, jnp.float32, implementation),
    api.matmul(x_DM, dy_FM, jnp.float32, implementation),
  )


linear.defvjp(_forward, _backward)


def test_gradients_under_jit_and_checkpoint():
  rng = np.random.default_rng(0)
  x_MD = jnp.asarray(rng.normal(size=(72, 200)), jnp.float32)
  w_DF = jnp.asarray(rng.normal(size=(200, 136)), jnp.float32)

  def loss(x_MD, w_DF, implementation, wrap):
    f = lambda x, w: jnp.sin(linear(x, w, implementation))
    return jnp.sum(wrap(f)(x_MD, w_DF))

  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=(2, 3))
  same = lambda f: f
  want = gradient(x_MD, w_DF, 'reference', same)
  got = gradient(x_MD, w_DF, 'pallas_interpret', jax.checkpoint)
  plain = gradient(x_MD, w_DF, 'pallas_interpret', same)
  for x, y in zip(got, want, strict=True):
    # The cotangent is quantised: what differs by a rounding may differ by one
    # of e4m3's, in few places.
    assert np.mean(np.abs(x - y) > 1e-4 * np.max(np.abs(y))) < 1e-2
  products.assert_bitwise(got, plain)


def test_no_race_and_nothing_read_that_was_not_written(capfd):
  a, b = products.rows(0, 136, 256), products.blocks(1, 136, 256)
  strict = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    num_cores_or_threads=2,
    random_seed=0,
  )
  got = pallas_tpu.matmul(a, b, jnp.float32, blocks=SMALLEST, interpret=strict)
  products.assert_same(got, reference_product(a, b, jnp.float32))
  assert 'RACE' not in capfd.readouterr().out


@pytest.mark.parametrize('chip', nightly.daily(['v5p', 'v7x'], 'v5p'))
@pytest.mark.parametrize('name', V3)
def test_lowers_for_a_tpu(name, chip):
  program = without_tpu.programs()[name]
  text = without_tpu.lower(program, without_tpu.CHIPS[chip]).as_text()
  assert text.count('@tpu_custom_call') == 1


@pytest.mark.parametrize('name', V3)
def test_blocks_of_v3_fill_what_they_pad(name):
  a, b = without_tpu.programs()[name].args
  (m, k), n = a.shape, b.shape[0]
  blocks = pallas_tpu.choose_blocks(m, n, k)
  padded = [
    -(-s // t) * t
    for s, t in zip((m, n, k), vars(blocks).values(), strict=True)
  ]
  assert m * n * k / np.prod(padded) > 0.9


@pytest.mark.parametrize('size', [0, 64, 192, -128])
def test_blocks_are_of_128(size):
  with pytest.raises(ValueError, match=rf'blocks\.n={size} must be'):
    pallas_tpu.BlockSizes(128, size, 128)
