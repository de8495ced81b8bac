"""Rotary positions and YaRN in float64 (TR 2.1.1, 4.3).

  theta_j = theta^(-2j/R),  j = 0..R/2-1
  d(r) = R ln(T0 / (2 pi r)) / (2 ln theta): the pair that turns r times in T0
  low = floor d(beta_fast), high = ceil d(beta_slow)
  ramp_j = clip((j - low) / (high - low), 0, 1)
  theta'_j = theta_j / s * ramp_j + theta_j * (1 - ramp_j)

Letters: R rope head dim, T0 the original length, s the extension factor.
"""

import math

import numpy as np


def frequencies(dim, theta):
  """Angle per position of each of the dim/2 pairs, plain RoPE."""
  return np.array([theta ** (-2.0 * j / dim) for j in range(dim // 2)])


def yarn_bounds(dim, theta, original_seq_len, beta_fast, beta_slow):
  """(low, high): pair indices where YaRN's ramp starts and ends (TR 4.3)."""

  def pair_index(rotations):
    wavelengths = original_seq_len / (rotations * 2.0 * math.pi)
    return dim * math.log(wavelengths) / (2.0 * math.log(theta))

  low = max(math.floor(pair_index(beta_fast)), 0)
  high = min(math.ceil(pair_index(beta_slow)), dim - 1)
  return low, high


def yarn_frequencies(
  dim, theta, original_seq_len, factor, beta_fast, beta_slow
):
  """Angles per position after YaRN: fast pairs kept, slow ones / factor."""
  low, high = yarn_bounds(dim, theta, original_seq_len, beta_fast, beta_slow)
  result = []
  for j, plain in enumerate(frequencies(dim, theta)):
    if low == high:  # the ramp is a step just above low
      ramp = 0.0 if j <= low else 1.0
    else:
      ramp = min(max((j - low) / (high - low), 0.0), 1.0)
    smooth = 1.0 - ramp
    result.append(plain / factor * (1.0 - smooth) + plain * smooth)
  return np.array(result)


def attention_temperature(factor, mscale):
  """YaRN's sqrt(t) = 0.1 m ln s + 1; 1 when nothing is extended (TR 4.3)."""
  if factor <= 1.0:
    return 1.0
  return 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(qk_head_dim, factor, mscale, mscale_all_dim, active):
  """(softmax scale, factor on cos and sin), TR 4.3.

  All of q.k gets the square of the temperature of `mscale_all_dim`; the
  rotated part gets the ratio of the two temperatures on top, once on each of
  q and k. The published models have mscale == mscale_all_dim, so a ratio of 1.

  Args:
    active: False for lengths up to the original one: plain scale, factor 1.
  """
  scale = qk_head_dim**-0.5
  if not active:
    return scale, 1.0
  over_all = attention_temperature(factor, mscale_all_dim)
  ratio = attention_temperature(factor, mscale) / over_all
  return scale * over_all**2, ratio


def rotate_interleaved(x, positions, freqs, rope_factor=1.0):
  """Rotates pairs (x0,x1), (x2,x3), ... as complex numbers (TR 2.1.1).

  Args:
    x: [..., R]; the output keeps the interleaved order.
    positions: the shape of x without R, or its leading dims (then the same
      for what follows, as for heads).
    freqs: [R/2], angle per position.
    rope_factor: multiplies cos and sin.
  """
  x = np.asarray(x, np.float64)
  positions = np.asarray(positions, np.float64)
  while positions.ndim < x.ndim - 1:
    positions = positions[..., None]
  angles = positions[..., None] * freqs
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  turned = pairs * rope_factor * np.exp(1j * angles)
  out = np.empty(x.shape)
  out[..., 0::2] = turned.real
  out[..., 1::2] = turned.imag
  return out
