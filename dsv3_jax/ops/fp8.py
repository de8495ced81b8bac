"""FP8 (e4m3) tensors with one f32 scale per tile (TR 3.3.2).

  scale = amax / 448 of the tile        value = e4m3(w * (1 / scale))
  w ~ value * scale                     |error| <= max(|w| / 17, scale / 1024)

The error holds up to f32's own rounding. Weights have tiles of 128 x 128, as in
the published checkpoint, where the scales are called `weight_scale_inv`;
partial tiles at the lower and right edges count as padded with zeros; unlike
in released code amax is not held above 1e-4: tiny weights keep their digits.

A tile without a normal f32 number is zero (scale 1), and other scales are at
least 2^-116: there a denormal is at most a tie with zero, so that a device may
flush denormals or not, and no value * scale is one either. None overflows:
amax * f32(1 / 448) * 448 is f32's maximum at most.

`*_host` are the same functions, bit for bit, of NumPy arrays that are streamed
to and from files. XLA turns a division by a broadcast or by a constant into a
product with the reciprocal; here both say so themselves.

Letters: I rows, J columns, i and j their tiles.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from dsv3_jax import errors

E4M3 = jnp.float8_e4m3fn
TILE = (128, 128)

_INVERSE = np.float32(1.0 / 448.0)  # of the largest e4m3
_SMALLEST_SCALE = np.float32(2.0**-116)
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
# Three times as fast as a cast.
_DECODED = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """value * scale of the value's tile; a pytree of the two arrays.

  values: e4m3 [..., I, J]. scales: f32 [..., ceil(I / tile[0]),
  ceil(J / tile[1])]. tile: rows and columns that share a scale; static.
  """

  # Any: a tree of this form also holds shapes or shardings.
  values: Any
  scales: Any
  tile: tuple[int, int] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor: of `values`."""
    return self.values.shape


def quantize_blocks(
  w_IJ: Float[Array, '*lead I J'], tile: tuple[int, int] = TILE
) -> Quantized:
  """Rounds each tile to e4m3 under its own scale (TR 3.3.2).

  Args:
    w_IJ: any float dtype; the arithmetic is f32. NaN stays NaN and infinities
      become it; the rest of such a tile is undefined, as XLA's maximum loses
      NaN on CPU. No gradient is defined: JAX would round it to e4m3.
    tile: rows and columns that share a scale.
  """
  with jax.named_scope('quantize'):
    w_IJ = w_IJ.astype(jnp.float32)
    scales_ij = _scales(_largest(w_IJ, tile), jnp)
    inverse_IJ = _spread(1.0 / scales_ij, tile, w_IJ.shape)
    return Quantized((w_IJ * inverse_IJ).astype(E4M3), scales_ij, tile)


def dequantize(
  q: Quantized, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, '*lead I J']:
  """value * scale in f32, then cast to `dtype`."""
  with jax.named_scope('dequantize'):
    scales_IJ = _spread(q.scales, q.tile, q.shape)
    return (q.values.astype(jnp.float32) * scales_IJ).astype(dtype)


def quantize_host(
  w_IJ: Float32[np.ndarray, 'I J'], name: str
) -> tuple[Float8e4m3fn[np.ndarray, 'I J'], Float32[np.ndarray, 'i j']]:
  """`quantize_blocks` of a host array: values_IJ and scales_ij.

  Args:
    name: of the tensor, for the error.
  Raises:
    InputError: a number is NaN or infinite.
  """
  (rows, columns), (high, wide) = w_IJ.shape, TILE
  values_IJ = np.empty(w_IJ.shape, E4M3)
  scales_ij = np.empty((-(-rows // high), -(-columns // wide)), np.float32)
  # A band at a time: temporaries of 128 rows stay small, and in the cache.
  for i, top in enumerate(range(0, rows, high)):
    band_IJ = w_IJ[top : top + high]
    amax_J = np.max(np.abs(band_IJ), axis=0)
    if not np.all(np.isfinite(amax_J)):
      row, column = np.argwhere(~np.isfinite(band_IJ))[0]
      raise errors.InputError(
        f'{name} holds a NaN or an infinity, first in row {top + row}, column '
        f'{column}: a tensor must be finite to be stored in FP8'
      )
    amax_J = np.pad(amax_J, (0, -columns % wide))
    scales_ij[i] = _scales(np.max(amax_J.reshape(-1, wide), axis=1), np)
    inverse_J = np.repeat(np.float32(1.0) / scales_ij[i], wide)[:columns]
    values_IJ[top : top + high] = band_IJ * inverse_J
  return values_IJ, scales_ij


def dequantize_host(
  values_IJ: Float8e4m3fn[np.ndarray, 'I J'],
  scales_ij: Float32[np.ndarray, 'i j'],
  first_row: int = 0,
) -> Float32[np.ndarray, 'I J']:
  """`dequantize` of a host array, or of some of its rows, in f32.

  Args:
    values_IJ: rows from `first_row` of the tensor, any number of them.
    scales_ij: of the whole tensor.
  Raises:
    ValueError: the scales are too few rows, or another number of columns.
  """
  (rows, columns), (high, wide) = values_IJ.shape, TILE
  end = first_row + rows
  want = (-(-end // high), -(-columns // wide))
  if scales_ij.shape[0] < want[0] or scales_ij.shape[1] != want[1]:
    raise ValueError(
      f'scales_ij.shape={scales_ij.shape} must be at least {want[0]} by '
      f'{want[1]} for rows {first_row} to {end} of {columns} columns'
    )
  out_IJ = np.empty(values_IJ.shape, np.float32)
  codes_IJ = values_IJ.view(np.uint8)
  for i in range(first_row // high, want[0]):
    top, stop = max(i * high - first_row, 0), (i + 1) * high - first_row
    band_IJ = out_IJ[top:stop]
    np.take(_DECODED, codes_IJ[top:stop], out=band_IJ, mode='clip')
    band_IJ *= np.repeat(scales_ij[i], wide)[:columns]
  return out_IJ


def _scales(amax_ij, xp: types.ModuleType):
  """Scales of tiles by their largest magnitudes; xp is jnp or np."""
  held_ij = xp.maximum(amax_ij * _INVERSE, _SMALLEST_SCALE)
  return xp.where(amax_ij < _SMALLEST_NORMAL, np.float32(1.0), held_ij)


def _largest(w_IJ, tile: tuple[int, int]):
  """Largest magnitude of every tile."""
  pad = [
    (0, -size % by) for size, by in zip(w_IJ.shape[-2:], tile, strict=True)
  ]
  w_IJ = jnp.pad(jnp.abs(w_IJ), [(0, 0)] * (w_IJ.ndim - 2) + pad)
  *lead, rows, columns = w_IJ.shape
  split = (rows // tile[0], tile[0], columns // tile[1], tile[1])
  return jnp.max(w_IJ.reshape(*lead, *split), axis=(-3, -1))


def _spread(scales_ij, tile: tuple[int, int], shape: tuple[int, ...]):
  """The scale of every element."""
  rows_Ij = jnp.repeat(scales_ij, tile[0], axis=-2)[..., : shape[-2], :]
  return jnp.repeat(rows_Ij, tile[1], axis=-1)[..., : shape[-1]]
