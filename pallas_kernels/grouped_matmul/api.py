"""FP8 products of many experts: arguments checked once for all implementations.

Rows are sorted by expert and padded to blocks of 128 (see `reference`).

  Fprop  y = x W_e     grouped    a: x   [J, D]   b: W^T [E, F, D]   BF16
  Dgrad  dx = dy W_e^T grouped    a: dy  [J, F]   b: W   [E, D, F]   BF16
  Wgrad  dW_e = x^T dy grouped_k  a: x^T [D, J]   b: dy^T [F, J]     f32
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, quantized
from pallas_kernels.fp8_matmul import pallas_gpu as fp8_gpu
from pallas_kernels.grouped_matmul import pallas_gpu, pallas_tpu, reference

Quantized = quantized.Quantized
ROWS = reference.ROWS


def grouped(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  implementation: str = 'auto',
) -> Float[Array, 'J N']:
  """Each block of 128 rows times its expert's b^T; unused blocks give zeros.

  Args:
    a: [J, K], J a multiple of 128, tiles 1 x 128. b: [E, N, K], tiles
      128 x 128. expert_j: int32, of each block, without order. num_blocks: in
      use, from the first.
  Raises:
    ValueError: shapes, tiles or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation.
  """
  rows, depth = a.shape
  _check('a', a, quantized.ROW, (rows, depth))
  _check('b', b, quantized.BLOCK, (*b.shape[:2], depth))
  _check_blocks(rows, expert_j)
  chosen = _choose(implementation, a, b)
  args = (a, b, expert_j, num_blocks, out_dtype)
  if chosen == 'reference':
    return reference.grouped(*args)
  if chosen == 'pallas_gpu':
    return pallas_gpu.grouped(*args)
  return pallas_tpu.grouped(*args, interpret=chosen == 'pallas_interpret')


def grouped_k(
  a: Quantized,
  b: Quantized,
  expert_j: Int[Array, 'j'],
  num_blocks: Int[Array, ''],
  num_experts: int,
  implementation: str = 'auto',
) -> Float[Array, 'E D F']:
  """Sum over each expert's blocks of K = 128 of a b^T; f32, zeros for none.

  Args:
    a: [D, J]. b: [F, J]. J a multiple of 128; tiles 1 x 128. expert_j: sorted.
  Raises:
    ValueError: shapes, tiles or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation.
  """
  rows = a.shape[-1]
  _check('a', a, quantized.ROW, (a.shape[0], rows))
  _check('b', b, quantized.ROW, (b.shape[0], rows))
  _check_blocks(rows, expert_j)
  chosen = _choose(implementation, a, b)
  args = (a, b, expert_j, num_blocks, num_experts)
  if chosen == 'reference':
    return reference.grouped_k(*args)
  if chosen == 'pallas_gpu':
    return pallas_gpu.grouped_k(*args)
  return pallas_tpu.grouped_k(*args, interpret=chosen == 'pallas_interpret')


def _choose(implementation: str, a: Quantized, b: Quantized) -> str:
  def unsupported(kernel: str) -> str | None:
    return fp8_gpu.unsupported(a, b) if kernel == 'pallas_gpu' else None

  return dispatch.resolve(implementation, 'grouped_matmul', unsupported)


def _check(name: str, q: Quantized, tile, shape: tuple[int, ...]) -> None:
  if q.shape != shape:
    raise ValueError(f'{name}.shape={q.shape} must be {shape}')
  if q.tile != tile:
    raise ValueError(f'{name}.tile={q.tile} must be {tile}')
  tiles = [-(-s // t) for s, t in zip(shape[-2:], tile, strict=True)]
  want = (*shape[:-2], *tiles)
  if q.scales.shape != want:
    raise ValueError(f'{name}.scales.shape={q.scales.shape} must be {want}')


def _check_blocks(rows: int, expert_j) -> None:
  if rows % ROWS or expert_j.shape != (rows // ROWS,):
    raise ValueError(
      f'{rows} rows must be a multiple of {ROWS} with one expert a block, '
      f'expert_j.shape={expert_j.shape}'
    )
