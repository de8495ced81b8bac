"""Rotary position embedding and its YaRN extension (TR 2.1.1, 4.3).

Pairs are interleaved: (x_0, x_1), (x_2, x_3), ... each rotate as one complex
number. YaRN slows the low frequencies down by `factor` and keeps the high ones;
it also sharpens the softmax by mscale squared. Both are on for inputs of any
length if `model.max_seq_len` is above `rope.original_seq_len`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config


def frequencies(cfg: config.ModelConfig) -> np.ndarray:
  """Angle per position of each pair, float64[R/2], radians (TR 4.3)."""
  rope, rotary_dim = cfg.rope, cfg.mla.qk_rope_head_dim
  index = np.arange(rotary_dim // 2, dtype=np.float64)
  plain = rope.theta ** (-2.0 * index / rotary_dim)
  if not cfg.yarn:
    return plain
  low = math.floor(_rotation_dim(rope, rotary_dim, rope.beta_fast))
  high = math.ceil(_rotation_dim(rope, rotary_dim, rope.beta_slow))
  low, high = max(low, 0), min(high, rotary_dim - 1)
  span = (high - low) or 0.001  # equal bounds: a step, not a division by 0
  smooth = 1.0 - np.clip((index - low) / span, 0.0, 1.0)
  slowed = plain / rope.factor
  return slowed * (1.0 - smooth) + plain * smooth


def _rotation_dim(
  rope: config.RopeConfig, rotary_dim: int, rotations: float
) -> float:
  """Index of the pair that turns `rotations` times in the original length."""
  positions = rope.original_seq_len / (rotations * 2.0 * math.pi)  # a radian
  return rotary_dim * math.log(positions) / (2.0 * math.log(rope.theta))


def _mscale(factor: float, mscale: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(cfg: config.ModelConfig) -> float:
  """qk_head_dim^-1/2, times mscale squared while YaRN is on."""
  scale = cfg.mla.qk_head_dim**-0.5
  if cfg.yarn:
    scale *= _mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
  return scale


def rotation_factor(cfg: config.ModelConfig) -> float:
  """Factor on cos and sin: 1 unless mscale and mscale_all_dim differ."""
  if not cfg.yarn:
    return 1.0
  rope = cfg.rope
  return _mscale(rope.factor, rope.mscale) / _mscale(
    rope.factor, rope.mscale_all_dim
  )


def tables(
  cfg: config.ModelConfig, positions_BT: Int[Array, 'B T']
) -> tuple[Float[Array, 'B T r'], Float[Array, 'B T r']]:
  """cos and sin of each position's angles, f32[B, T, R/2]."""
  angles_BTr = _angles(frequencies(cfg), positions_BT)
  factor = rotation_factor(cfg)
  return jnp.cos(angles_BTr) * factor, jnp.sin(angles_BTr) * factor


def _angles(
  frequencies_r: np.ndarray, positions_BT: Int[Array, 'B T']
) -> Float[Array, 'B T r']:
  """position * frequency in [-pi, pi), exact to f32 up to the largest.

  Positions are below `config_rules.MAX_POSITIONS`.

  An f32 product of 131,071 radians would be off by 0.004. Only its fraction of
  a turn counts, and integers give that exactly: with the frequency as a
  fraction of 2^44 of a turn, in words of 32 and 12 bits, the product modulo one
  turn is what uint32 keeps of it.
  """
  word_r = np.rint(frequencies_r / (2.0 * np.pi) * 2.0**44).astype(np.uint64)
  high_r, low_r = (word_r >> 12).astype(np.uint32), np.uint32(word_r & 0xFFF)
  positions_BT1 = positions_BT[..., None].astype(jnp.uint32)
  turns_BTr = positions_BT1 * high_r + ((positions_BT1 * low_r) >> 12)
  signed_BTr = jax.lax.bitcast_convert_type(turns_BTr, jnp.int32)
  return signed_BTr.astype(jnp.float32) * np.float32(2.0 * np.pi / 2.0**32)


def rotate(
  x: Float[Array, 'B T *heads R'],
  cos_BTr: Float[Array, 'B T r'],
  sin_BTr: Float[Array, 'B T r'],
) -> Float[Array, 'B T *heads R']:
  """Turns each interleaved pair of `x` by its position's angle, in f32."""
  with jax.named_scope('rope'):
    if x.ndim == 4:  # one more dim for the heads
      cos_BTr, sin_BTr = cos_BTr[:, :, None], sin_BTr[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack(
      [even * cos_BTr - odd * sin_BTr, even * sin_BTr + odd * cos_BTr], axis=-1
    )
    return turned.reshape(x.shape).astype(x.dtype)
