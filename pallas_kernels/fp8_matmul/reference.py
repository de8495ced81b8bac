"""The FP8 product in plain jnp (TR 3.3.2).

  scale = amax / 448 of the tile            value = e4m3(x * (1 / scale))
  y_mn = sum_k scale_mk scale_nk (sum over the 128 of block k: a * b)

Sums within a block of K = 128 and over the blocks are f32; the blocks are added
in order ("promotion"). A scale is amax / largest or, with `pow2`, the least
power of two that is no smaller (UE8M0, rounded up). A tile without a normal f32
number is zero (scale 1), and other scales are at least 2^-116: then a denormal
number becomes the value 0, and no value * scale is denormal, so that a device
that flushes denormals gets the same. `floor` is a lower bound of amax, in
released code 1e-4; gradients of a mean over many tokens are smaller than that,
so they get 0.

Letters: M rows, D columns; M, N, K of a product as in BLAS (lower case: tiles
of 128).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import quantized

Quantized = quantized.Quantized

SMALLEST_SCALE = np.float32(2.0**-116)
SMALLEST_NORMAL = np.finfo(np.float32).tiny
_UNROLLED = 16  # blocks of K up to which the loop is written out


def quantize(
  x: Float[Array, '*lead M D'],
  tile: tuple[int, int] = quantized.ROW,
  *,
  pow2: bool = False,
  floor: float = 0.0,
  dtype: jax.typing.DTypeLike = quantized.E4M3,
) -> Quantized:
  """Rounds each tile under its own scale, to nearest even (TR 3.3.2).

  Args:
    x: any float dtype; the arithmetic is f32. NaN stays NaN and infinities
      become it; the rest of such a tile is undefined. No gradient is defined.
    tile: rows and columns that share a scale.
    pow2: scales are powers of two.
    floor: least amax of a tile.
    dtype: E4M3, or float8_e5m2 for wider exponents.
  """
  with jax.named_scope('quantize'):
    x = x.astype(jnp.float32)
    scales = scale_of(_largest(x, tile), pow2=pow2, floor=floor, dtype=dtype)
    inverse = spread(1.0 / scales, tile, x.shape)
    return Quantized((x * inverse).astype(dtype), scales, tile)


def quantize_both(
  x_MD: Float[Array, 'M D'], **options
) -> tuple[Quantized, Quantized]:
  """Rows of x and rows of its transpose: tiles 1 x 128 of [M, D] and [D, M]."""
  return quantize(x_MD, **options), quantize(x_MD.T, **options)


def quantize_weight(
  w: Float[Array, '*lead D F'], **options
) -> tuple[Quantized, Quantized]:
  """Blocks of w in both orientations: [..., F, D] (Fprop) and [..., D, F]."""
  q = quantize(w, quantized.BLOCK, **options)
  return transpose(q), q


def transpose(q: Quantized) -> Quantized:
  """The transposed matrix; exact, and only for square tiles."""
  if q.tile[0] != q.tile[1]:
    raise ValueError(f'tile={q.tile} must be square to be transposed')
  swap = lambda x: jnp.swapaxes(x, -1, -2)
  return Quantized(swap(q.values), swap(q.scales), q.tile)


def requantize_transposed(q: Quantized, **options) -> Quantized:
  """1 x 128 tiles of [M, D] -> of [D, M]: dequantise, transpose, quantise."""
  return quantize(dequantize(q).T, **options)


def dequantize(
  q: Quantized, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, '*lead M D']:
  """value * scale in f32, then cast to `dtype`."""
  with jax.named_scope('dequantize'):
    scales = spread(q.scales, q.tile, q.shape)
    return (q.values.astype(jnp.float32) * scales).astype(dtype)


def matmul(
  a: Quantized, b: Quantized, out_dtype: jax.typing.DTypeLike
) -> Float[Array, 'M N']:
  """a b^T with promotion every 128 of K.

  Args:
    a: [M, K]. b: [N, K]. Tiles of 128 columns; any number of rows.
  """
  (rows, depth), columns = a.shape, b.shape[0]
  blocks = a.scales.shape[1]
  # Every FP8 number is a BF16 number: the products are the same, and faster.
  # But XLA's CPU backend cannot multiply BF16 by its transpose, to which it
  # rewrites a single block.
  dtype = jnp.bfloat16 if blocks > 1 else jnp.float32
  split = lambda q: _pad_columns(q.values.astype(dtype), depth).reshape(
    q.shape[0], blocks, 128
  )
  a_MkI, b_NkI = split(a), split(b)
  scale_Mk, scale_Nk = row_scales(a), row_scales(b)

  def add(k, sum_MN):
    at = lambda x: jax.lax.dynamic_index_in_dim(x, k, 1, keepdims=False)
    part_MN = jax.lax.dot_general(
      at(a_MkI),
      at(b_NkI),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return sum_MN + part_MN * (at(scale_Mk)[:, None] * at(scale_Nk)[None])

  sum_MN = jnp.zeros((rows, columns), jnp.float32)
  if blocks <= _UNROLLED:
    for k in range(blocks):
      sum_MN = add(k, sum_MN)
  else:
    sum_MN = jax.lax.fori_loop(0, blocks, add, sum_MN)
  return sum_MN.astype(out_dtype)


def row_scales(q: Quantized) -> Float[Array, '*lead M d']:
  """The scales of every row."""
  return jnp.repeat(q.scales, q.tile[0], axis=-2)[..., : q.shape[-2], :]


def scale_of(amax, *, pow2: bool, floor: float, dtype):
  """Scales of tiles by their largest magnitudes, f32."""
  amax = jnp.maximum(amax, floor) if floor else amax
  largest = float(jnp.finfo(dtype).max)
  if pow2:
    scale = _least_power(amax, largest)
  else:
    scale = amax * np.float32(1.0 / largest)
  scale = jnp.maximum(scale, SMALLEST_SCALE)
  return jnp.where(amax < SMALLEST_NORMAL, np.float32(1.0), scale)


def _least_power(amax, largest: float):
  """The least 2^k with amax <= largest * 2^k, by the bits: nothing rounds."""
  bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
  mantissa, exponent = bits & 0x7FFFFF, bits >> 23
  limit = int(np.float32(largest).view(np.int32))
  k = exponent - (limit >> 23) + (mantissa > limit & 0x7FFFFF)
  k = jnp.clip(k + 127, 1, 254)
  return jax.lax.bitcast_convert_type(k << 23, jnp.float32)


def _largest(x, tile: tuple[int, int]):
  """Largest magnitude of every tile."""
  pad = [(0, -size % by) for size, by in zip(x.shape[-2:], tile, strict=True)]
  x = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 2) + pad)
  *lead, rows, columns = x.shape
  split = (rows // tile[0], tile[0], columns // tile[1], tile[1])
  return jnp.max(x.reshape(*lead, *split), axis=(-3, -1))


def spread(scales, tile: tuple[int, int], shape: tuple[int, ...]):
  """The scale of every element."""
  rows = jnp.repeat(scales, tile[0], axis=-2)[..., : shape[-2], :]
  return jnp.repeat(rows, tile[1], axis=-1)[..., : shape[-1]]


def _pad_columns(x, depth: int):
  return jnp.pad(x, ((0, 0), (0, -depth % 128)))
