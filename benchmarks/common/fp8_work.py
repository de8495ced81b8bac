"""The products and quantisations that `fp8_matmul` times, with their inputs.

Letters as in `pallas_kernels`. A call runs through several sets of inputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import api, cases, quantizers, reference
from pallas_kernels.grouped_matmul import api as grouped_api
from pallas_kernels.grouped_matmul import cases as grouped_cases

BF16, E4M3, F32 = jnp.bfloat16, quantized.E4M3, jnp.float32
BF16_DOT, FP8_DOT = 'bf16 dot', 'fp8 dot, one scale a tensor'
ROW, BLOCK = quantized.ROW, quantized.BLOCK


@dataclasses.dataclass(frozen=True)
class Variant:
  """`run(*inputs of a set)`; `inputs` makes these of the drawn arrays.

  implementation: '' for a ceiling. comparable: it computes what `exact` does.
  """

  run: Callable[..., Any]
  inputs: Callable[..., tuple]
  implementation: str = ''
  comparable: bool = True


@dataclasses.dataclass(frozen=True)
class Work:
  """One row group of the table.

  draw: key -> the BF16 arrays of a set. exact: of these arrays, in f32.
  decode: an output of an implementation -> what compares with `exact`.
  flop, bytes: of one set; bytes: every operand once, as FP8 with its scales.
  """

  op: str
  case: str
  flop: float
  bytes: float
  draw: Callable[[jax.Array], tuple]
  exact: Callable[..., jax.Array]
  variants: dict[str, Variant]
  decode: Callable[[Any], jax.Array] = lambda out: out


def same(*arrays):
  """Inputs of a variant that takes what was drawn."""
  return arrays


def product(
  op: str, name: str, case: cases.Case, implementations: tuple[str, ...]
) -> Work:
  """'forward' (1D x 2D, BF16) or 'weight gradient' (1D x 1D, f32) of a case.

  The weight gradient contracts the case's M: K x N of a linear, from M tokens.
  """
  m, n, k = case
  out, tile = BF16, BLOCK
  if op == 'weight gradient':
    (m, n, k), out, tile = (k, n, m), F32, ROW

  def pair(a_MK, b_NK):
    return reference.quantize(a_MK), reference.quantize(b_NK, tile)

  variants = _ceilings(_dot, out)
  for choice in implementations:
    run = functools.partial(api.matmul, out_dtype=out, implementation=choice)
    variants[choice] = Variant(run, pair, choice)
  return Work(
    op=op,
    case=f'{name} {m}x{n}x{k}',
    flop=2.0 * m * n * k,
    bytes=_bytes((m, k))
    + _bytes((n, k), tile)
    + m * n * jnp.dtype(out).itemsize,
    draw=lambda key: (_normal(key, 0, (m, k)), _normal(key, 1, (n, k))),
    exact=_exact(_dot),
    variants=variants,
  )


def grouped(
  name: str, case: grouped_cases.Case, implementations: tuple[str, ...]
) -> Work:
  """Rows of experts of equal size times each expert's weights, BF16."""
  count, size, rows, blocks = _groups(case)
  n, k = case.n, case.k

  def quantize(a_JK, b_ENK):
    return reference.quantize(a_JK), reference.quantize(b_ENK, BLOCK)

  def dots(a_JK, b_ENK, out):
    a_EMK = a_JK.reshape(count, size, k)
    y_EMN = jnp.einsum('emk,enk->emn', a_EMK, b_ENK, **_precise(out))
    return y_EMN.reshape(rows, n)

  variants = _ceilings(dots, BF16, lambda a_JK, b_ENK: (a_JK, b_ENK[0]))
  for choice in implementations:
    run = lambda a, b, choice=choice: grouped_api.grouped(
      a, b, *blocks(), out_dtype=BF16, implementation=choice
    )
    variants[choice] = Variant(run, quantize, choice)
  return Work(
    op='grouped forward',
    case=f'{name} {count}x{size}x{n}x{k}',
    flop=2.0 * rows * n * k,
    bytes=_bytes((rows, k)) + count * _bytes((n, k), BLOCK) + rows * n * 2.0,
    draw=lambda key: (
      _normal(key, 0, (rows, k)),
      _normal(key, 1, (count, n, k)),
    ),
    exact=_exact(dots),
    variants=variants,
  )


def grouped_k(
  name: str, case: grouped_cases.Case, implementations: tuple[str, ...]
) -> Work:
  """Weight gradients of experts of equal size, f32."""
  count, size, rows, blocks = _groups(case)
  n, k = case.n, case.k

  def quantize(a_KJ, b_NJ):
    return reference.quantize(a_KJ), reference.quantize(b_NJ)

  def dots(a_KJ, b_NJ, out):
    split = lambda x: x.reshape(x.shape[0], count, size)
    options = _precise(out)
    return jnp.einsum('kes,nes->ekn', split(a_KJ), split(b_NJ), **options)

  variants = _ceilings(dots, F32)
  for choice in implementations:
    run = lambda a, b, choice=choice: grouped_api.grouped_k(
      a, b, *blocks(), num_experts=count, implementation=choice
    )
    variants[choice] = Variant(run, quantize, choice)
  return Work(
    op='grouped weight gradient',
    case=f'{name} {count}x{k}x{n}x{size}',
    flop=2.0 * rows * n * k,
    bytes=_bytes((k, rows)) + _bytes((n, rows)) + 4.0 * count * k * n,
    draw=lambda key: (_normal(key, 0, (k, rows)), _normal(key, 1, (n, rows))),
    exact=_exact(dots),
    variants=variants,
  )


