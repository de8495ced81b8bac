"""The next token from logits: greedy, temperature, top-k, nucleus (top-p)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class SamplingArrays(NamedTuple):
  """Sampling parameters of each row.

  keys_B2: PRNG keys, as `jax.random.key_data`. Each row has its own, so that
    its random numbers do not depend on other rows.
  temperature_B: 0 is greedy.
  top_k_B: keeps the k likeliest tokens; 0 keeps all.
  top_p_B: nucleus. Keeps the fewest of the top-k tokens whose share of the
    top-k probability is at least top_p; 1 keeps all.
  """

  keys_B2: UInt32[Array, 'B 2']
  temperature_B: Float[Array, 'B']
  top_k_B: Int[Array, 'B']
  top_p_B: Float[Array, 'B']


def sample(
  logits_BV: Float[Array, 'B V'],
  arrays: SamplingArrays,
  place_B: Int[Array, 'B'],
) -> Int[Array, 'B']:
  """One token a row.

  Args:
    place_B: position of the last token in its row; the same position samples
      with the same random numbers.
  """
  with jax.named_scope('sample'):
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_random_B = arrays.temperature_B > 0
    return jax.lax.cond(
      jnp.any(is_random_B),
      lambda: jnp.where(
        is_random_B, _draw(logits_BV, arrays, place_B), greedy_B
      ),
      lambda: greedy_B,
    )


def _draw(logits_BV, arrays: SamplingArrays, place_B) -> Int[Array, 'B']:
  """One random token a row, of those that top-k and top-p keep."""
  keys_B = jax.random.wrap_key_data(arrays.keys_B2)
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, place_B)
  temperature_B = jnp.where(arrays.temperature_B > 0, arrays.temperature_B, 1.0)
  # The largest logit becomes 0, so that a tiny temperature cannot overflow.
  logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
  logits_BV /= temperature_B[:, None]
  # Sorting takes longer than all else, and most rows filter nothing.
  is_filtered_B = (arrays.top_k_B > 0) | (arrays.top_p_B < 1.0)
  kept_BV = jax.lax.cond(
    jnp.any(is_filtered_B & (arrays.temperature_B > 0)),
    lambda: jnp.where(candidate_mask(logits_BV, arrays), logits_BV, -jnp.inf),
    lambda: logits_BV,
  )
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
  return drawn_B.astype(jnp.int32)


def candidate_mask(
  logits_BV: Float[Array, 'B V'], arrays: SamplingArrays
) -> Array:
  """True on the tokens that may be sampled."""
  top_k_B1, top_p_B1 = arrays.top_k_B[:, None], arrays.top_p_B[:, None]
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)
  sorted_BV = jnp.sort(probs_BV, axis=-1, descending=True)
  rank_V = jnp.arange(sorted_BV.shape[1])
  top_BV = (top_k_B1 <= 0) | (rank_V < top_k_B1)
  mass_B1 = jnp.sum(sorted_BV, axis=-1, keepdims=True, where=top_BV)
  mass_B1 = jnp.where(top_k_B1 <= 0, 1.0, mass_B1)
  before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
  # In f32 the sum can reach 1 before the last tokens; top_p = 1 keeps these.
  top_BV &= (before_BV < top_p_B1 * mass_B1) | (top_p_B1 >= 1.0)
  # At least the first is kept, and all that tie with the last one kept.
  count_B1 = jnp.maximum(jnp.sum(top_BV, axis=-1, keepdims=True), 1)
  return probs_BV >= jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
