"""Registers of a Hopper warpgroup, as wgmma has them, and its products.

A tile is a matrix over the registers of a warpgroup. A row is a vector with a
number for each row of a tile, a column one for each of its columns. Layouts are
always given: the search for missing ones is slow.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat

plgpu = compat.mosaic_gpu

ROWS = 64  # of one wgmma


def tile(x):
  """x in the layout of a wgmma output."""
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def row(x):
  """A number for each row of a tile."""
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def column(x):
  """A number for each column of a tile."""
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))


def from_rows(x, shape: tuple[int, int]):
  """The number of each element's row."""
  return tile(lax.broadcast_in_dim(x, shape, (0,)))


def from_columns(x, shape: tuple[int, int]):
  """The number of each element's column."""
  return tile(lax.broadcast_in_dim(x, shape, (1,)))


def iota(shape: tuple[int, int], dim: int):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA
  )


def zeros(shape: tuple[int, int]):
  return tile(jnp.zeros(shape, jnp.float32))


def add(sums: tuple, pairs: tuple, staging=None) -> tuple:
  """Each of `sums` plus the product of its pair, all in flight at once.

  staging: memory for a left operand, used by the interpreter only: it supports
  neither left operands in registers nor accumulators with an initial value.
  (Its fence can hide that the caller lacks one.)
  """
  if staging is not None:
    return tuple(
      tile(total + _staged_product(total.shape, *pair, staging))
      for total, pair in zip(sums, pairs, strict=True)
    )

  def multiply(accumulators):
    for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
      plgpu.wgmma(accumulator, a, b)

  begun = tuple(plgpu.ACC.init(x) for x in sums)
  return tuple(tile(x) for x in pl.run_state(multiply)(begun))


def _staged_product(shape, a, b, staging):
  if isinstance(a, jax.Array):
    memory = staging.at[:, pl.ds(0, a.shape[1])]
    memory[...] = a
    plgpu.commit_smem()
    a = memory
  return products(shape, [(a, b)])[0]


def products(shape: tuple[int, int], *sums_of, then=lambda: None) -> list:
  """Sums of the pairs' products, f32. `then` is called while they run."""

  def multiply(*accumulators):
    for accumulator, pairs in zip(accumulators, sums_of, strict=True):
      for a, b in pairs:
        plgpu.wgmma(accumulator, a, b)
    then()
    return [accumulator[...] for accumulator in accumulators]

  accumulators = [plgpu.ACC(shape, jnp.float32) for _ in sums_of]
  return [tile(x) for x in pl.run_scoped(multiply, *accumulators)]
