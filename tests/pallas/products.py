"""Operands of FP8 products, and what a product is compared by."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import reference
from pallas_kernels.grouped_matmul import reference as grouped_reference

ROWS = grouped_reference.ROWS
quantize = jax.jit(reference.quantize, static_argnums=1)


def rows(seed, *shape):
  """Normal numbers with 1 x 128 tiles."""
  return _quantized(seed, shape, quantized.ROW)


def blocks(seed, *shape):
  """Normal numbers with 128 x 128 tiles."""
  return _quantized(seed, shape, quantized.BLOCK)


def _quantized(seed, shape, tile):
  x = np.random.default_rng(seed).normal(size=shape)
  return quantize(jnp.asarray(x, jnp.float32), tile)


def experts_of(sizes, spare=1):
  """expert_j and num_blocks of experts with so many rows each.

  `spare` blocks more are not in use and name no expert.
  """
  blocks_E = [-(-size // ROWS) for size in sizes]
  names = [np.repeat(np.arange(len(sizes)), blocks_E), [10**6] * spare]
  expert_j = jnp.asarray(np.concatenate(names), jnp.int32)
  return expert_j, jnp.int32(sum(blocks_E))


def poisoned(q, num_blocks, axis):
  """NaN in the values and scales of blocks of 128 that are not in use."""

  def poison(x, first):
    used = jnp.arange(x.shape[axis]) < first
    shape = [-1 if d == axis else 1 for d in range(x.ndim)]
    return jnp.where(used.reshape(shape), x, jnp.array(jnp.nan, x.dtype))

  in_block = ROWS // q.tile[axis]
  values = poison(q.values, num_blocks * ROWS)
  return quantized.Quantized(
    values, poison(q.scales, num_blocks * in_block), q.tile
  )


def assert_same(got, want):
  """As two implementations that multiply the same quantised operands."""
  assert got.shape == want.shape and got.dtype == want.dtype
  bound = numerics.SAME_OPERANDS[want.dtype.name]
  error = numerics.relative_error(got, want)
  assert error <= bound, f'{error} > {bound}'


def assert_bitwise(got, want):
  """The same bits, leaf by leaf."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  for x, y in zip(got, want, strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_array_equal(_bits(x), _bits(y))


def _bits(x):
  x = np.asarray(x)
  return x.view(f'u{x.dtype.itemsize}')
