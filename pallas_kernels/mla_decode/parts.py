"""Parts of rows (split-KV), and the sum of their results.

Few long rows would leave a device idle. So a row's blocks of 64 tokens are
divided among `splits` parts, each with its own softmax. With o_i the
output of part i and lse_i = log sum_s exp(score_s) over its tokens:

  lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

A part without tokens has o_i = 0 and lse_i = -inf, so it adds nothing.

Letters: i parts; b blocks of a row, p pages, s tokens of a page, c scales of a
token; others as in CONTRIBUTING.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import quantized
from pallas_kernels.mla_decode.cache import PAGE


class Bounds(NamedTuple):
  """The blocks of a part: from `first` up to `end`."""

  first: Int[Array, '*shape']
  end: Int[Array, '*shape']


def bounds(length, part, splits: int) -> Bounds:
  """Blocks of one part of a row; parts are even for each row by itself."""
  blocks = div_up(length, PAGE)
  share = div_up(blocks, splits)
  first = jnp.minimum(part * share, blocks)
  return Bounds(first, jnp.minimum(first + share, blocks))


def div_up(size, by: int):
  """For sizes >= 0; a truncating division, which is cheap on devices."""
  return jax.lax.div(size + (by - 1), jnp.int32(by))


def owned(
  table_Bb: Int[Array, 'B b'], lengths_B: Int[Array, 'B'], pages: int
) -> Int[Array, 'B b']:
  """The table with page 0 beyond a row's length: safe to load from."""
  at_b = jnp.arange(table_Bb.shape[1], dtype=jnp.int32)
  used_Bb = at_b < div_up(lengths_B, PAGE)[:, None]
  return jnp.where(used_Bb, jnp.clip(table_Bb, 0, pages - 1), 0)


def scales(
  c_psC: quantized.Quantized, owned_Bb: Int[Array, 'B b']
) -> Float[Array, 'B b c s']:
  """Scales of the rows' pages, in their order and transposed.

  Of these pages only: a step's cost must not grow with the size of the cache.
  """
  return jnp.swapaxes(c_psC.scales[owned_Bb], -1, -2)


def combine(
  o_iBTNC: Float[Array, 'i B T N C'],
  lse_iBNT: Float[Array, 'i B N T'],
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """One softmax out of those of the parts; zero and -inf where all are empty.

  Args:
    o_iBTNC, lse_iBNT: f32. dtype: of the output; the sum is f32.
  """
  with jax.named_scope('combine'):
    most_BNT = jnp.max(lse_iBNT, axis=0)
    most_BNT = jnp.where(jnp.isneginf(most_BNT), 0.0, most_BNT)
    weight_iBNT = jnp.exp(lse_iBNT - most_BNT)
    total_BNT = jnp.sum(weight_iBNT, axis=0)
    share_iBNT = weight_iBNT / jnp.where(total_BNT == 0, 1.0, total_BNT)
    share_iBTN = jnp.swapaxes(share_iBNT, -1, -2)
    o_BTNC = jnp.sum(o_iBTNC * share_iBTN[..., None], axis=0)
    return o_BTNC.astype(dtype), most_BNT + jnp.log(total_BNT)
