"""Rows cut into parts, and how the parts' results become one.

Few long rows would leave a device idle, so that a row's blocks of 64 tokens are
dealt to `splits` parts, each with its own softmax (split-KV). With o_z the
output of part z and lse_z = log sum_s exp(score_s) over its tokens:

  lse = log sum_z exp(lse_z)        o = sum_z exp(lse_z - lse) o_z

A part without tokens has o_z = 0 and lse_z = -inf, which counts for nothing.

Letters: B rows, T queries of a row, N heads, C latent, Z parts, j blocks of a
row, J pages, I tokens of a page, k scales of a token.
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
  table_Bj: Int[Array, 'B j'], lengths_B: Int[Array, 'B'], pages: int
) -> Int[Array, 'B j']:
  """The table with page 0 beyond a row's length: safe to load from."""
  at_j = jnp.arange(table_Bj.shape[1], dtype=jnp.int32)
  used_Bj = at_j < div_up(lengths_B, PAGE)[:, None]
  return jnp.where(used_Bj, jnp.clip(table_Bj, 0, pages - 1), 0)


def scales(
  c_JIC: quantized.Quantized, owned_Bj: Int[Array, 'B j']
) -> Float[Array, 'B j k I']:
  """Scales of the rows' pages, in their order and turned.

  Of these pages only: the cache may have many more, and a step is to cost what
  its rows have.
  """
  return jnp.swapaxes(c_JIC.scales[owned_Bj], -1, -2)


def combine(
  o_ZBTNC: Float[Array, 'Z B T N C'],
  lse_ZBNT: Float[Array, 'Z B N T'],
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """One softmax out of those of the parts; zero and -inf where all are empty.

  Args:
    o_ZBTNC, lse_ZBNT: f32. dtype: of the output; the sum is f32.
  """
  with jax.named_scope('combine'):
    most_BNT = jnp.max(lse_ZBNT, axis=0)
    most_BNT = jnp.where(jnp.isneginf(most_BNT), 0.0, most_BNT)
    weight_ZBNT = jnp.exp(lse_ZBNT - most_BNT)
    total_BNT = jnp.sum(weight_ZBNT, axis=0)
    share_ZBNT = weight_ZBNT / jnp.where(total_BNT == 0, 1.0, total_BNT)
    share_ZBTN = jnp.swapaxes(share_ZBNT, -1, -2)
    o_BTNC = jnp.sum(o_ZBTNC * share_ZBTN[..., None], axis=0)
    return o_BTNC.astype(dtype), most_BNT + jnp.log(total_BNT)
