"""The next token from logits: greedy, temperature, min-p, top-k, nucleus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

TOP_LOGPROBS = 20  # the most that an answer can have of a token


class LogitAdjustments(NamedTuple):
  """What changes the logits of each row before a token is sampled.

  offset_BV: added; -inf excludes a token. repeated_BV: tokens that the
  repetition penalty is for. repetition_B: divides their positive logits and
  multiplies their negative ones; before the offset.
  """

  offset_BV: Float[Array, 'B V']
  repeated_BV: Bool[Array, 'B V']
  repetition_B: Float[Array, 'B']


class SamplingArrays(NamedTuple):
  """Sampling parameters of each row.

  keys_B2: PRNG keys, as `jax.random.key_data`. Each row has its own, so that
    its random numbers do not depend on other rows.
  temperature_B: 0 is greedy.
  top_k_B: keeps the k likeliest tokens; 0 keeps all.
  top_p_B: nucleus. Keeps the fewest of the top-k tokens whose share of the
    top-k probability is at least top_p; 1 keeps all.
  min_p_B: keeps tokens that are at least so likely, relative to the likeliest.
  logprobs_B: whether log-probabilities are wanted.
  adjustments: None: no row has any.
  """

  keys_B2: UInt32[Array, 'B 2']
  temperature_B: Float[Array, 'B']
  top_k_B: Int[Array, 'B']
  top_p_B: Float[Array, 'B']
  min_p_B: Float[Array, 'B']
  logprobs_B: Bool[Array, 'B']
  adjustments: LogitAdjustments | None = None


class Logprobs(NamedTuple):
  """Natural logarithms of the model's own probabilities, at temperature 1.

  Neither adjustments nor the sampling parameters change them. All 0 if they
  are not wanted.

  chosen_B: of a given token. top_BK, top_ids_BK: the likeliest, in order.
  """

  chosen_B: Float[Array, 'B']
  top_BK: Float[Array, 'B K']
  top_ids_BK: Int[Array, 'B K']


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
    if arrays.adjustments is not None:
      logits_BV = adjust(logits_BV, arrays.adjustments)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_random_B = arrays.temperature_B > 0
    return jax.lax.cond(
      jnp.any(is_random_B),
      lambda: jnp.where(
        is_random_B, _draw(logits_BV, arrays, place_B), greedy_B
      ),
      lambda: greedy_B,
    )


def adjust(
  logits_BV: Float[Array, 'B V'], adjustments: LogitAdjustments
) -> Float[Array, 'B V']:
  """Logits after the repetition penalty, then the offsets."""
  repetition_B1 = adjustments.repetition_B[:, None]
  penalized_BV = jnp.where(
    logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1
  )
  logits_BV = jnp.where(adjustments.repeated_BV, penalized_BV, logits_BV)
  return logits_BV + adjustments.offset_BV


def logprobs(
  logits_BV: Float[Array, 'B V'],
  token_B: Int[Array, 'B'],
  is_wanted: Bool[Array, ''],
) -> Logprobs:
  """Log-probabilities of tokens, and of the likeliest in their places."""
  batch, vocab = logits_BV.shape
  count = min(TOP_LOGPROBS, vocab)

  def compute():
    log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B1 = jnp.take_along_axis(log_BV, token_B[:, None], axis=-1)
    top_BK, ids_BK = jax.lax.top_k(log_BV, count)
    return Logprobs(chosen_B1[:, 0], top_BK, ids_BK.astype(jnp.int32))

  def none():
    zeros_BK = jnp.zeros((batch, count), logits_BV.dtype)
    ids_BK = jnp.zeros((batch, count), jnp.int32)
    return Logprobs(jnp.zeros(batch, logits_BV.dtype), zeros_BK, ids_BK)

  with jax.named_scope('logprobs'):
    return jax.lax.cond(is_wanted, compute, none)


def _draw(logits_BV, arrays: SamplingArrays, place_B) -> Int[Array, 'B']:
  """One random token a row, of those that min-p, top-k and top-p keep."""
  keys_B = jax.random.wrap_key_data(arrays.keys_B2)
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, place_B)
  temperature_B = jnp.where(arrays.temperature_B > 0, arrays.temperature_B, 1.0)
  # The largest logit becomes 0, so that a tiny temperature cannot overflow.
  logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
  logits_BV /= temperature_B[:, None]
  # Sorting takes longer than all else, and most rows filter nothing.
  is_filtered_B = (arrays.top_k_B > 0) | (arrays.top_p_B < 1.0)
  is_filtered_B |= arrays.min_p_B > 0
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
  """True on the tokens that may be sampled.

  Top-k and top-p see the distribution that min-p leaves.
  """
  top_k_B1, top_p_B1 = arrays.top_k_B[:, None], arrays.top_p_B[:, None]
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)
  largest_B1 = jnp.max(probs_BV, axis=-1, keepdims=True)
  likely_BV = probs_BV >= arrays.min_p_B[:, None] * largest_B1
  probs_BV = jax.nn.softmax(logits_BV, axis=-1, where=likely_BV)
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
  last_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
  return likely_BV & (probs_BV >= last_B1)
