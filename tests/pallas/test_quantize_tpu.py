"""The TPU quantiser, interpreted: bit for bit the reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import compile_kernels_tpu as without_tpu
from pallas_kernels.fp8_matmul import pallas_tpu, quantize_tpu, reference
from tests.pallas import products

HOW = ('pow2', 'floor')
V3 = [n for n in without_tpu.programs() if n.startswith('quantize')]
WAYS = [
  ((128, 128), {}),
  ((1, 7), {'pow2': True}),
  ((130, 257), {}),
  ((130, 257), {'pow2': True}),
  ((130, 257), {'floor': 1e-4}),
  ((130, 257), {'pow2': True, 'floor': 3.0}),
  ((640, 384), {}),
]
reference_both = jax.jit(reference.quantize_both, static_argnames=HOW)


@functools.partial(jax.jit, static_argnames=(*HOW, 'blocks'))
def both(x_MD, **options):
  return quantize_tpu.quantize_both(x_MD, interpret=True, **options)


def wide(seed, *shape, dtype=jnp.float32):
  """Magnitudes from denormals to 1e38, ties, zeros, and whole tiles of them."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * np.exp2(rng.uniform(-40, 0, shape))
  x *= np.exp2(rng.uniform(-110, 120, (shape[0], 1)))
  x[rng.uniform(size=shape) < 0.1] = 0
  x[: shape[0] // 3, : shape[1] // 2] = 0
  return jnp.asarray(x, jnp.float32).astype(dtype)


@pytest.mark.parametrize(('shape', 'options'), WAYS, ids=str)
def test_is_the_reference_bit_for_bit(shape, options):
  x_MD = wide(0, *shape)
  got = both(x_MD, **options)
  products.assert_bitwise(got, reference_both(x_MD, **options))
  products.assert_bitwise(both(x_MD, **options), got)
  of_x, of_xT = got
  assert of_x.tile == of_xT.tile == (1, 128)
  assert of_x.shape == shape and of_xT.shape == shape[::-1]


def test_bfloat16_is_read_as_it_is():
  x_MD = wide(1, 65, 200, dtype=jnp.bfloat16)
  products.assert_bitwise(both(x_MD), reference_both(x_MD))


def test_blocks_change_nothing():
  x_MD = wide(2, 200, 300)
  want = reference_both(x_MD, pow2=True)
  for blocks in ((128, 256), (512, 512)):
    sizes = pallas_tpu.BlockSizes(*blocks, 128)
    products.assert_bitwise(both(x_MD, pow2=True, blocks=sizes), want)


@pytest.mark.parametrize('shape', [(0, 5), (5, 0)])
def test_nothing_to_quantise(shape):
  x_MD = jnp.zeros(shape)
  products.assert_bitwise(both(x_MD), reference_both(x_MD))


def test_a_nan_stays_and_an_infinity_becomes_one():
  x_MD = jnp.ones((130, 140)).at[3, 4].set(jnp.nan).at[129, 0].set(jnp.inf)
  of_x, of_xT = both(x_MD)
  for values_MN in (of_x.values, of_xT.values.T):
    assert np.all(np.isnan(np.float32(values_MN[[3, 129], [4, 0]])))
    others = np.asarray(values_MN[4:128, 5:], np.float32)
    np.testing.assert_array_equal(others, np.full_like(others, 448))


def test_vmap_and_checkpoint():
  x_BMD = jnp.stack([wide(3, 40, 130), wide(4, 40, 130)])
  got = jax.vmap(jax.checkpoint(both))(x_BMD)
  for b, x_MD in enumerate(x_BMD):
    one = jax.tree.map(lambda x, b=b: x[b], got)
    products.assert_bitwise(one, reference_both(x_MD))


def test_no_race_and_nothing_read_that_was_not_written(capfd):
  x_MD = wide(5, 130, 140)
  strict = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    num_cores_or_threads=2,
    random_seed=0,
  )
  sizes = pallas_tpu.BlockSizes(128, 128, 128)
  got = quantize_tpu.quantize_both(x_MD, blocks=sizes, interpret=strict)
  products.assert_bitwise(got, reference_both(x_MD))
  assert 'RACE' not in capfd.readouterr().out


@pytest.mark.parametrize('chip', ['v5p'])
@pytest.mark.parametrize('name', V3)
def test_lowers_for_a_tpu(name, chip):
  program = without_tpu.programs()[name]
  text = without_tpu.lower(program, without_tpu.CHIPS[chip]).as_text()
  assert text.count('@tpu_custom_call') == 1
