"""Quantisers of activations and gradients for every implementation.

`rows` are 1 x 128 tiles of [M, D]; `columns` those of its transpose [D, M];
`both` gives the two in one pass over x; `transposed` gives columns of an FP8
tensor, which is dequantised, transposed and quantised again (TR 3.3.2). All
take `pow2` and `floor` as `reference.quantize` does.

Kernels exist where XLA needs more than one pass: for `both`, and on Hopper for
`transposed`. The rest is elementwise with a maximum over 128, which XLA fuses
with the producer of x.
"""

from jaxtyping import Array, Float

from pallas_kernels import dispatch, quantized
from pallas_kernels.fp8_matmul import quantize_gpu, quantize_tpu, reference

Quantized = quantized.Quantized


def rows(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> Quantized:
  """Tiles 1 x 128 of x: one pass of XLA on every device."""
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
  return rows(x_MD.T, pow2=pow2, floor=floor, implementation=implementation)


def both(
  x_MD: Float[Array, 'M D'],
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> tuple[Quantized, Quantized]:
  """`rows` and `columns` of x, read once.

  Raises:
    NotImplementedError: 'pallas' on Hopper, whose kernel is for BF16.
  """

  def unsupported(kernel: str) -> str | None:
    is_gpu = kernel == 'pallas_gpu'
    return quantize_gpu.unsupported(x_MD) if is_gpu else None

  chosen = dispatch.resolve(implementation, 'fp8 rows and columns', unsupported)
  options = {'pow2': pow2, 'floor': floor}
  if chosen == 'reference':
    return reference.quantize_both(x_MD, **options)
  if chosen == 'pallas_gpu':
    return quantize_gpu.quantize_both(x_MD, **options)
  interpret = chosen == 'pallas_interpret'
  return quantize_tpu.quantize_both(x_MD, **options, interpret=interpret)


def transposed(
  q: Quantized,
  *,
  pow2: bool = False,
  floor: float = 0.0,
  implementation: str = 'auto',
) -> Quantized:
  """`columns` of the tensor that q stands for."""
  options = {'pow2': pow2, 'floor': floor}
  chosen = dispatch.resolve(implementation)
  if chosen == 'pallas_gpu':
    return quantize_gpu.requantize_transposed(q, **options)
  return reference.requantize_transposed(q, **options)
