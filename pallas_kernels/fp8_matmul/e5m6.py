"""E5M6: activations saved in 12 bits, two numbers in three bytes (TR 3.3.3).

Of attention's output, as saved for the backward pass of its projection.

  sign, 5 exponent bits with bias 15, 6 mantissa bits; subnormals have the step
  2^-20, and the top exponent is taken as in IEEE formats: the largest is 65024

  x ~ value * scale,  scale: the power of two that e4m3 tiles of x would get

The report gives the format and that scales are powers of two. The rest is ours:
scales are those of e4m3 without a floor; two codes are packed into three bytes,
low bits first; f32 denormals of x or of value * scale may be flushed to zero.

Letters: M rows, D columns, d their tiles of 128.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import reference

LARGEST = (30 << 6) | 63  # codes, without the sign
NAN = (31 << 6) | 32
_REBIAS = (127 - 15) << 6


def quantize(x: Float[Array, '*lead M D']) -> quantized.Packed:
  """x in 12 bits under e4m3's power-of-two scales of its 1 x 128 tiles.

  Rounds once, from f32 to nearest even. Infinities and NaN become NaN; the
  rest of such a tile is undefined. No gradient is defined.
  """
  return pack(x, reference.quantize(x, pow2=True).scales)


def pack(
  x: Float[Array, '*lead M D'], scales: Float[Array, '*lead M d']
) -> quantized.Packed:
  """x in 12 bits under given scales, powers of two; too large: the largest."""
  with jax.named_scope('e5m6_pack'):
    inverse = reference.spread(1.0 / scales, quantized.ROW, x.shape)
    codes = encode(x.astype(jnp.float32) * inverse)
    to_even = x.shape[-1] % 2
    codes = jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, to_even)])
    first, second = codes[..., 0::2], codes[..., 1::2]
    triple = (first & 255, (first >> 8) | (second & 15) << 4, second >> 4)
    packed = jnp.stack(triple, axis=-1).astype(jnp.uint8)
    packed = packed.reshape(*x.shape[:-1], 3 * first.shape[-1])
    return quantized.Packed(packed, scales, x.shape[-1])


def unpack(p: quantized.Packed) -> Float[Array, '*lead M D']:
  """value * scale, in f32: exact."""
  with jax.named_scope('e5m6_unpack'):
    lead = p.codes.shape[:-1]
    triple = p.codes.reshape(*lead, -1, 3).astype(jnp.uint16)
    low, middle, high = (triple[..., i] for i in range(3))
    pair = (low | (middle & 15) << 8, (middle >> 4) | high << 4)
    codes = jnp.stack(pair, axis=-1).reshape(*lead, -1)[..., : p.columns]
    return decode(codes) * reference.spread(p.scales, quantized.ROW, p.shape)


def encode(x: Float[Array, '*lead M D']):
  """12-bit codes, uint16, of f32 numbers: nearest even, saturating."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  unsigned = bits & 0x7FFFFFFF
  # A carry out of the mantissa increments the exponent, as it should.
  odd = (unsigned >> 17) & 1  # a tie goes to the even code
  normal = ((unsigned + 0xFFFF + odd) >> 17) - _REBIAS
  magnitude = jax.lax.bitcast_convert_type(unsigned, jnp.float32)
  # Under 2^-14: in steps of 2^-20; 64 of them are the code of 2^-14.
  small = jnp.rint(jnp.minimum(magnitude, 1.0) * 2.0**20).astype(jnp.uint32)
  code = jnp.where(magnitude < 2.0**-14, small, jnp.minimum(normal, LARGEST))
  code = jnp.where(unsigned >= 0x7F800000, NAN, code)
  return (code | (bits >> 31) << 11).astype(jnp.uint16)


def decode(codes) -> Float[Array, '*lead M D']:
  """Numbers, f32, of 12-bit codes; a top exponent is NaN."""
  codes = codes.astype(jnp.uint32)
  size = codes & 0x7FF
  normal = jax.lax.bitcast_convert_type((size + _REBIAS) << 17, jnp.float32)
  small = size.astype(jnp.int32).astype(jnp.float32) * 2.0**-20
  number = jnp.where(size < 1 << 6, small, normal)
  number = jnp.where(size > LARGEST, jnp.nan, number)
  return jnp.where(codes >> 11 == 1, -number, number)