def quantisation(
  op: str, rows: int, columns: int, implementations: tuple[str, ...]
) -> Work:
  """'rows' or 'both' of BF16 activations, or 'transposed' of FP8 ones."""
  make = {
    'rows': quantizers.rows,
    'both': quantizers.both,
    'transposed': quantizers.transposed,
  }[op]
  inputs = same
  if op == 'transposed':
    inputs = lambda x_MD: (reference.quantize(x_MD),)
  variants = {}
  for choice in implementations:
    run = functools.partial(make, implementation=choice)
    variants[choice] = Variant(run, inputs, choice)

  def decode(out):  # the transpose of the input
    if op == 'rows':
      return reference.dequantize(out)
    if op == 'transposed':
      return reference.dequantize(out).T
    return jnp.stack(
      [reference.dequantize(out[0]), reference.dequantize(out[1]).T]
    )

  fp8 = _bytes((rows, columns))
  other = _bytes((columns, rows))
  given_bytes = fp8 if op == 'transposed' else 2.0 * rows * columns
  exact = lambda x_MD: (
    jnp.stack([x_MD, x_MD]) if op == 'both' else x_MD
  ).astype(F32)
  return Work(
    op=f'quantise {op}',
    case=f'{rows}x{columns}',
    flop=0.0,
    bytes=given_bytes + {'rows': fp8, 'both': fp8 + other}.get(op, other),
    draw=lambda key: (_normal(key, 0, (rows, columns)),),
    exact=exact,
    variants=variants,
    decode=decode,
  )


def _groups(case: grouped_cases.Case):
  """Experts, rows of each, rows in all, and the blocks' arguments."""
  count, size = len(case.sizes), case.sizes[0]
  assert set(case.sizes) == {size} and size % grouped_api.ROWS == 0
  rows = count * size

  def blocks():
    per_expert = size // grouped_api.ROWS
    expert_j = jnp.repeat(jnp.arange(count, dtype=jnp.int32), per_expert)
    return expert_j, jnp.int32(count * per_expert)

  return count, size, rows, blocks


def _dot(a_MK, b_NK, out):
  return jax.lax.dot_general(
    a_MK, b_NK, (((1,), (1,)), ((), ())), **_precise(out)
  )


def _precise(out) -> dict[str, Any]:
  """Inputs as they are, f32 sums; `out` None: the most exact that f32 can."""
  if out is None:
    return {'precision': jax.lax.Precision.HIGHEST}
  return {'preferred_element_type': out}


def _exact(dots):
  wide = lambda x: x.astype(F32)
  return lambda a, b: dots(wide(a), wide(b), None)


def _ceilings(dots, out, one=same) -> dict[str, Variant]:
  """Products of the device's library with as many operations.

  one: two matrices of as many operations as `dots`, for the product with one
  scale a tensor, which knows no experts.
  """

  def scaled(a, b):
    a, b = one(a, b)
    return *_per_tensor(a), *_per_tensor(b)

  def fp8_dot(a, scale_a, b, scale_b):
    if jax.default_backend() == 'cpu':  # where the form below is a BF16 dot
      return (_dot(a, b, F32) * (scale_a * scale_b)).astype(out)
    # XLA makes one call of cuBLASLt of this, scales and output type inside.
    wide = lambda x, scale: x.astype(BF16) * scale.astype(BF16)
    return _dot(wide(a, scale_a), wide(b, scale_b), out)

  bf16 = lambda a, b: dots(a, b, out)
  return {
    BF16_DOT: Variant(bf16, same),
    FP8_DOT: Variant(fp8_dot, scaled, comparable=dots is _dot),
  }


def _per_tensor(x):
  """Values and one scale, a power of two: BF16 holds it exactly."""
  x = x.astype(F32)
  scale = jnp.max(jnp.abs(x)) / float(jnp.finfo(E4M3).max)
  scale = jnp.exp2(jnp.ceil(jnp.log2(scale)))
  return (x / scale).astype(E4M3), scale


def _normal(key, index: int, shape: tuple[int, ...]):
  return jax.random.normal(jax.random.fold_in(key, index), shape, BF16)


def _bytes(shape: tuple[int, int], tile: tuple[int, int] = ROW) -> float:
  """Of an FP8 matrix and its f32 scales."""
  rows, columns = (-(-s // t) for s, t in zip(shape, tile, strict=True))
  return float(shape[0] * shape[1] + 4 * rows * columns)
