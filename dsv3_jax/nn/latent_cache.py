"""The latent cache of a stack of layers: what MLA keeps a token (TR 2.1.1).

The cache is paged. A block of the engine is a page of the kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax import config
from dsv3_jax.ops import mla
from pallas_kernels import quantized
from pallas_kernels.mla_decode import api as mla_decode


class LatentCache(NamedTuple):
  """Latents of all layers of one stack, in p blocks of s tokens.

  Key i of row r is in block table_Bb[r, i // s], at place i % s. Latents are in
  the rotary keys' dtype, or `Quantized` with a scale for each 128 of a token.
  """

  c_LpsC: Array | quantized.Quantized
  k_rope_LpsR: Array


def empty_cache(
  cfg: config.ModelConfig,
  num_layers: int,
  num_blocks: int,
  block_size: int,
  dtype,
  *,
  fp8: bool,
) -> LatentCache:
  """A cache of zeros: blocks of `block_size` tokens."""

  def shapes():
    shape = (num_layers, num_blocks, block_size)
    zeros = lambda width: jnp.zeros((*shape, width), dtype)
    widths = (cfg.mla.kv_lora_rank, cfg.mla.qk_rope_head_dim)
    return _stored(mla_decode.LatentPages(*map(zeros, widths)), fp8)

  zeros = lambda like: jnp.zeros(like.shape, like.dtype)
  return jax.tree.map(zeros, jax.eval_shape(shapes))


def write(
  cache: LatentCache,
  latents: mla.Latents,
  index_BT: Int[Array, 'B T'],
  table_Bb: Int[Array, 'B b'],
  layer: Int[Array, ''],
) -> LatentCache:
  """Writes latents of a layer at their indices.

  Those of padding (index_BT < 0) or past a row's blocks are dropped.
  """
  _, num_blocks, size, _ = cache.c_LpsC.shape
  at = (layer, *places(index_BT, table_Bb, num_blocks, size))

  def put(old, new):
    bits = mla_decode.bits
    new = bits(new.astype(old.dtype))
    written = bits(old).at[at].set(new, mode='drop')
    return mla_decode.from_bits(written, old.dtype)

  new = _stored(mla_decode.LatentPages(*latents), is_fp8(cache))
  return jax.tree.map(put, cache, new)


def places(
  index_BT: Int[Array, 'B T'],
  table_Bb: Int[Array, 'B b'],
  num_blocks: int,
  size: int,
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
  """The block of each token, and its place there.

  Padding (index_BT < 0) and what is past a row's blocks has the block
  `num_blocks`, which is none.
  """
  block_BT = jnp.take_along_axis(
    table_Bb, index_BT // size, axis=1, mode='fill', fill_value=num_blocks
  )
  return jnp.where(index_BT < 0, num_blocks, block_BT), index_BT % size


def is_fp8(cache: LatentCache | None) -> bool:
  return cache is not None and isinstance(cache.c_LpsC, quantized.Quantized)


def rounded(latents: mla.Latents) -> mla.Latents:
  """Latents as they are read from an FP8 cache."""
  stored = mla_decode.quantize(mla_decode.LatentPages(*latents))
  read = mla_decode.dequantize(stored, latents.c_BSC.dtype)
  return mla.Latents(read.c_psC, read.k_rope_psR)


def layer_blocks(
  cache: LatentCache,
  index_BT: Int[Array, 'B T'],
  table_Bb: Int[Array, 'B b'],
  layer: Int[Array, ''],
) -> tuple[mla_decode.LatentPages, Int[Array, 'B b'], Int[Array, 'B']]:
  """A layer's blocks as pages of the kernels: pages, table and lengths.

  The pages are those of all layers, so that nothing is copied; the table points
  to those of the layer. A row's tokens are consecutive from index_BT[:, 0],
  which gives its length. Padding comes behind them; what it attends to does not
  matter.
  """
  _, num_blocks, size, _ = cache.c_LpsC.shape
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  # Entries without a block point to the row's first: another row's block may
  # hold values that are not finite.
  own_B1 = jnp.minimum(table_Bb[:, :1], num_blocks - 1)
  table_Bb = jnp.where(table_Bb < num_blocks, table_Bb, own_B1)
  table_Bb += layer * num_blocks
  first_B, length = index_BT[:, 0], index_BT.shape[1]
  lengths_B = jnp.where(first_B < 0, 0, first_B + length)
  # Speculative tokens may pass the end of the table.
  lengths_B = jnp.minimum(lengths_B, table_Bb.shape[1] * size)
  pages = mla_decode.LatentPages(*jax.tree.map(flat, cache))
  return pages, table_Bb, lengths_B


def _stored(latents: mla_decode.LatentPages, fp8: bool) -> LatentCache:
  """Latents and rotary keys in the formats of the cache."""
  stored = mla_decode.quantize(latents) if fp8 else latents
  return LatentCache(stored.c_psC, stored.k_rope_psR)
