"""The one type for quantised tensors, and the formats of its values.

A tile of a tensor (rows x columns) shares one f32 scale: tensor ~ value *
scale. Tiles at the lower and right edges may be partial. Activations have tiles
of 1 x 128, weights of 128 x 128 (TR 3.3.2); every product contracts the last
dim of both of its operands, which is the only order that Hopper's FP8 tensor
cores take.

Letters: M rows, D columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

E4M3 = jnp.float8_e4m3fn
ROW = (1, 128)  # of activations and their gradients
BLOCK = (128, 128)  # of weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """value * scale of the value's tile; a pytree of the two arrays.

  values: e4m3 or e5m2 [..., M, D]. scales: f32 [..., ceil(M / tile[0]),
  ceil(D / tile[1])]. tile: rows and columns that share a scale; static.
  """

  # Any: a tree of this form also holds shapes or shardings.
  values: Any
  scales: Any
  tile: tuple[int, int] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor: of `values`."""
    return self.values.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """E5M6 numbers, two in three bytes, with a scale per 1 x 128 tile (TR 3.3.3).

  codes: uint8 [..., M, 3 * ceil(D / 2)]. scales: f32 [..., M, ceil(D / 128)],
  powers of two. columns: D; static.
  """

  codes: Any
  scales: Any
  columns: int = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    return (*self.codes.shape[:-1], self.columns)
