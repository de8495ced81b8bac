"""The tokens whose latents a cache holds, in the same blocks.

Penalties count them on the device, so that no step sends a row's tokens again.
What holds for latents holds for them: the prefix cache shares them, a copied
block has them, and rejected speculative tokens are overwritten.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.nn import latent_cache

Tokens = Int[Array, '1 p s 1']  # dims of a latent cache: one layer, one value


def empty(num_blocks: int, block_size: int) -> Tokens:
  return jnp.zeros((1, num_blocks, block_size, 1), jnp.int32)


def write(
  tokens_1ps1: Tokens,
  tokens_BT: Int[Array, 'B T'],
  index_BT: Int[Array, 'B T'],
  table_Bb: Int[Array, 'B b'],
) -> Tokens:
  """Writes tokens at their indices; as `latent_cache.write`."""
  _, num_blocks, size, _ = tokens_1ps1.shape
  places = latent_cache.places(index_BT, table_Bb, num_blocks, size)
  at = (0, *places, 0)
  return tokens_1ps1.at[at].set(tokens_BT, mode='drop')


def read(tokens_1ps1: Tokens, table_Bb: Int[Array, 'B b']) -> Int[Array, 'B S']:
  """All that the blocks of each row hold; 0 where it has no block."""
  tokens_Bbs = (
    tokens_1ps1[0, :, :, 0].at[table_Bb].get(mode='fill', fill_value=0)
  )
  return tokens_Bbs.reshape(len(table_Bb), -1)
