"""Quantisers of activations and gradients for every implementation.

`rows` are 1 x 128 tiles of [M, D]; `columns` those of its transpose [D, M];
`both` makes the two in one pass over x; `transposed` makes columns of what is
FP8 already, by dequantising, transposing and quantising anew (TR 3.3.2). All
take `pow2` and `floor` as `reference.quantize` does.
"""

from jaxtyping import Array, Float

from pallas_kernels import dispatch, quantized
from pallas_kernels.fp8_matmul import reference

Quantized = quantized.Quantized


def rows(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> Quantized:
  """Tiles 1 x 128 of x: XLA makes one pass of it on every device."""
  dispatch.resolve(implementation)
  return reference.quantize(x_MD, pow2=pow2, floor=floor)


def columns(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> Quantized:
  """Tiles 1 x 128 of x^T."""
  dispatch.resolve(implementation)
  return reference.quantize(x_MD.T, pow2=pow2, floor=floor)


def both(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> tuple[Quantized, Quantized]:
  """`rows` and `columns` of x, read once."""
  dispatch.resolve(implementation)
  return reference.quantize_both(x_MD, pow2=pow2, floor=floor)


def transposed(
  q: Quantized,
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> Quantized:
  """`columns` of the tensor that q stands for."""
  dispatch.resolve(implementation)
  return reference.requantize_transposed(q, pow2=pow2, floor=floor)
