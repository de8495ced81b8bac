"""A product as tensor cores of limited precision sum it (TR 3.3.2, 3.5.2).

  one instruction takes 32 products and the running register; all are aligned
  to the largest exponent among them, of each the highest 14 bits from there on
  are kept and the rest is truncated (towards zero); they are added exactly, and
  of the sum again the highest 14 bits are the new register.

Every N_C = 128 products the register is added, times the scales, to an f32
number and reset to zero ("promotion"). Without promotion the register loses
what is small against the sum. The report gives the rule in words. We take the
exponent to be that of the value, count the leading one among the 14 bits, and
truncate the register like the products. A reference for study and tests:
training uses `reference.matmul`.

Letters: M, N, K of a product; i products of one instruction.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import quantized

Quantized = quantized.Quantized


def matmul_limited(
  a: Quantized,
  b: Quantized,
  *,
  bits: int = 14,
  chunk: int = 32,
  promote_every: int = 128,
) -> Float[Array, 'M N']:
  """a b^T in f32, by registers of `bits` bits.

  Args:
    a: [M, K]. b: [N, K]. A tile's columns are a multiple of `promote_every`.
    bits: of a register; sums of `chunk` products must be exact in f32.
    promote_every: a multiple of `chunk`; 0 for never, which needs tiles that
      span K.
  Raises:
    ValueError: an argument violates these conditions.
  """
  _check(a, b, bits, chunk, promote_every)
  (rows, depth), columns = a.shape, b.shape[0]
  every = promote_every or -(-depth // chunk) * chunk
  parts = -(-depth // every)

  def split(q):  # [K, I] in parts, instructions and their products
    x = jnp.pad(q.values, ((0, 0), (0, parts * every - depth)))
    x = x.T.astype(jnp.float32)
    return x.reshape(parts, every // chunk, chunk, q.shape[0])

  def scales(q):  # of every part and row
    rows_ij = jnp.repeat(q.scales, q.tile[0], axis=0)[: q.shape[0]]
    return rows_ij[:, jnp.arange(parts) * every // q.tile[1]].T

  def instruction(register_MN, operands):
    a_iM, b_iN = operands
    # One by one: XLA makes of them one loop without [i, M, N] in memory.
    pairs = zip(a_iM, b_iN, strict=True)
    products = [a_M[:, None] * b_N for a_M, b_N in pairs]
    return _add(register_MN, products, bits), None

  def part(sum_MN, operands):
    a_kiM, b_kiN, scale_M, scale_N = operands
    zeros_MN = jnp.zeros((rows, columns), jnp.float32)
    register_MN, _ = jax.lax.scan(instruction, zeros_MN, (a_kiM, b_kiN))
    return sum_MN + register_MN * (scale_M[:, None] * scale_N), None

  zeros_MN = jnp.zeros((rows, columns), jnp.float32)
  operands = (split(a), split(b), scales(a), scales(b))
  return jax.lax.scan(part, zeros_MN, operands)[0]


def _add(register_MN, products, bits: int):
  """The register after one instruction."""
  terms = [register_MN, *products]
  largest_MN = functools.reduce(jnp.maximum, map(jnp.abs, terms))
  step_MN = _step(largest_MN, bits)
  # Whole numbers of steps, below 2^bits each: f32 adds them exactly.
  cut = [jnp.trunc(term_MN * (1.0 / step_MN)) for term_MN in terms]
  sum_MN = functools.reduce(jnp.add, cut) * step_MN
  step_MN = _step(jnp.abs(sum_MN), bits)
  return jnp.trunc(sum_MN / step_MN) * step_MN


def _step(size, bits: int):
  """The last of the kept bits: 2^(floor(log2 size) - bits + 1); 1 for 0."""
  exponent = jax.lax.bitcast_convert_type(size, jnp.int32) & 0x7F800000
  power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
  return jnp.where(size == 0, 1.0, power * 2.0 ** (1 - bits))


def _check(a, b, bits, chunk, promote_every):
  if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
    raise ValueError(f'a.shape={a.shape} and b.shape={b.shape} must share K')
  if bits + chunk.bit_length() > 24:  # chunk products and the register
    raise ValueError(f'bits={bits} with chunk={chunk} are not exact in f32')
  if promote_every % chunk:
    raise ValueError(
      f'promote_every={promote_every} must be a multiple of chunk={chunk}'
    )
  for name, q in (('a', a), ('b', b)):
    width = q.tile[1]
    if promote_every and width % promote_every and q.scales.shape[1] > 1:
      raise ValueError(
        f'{name}.tile={q.tile} must have a multiple of '
        f'promote_every={promote_every} columns'
      )
    if not promote_every and q.scales.shape[1] > 1:
      raise ValueError(
        f'{name}.tile={q.tile} must span K={q.shape[1]} without promotion'
      )
