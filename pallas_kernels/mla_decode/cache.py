"""The paged latent cache: two arrays of pages of 64 tokens (TR 2.1.1).

A token has a normed latent of C values and a rotated key of R. They are two
arrays, as a TPU pads rows of 576 to 640. In FP8 a token of DeepSeek-V3 has 656
bytes: 512 values in e4m3, an f32 scale for each 128 of them, and 64 rotary
values that stay in BF16, since rounding them moves the scores most.

Letters: p pages, s tokens of a page; others as in CONTRIBUTING.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import reference as formats

PAGE = 64  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentPages:
  """Pages of latents and of rotary keys; block tables give the pages of rows.

  c_psC: BF16 or f32 [pages, 64, C], or `Quantized` e4m3 of that shape with
  tiles 1 x 128. k_rope_psR: BF16 or f32 [pages, 64, R].
  """

  # Any: a tree of this form also holds shapes or shardings.
  c_psC: Any
  k_rope_psR: Any

  @property
  def is_quantized(self) -> bool:
    return isinstance(self.c_psC, quantized.Quantized)

  @property
  def pages(self) -> int:
    return self.k_rope_psR.shape[0]


def quantize(cache: LatentPages) -> LatentPages:
  """Latents in e4m3, 128 of a token under one scale; rotary keys as they are.

  Also for new tokens instead of pages, as every token has scales of its own.
  """
  return dataclasses.replace(cache, c_psC=formats.quantize(cache.c_psC))


def dequantize(cache: LatentPages, dtype: jax.typing.DTypeLike) -> LatentPages:
  """Latents as value * scale in f32, rounded to `dtype` if that is less."""
  if not cache.is_quantized:
    return cache
  c_psC = formats.dequantize(cache.c_psC, dtype)
  return dataclasses.replace(cache, c_psC=c_psC)


def bits(x: jax.Array) -> jax.Array:
  """On CPU, numbers of less than 32 bits as integers; elsewhere x itself.

  XLA:CPU has no arithmetic on these types: to gather or scatter a few tokens of
  a cache it would widen all of it. On other devices this would be a copy.
  """
  unsigned = {1: jnp.uint8, 2: jnp.uint16}
  if jax.default_backend() != 'cpu' or x.dtype.itemsize not in unsigned:
    return x
  return jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize])


def from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The inverse of `bits`."""
  same = x.dtype == dtype  # a bitcast would have no gradient
  return x if same else jax.lax.bitcast_convert_type(x, dtype)


def bytes_per_token(cache: LatentPages) -> int:
  """Bytes of one token, scales included."""
  leaves = jax.tree.leaves(cache)
  size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in leaves)
  return size // (cache.pages * PAGE)
