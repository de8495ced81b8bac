"""FP8 products and quantisers: arguments checked once for every implementation.

One product serves all three GEMMs of a Linear (TR 3.3.1), as every operand has
the contracted dim last:

  Fprop  y = x W     a: x   [M, D] 1 x 128   b: W^T [F, D] 128 x 128   BF16
  Dgrad  dx = dy W^T a: dy  [M, F] 1 x 128   b: W   [D, F] 128 x 128   BF16
  Wgrad  dW = x^T dy a: x^T [D, M] 1 x 128   b: dy^T [F, M] 1 x 128    f32
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, quantized
from pallas_kernels.fp8_matmul import pallas_gpu, pallas_tpu, reference

Quantized = quantized.Quantized


def matmul(
  a: Quantized,
  b: Quantized,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  implementation: str = 'auto',
) -> Float[Array, 'M N']:
  """a b^T, f32 sums promoted every 128 of K (TR 3.3.2).

  Args:
    a: [M, K], tiles 1 x 128. b: [N, K], tiles 128 x 128 or 1 x 128. Any size.
  Raises:
    ValueError: shapes, tiles or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation.
  """
  _check(a, b)

  def unsupported(kernel: str) -> str | None:
    return pallas_gpu.unsupported(a, b) if kernel == 'pallas_gpu' else None

  chosen = dispatch.resolve(implementation, 'fp8_matmul', unsupported)
  if chosen == 'reference':
    return reference.matmul(a, b, out_dtype)
  if chosen == 'pallas_gpu':
    return pallas_gpu.matmul(a, b, out_dtype)
  interpret = chosen == 'pallas_interpret'
  return pallas_tpu.matmul(a, b, out_dtype, interpret=interpret)


def _check(a: Quantized, b: Quantized) -> None:
  for name, q, tiles in (
    ('a', a, (quantized.ROW,)),
    ('b', b, (quantized.ROW, quantized.BLOCK)),
  ):
    if len(q.shape) != 2:
      raise ValueError(f'{name}.shape={q.shape} must have two dims')
    if q.tile not in tiles:
      raise ValueError(f'{name}.tile={q.tile} must be in {tiles}')
    want = tuple(-(-s // t) for s, t in zip(q.shape, q.tile, strict=True))
    if q.scales.shape != want:
      raise ValueError(f'{name}.scales.shape={q.scales.shape} must be {want}')
  if a.shape[1] != b.shape[1]:
    raise ValueError(f'a.shape={a.shape} and b.shape={b.shape} must share K')
