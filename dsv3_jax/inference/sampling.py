"""The next token from logits: greedy, temperature, min-p, top-k, nucleus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

TOP_LOGPROBS = 20  # the most that an answer can have of a token


class LogitAdjustments(NamedTuple):
  """What changes the logits of each row before a token is sampled.

  presence_B, frequency_B: subtracted from the logits of generated tokens, once,
  and as often as they occur.
  repetition_B: divides positive logits of all tokens of the row, and multiplies
  negative ones; before the rest.
  prompt_length_B: how many of a row's tokens are not generated.
  bias_ids_BK, bias_BK: what is added to the logits of some tokens. An id of V
  stands for none; no other occurs twice in a row.
  is_constrained_B, allowed_Bv: rows that sample only tokens whose bit is 1: of
  token i, bit i % 32 of number i // 32.
  """

  presence_B: Float[Array, 'B']
  frequency_B: Float[Array, 'B']
  repetition_B: Float[Array, 'B']
  prompt_length_B: Int[Array, 'B']
  bias_ids_BK: Int[Array, 'B K']
  bias_BK: Float[Array, 'B K']
  is_constrained_B: Bool[Array, 'B']
  allowed_Bv: UInt32[Array, 'B v']


class RowTokens(NamedTuple):
  """The tokens of each row; the first `length_B` count."""

  tokens_BS: Int[Array, 'B S']
  length_B: Int[Array, 'B']


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
  adjustments: None: no row has any, and none can be given.
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

  chosen_B, rank_B: of a given token; the rank counts from 1 those that are
  likelier. top_BK, top_ids_BK: the likeliest, in order.
  """

  chosen_B: Float[Array, 'B']
  rank_B: Int[Array, 'B']
  top_BK: Float[Array, 'B K']
  top_ids_BK: Int[Array, 'B K']


def sample(
  logits_BV: Float[Array, 'B V'],
  arrays: SamplingArrays,
  place_B: Int[Array, 'B'],
  row_tokens: RowTokens | None = None,
) -> Int[Array, 'B']:
  """One token a row.

  Args:
    place_B: position of the last token in its row; the same position samples
      with the same random numbers.
    row_tokens: what penalties count; of `arrays` with adjustments.
  """
  adjustments, vocab = arrays.adjustments, logits_BV.shape[1]
  is_random_B = arrays.temperature_B > 0
  argmax = lambda x_BV: jnp.argmax(x_BV, axis=-1).astype(jnp.int32)

  def draw():
    adjusted_BV = logits_BV
    if adjustments is not None:
      adjusted_BV = adjust(logits_BV, adjustments, row_tokens)
    drawn_B = _draw(adjusted_BV, arrays, place_B)
    return jnp.where(is_random_B, drawn_B, argmax(adjusted_BV))

  def greedy():
    if adjustments is None:
      return argmax(logits_BV)
    return jax.lax.cond(  # of few numbers: [B, V] would be copied
      _has_any(adjustments, vocab),
      lambda: argmax(_adjusted(logits_BV, adjustments, row_tokens)),
      lambda: argmax(logits_BV),
    )

  with jax.named_scope('sample'):
    return jax.lax.cond(jnp.any(is_random_B), draw, greedy)


def adjust(
  logits_BV: Float[Array, 'B V'],
  adjustments: LogitAdjustments,
  row_tokens: RowTokens,
) -> Float[Array, 'B V']:
  """Logits after penalties, then biases; -inf where a token is not allowed.

  Rows without adjustments keep their bits.
  """
  return jax.lax.cond(
    _has_any(adjustments, logits_BV.shape[1]),
    lambda: _adjusted(logits_BV, adjustments, row_tokens),
    lambda: logits_BV,
  )


def _has_penalty(adjustments) -> Array:
  has_penalty_B = adjustments.repetition_B != 1.0
  has_penalty_B |= adjustments.presence_B != 0
  return jnp.any(has_penalty_B | (adjustments.frequency_B != 0))


def _has_any(adjustments, vocab) -> Array:
  """Whether a row has adjustments."""
  has_bias = jnp.any(adjustments.bias_ids_BK < vocab)
  is_constrained = jnp.any(adjustments.is_constrained_B)
  return _has_penalty(adjustments) | has_bias | is_constrained


def _adjusted(logits_BV, adjustments, row_tokens) -> Array:
  """`adjust`, where a row has adjustments."""
  logits_BV = jax.lax.cond(
    _has_penalty(adjustments),
    lambda x_BV: _penalized(x_BV, adjustments, row_tokens),
    lambda x_BV: x_BV,
    logits_BV,
  )
  at = (jnp.arange(len(logits_BV))[:, None], adjustments.bias_ids_BK)
  logits_BV = logits_BV.at[at].add(adjustments.bias_BK, mode='drop')
  return jnp.where(_allowed(adjustments, logits_BV), logits_BV, -jnp.inf)


def _penalized(logits_BV, adjustments, row_tokens) -> Array:
  """Logits after all penalties; of each token as often as the row has it."""
  row_B1, vocab = jnp.arange(len(logits_BV))[:, None], logits_BV.shape[1]
  column = lambda x_B: x_B[:, None]
  index_S = jnp.arange(row_tokens.tokens_BS.shape[1])
  counts_BS = index_S < column(row_tokens.length_B)
  ids_BS = jnp.where(counts_BS, row_tokens.tokens_BS, vocab)  # V: dropped
  repetition_B1 = column(adjustments.repetition_B)
  value_BS = logits_BV.at[row_B1, ids_BS].get(mode='fill', fill_value=0.0)
  value_BS = jnp.where(
    value_BS > 0, value_BS / repetition_B1, value_BS * repetition_B1
  )
  # A token that a row has twice is set to the same value twice.
  logits_BV = logits_BV.at[row_B1, ids_BS].set(value_BS, mode='drop')
  is_new_BS = index_S >= column(adjustments.prompt_length_B)
  at = (row_B1, jnp.where(is_new_BS, ids_BS, vocab))
  frequency_B1 = column(adjustments.frequency_B)
  logits_BV = logits_BV.at[at].add(-frequency_B1, mode='drop')
  value_BS = logits_BV.at[at].get(mode='fill', fill_value=0.0)
  value_BS -= column(adjustments.presence_B)
  return logits_BV.at[at].set(value_BS, mode='drop')


def _allowed(adjustments, logits_BV) -> Array:
  """True on the tokens that a row may sample."""
  id_V = jnp.arange(logits_BV.shape[1], dtype=jnp.uint32)
  bits_BV = adjustments.allowed_Bv[:, id_V // 32] >> (id_V % 32)
  return (bits_BV & 1 == 1) | ~adjustments.is_constrained_B[:, None]


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
    rank_B = 1 + jnp.sum(log_BV > chosen_B1, axis=-1, dtype=jnp.int32)
    top_BK, ids_BK = jax.lax.top_k(log_BV, count)
    return Logprobs(chosen_B1[:, 0], rank_B, top_BK, ids_BK.astype(jnp.int32))

  def none():
    zeros_BK = jnp.zeros((batch, count), logits_BV.dtype)
    ids_BK = jnp.zeros((batch, count), jnp.int32)
    zeros_B, rank_B = zeros_BK[:, 0], ids_BK[:, 0]
    return Logprobs(zeros_B, rank_B, zeros_BK, ids_BK)

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
