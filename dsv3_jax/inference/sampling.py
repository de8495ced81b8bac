"""The next token from logits: greedy, temperature, nucleus (top-p)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
  logits_BV: Float[Array, 'B V'],
  keys_B: Array,
  temperature: Float[Array, ''],
  top_p: Float[Array, ''],
) -> Int[Array, 'B']:
  """One token a row; each row draws from a key of its own.

  Args:
    keys_B: PRNG keys; a row's draw does not depend on the other rows.
    temperature: 0 is greedy. top_p: the smallest set of tokens whose mass
      reaches it is kept; 1 keeps all.
  """
  with jax.named_scope('sample'):
    return jax.lax.cond(
      temperature > 0,
      lambda: _draw(logits_BV / temperature, keys_B, top_p),
      lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def _draw(logits_BV: Float[Array, 'B V'], keys_B, top_p) -> Int[Array, 'B']:
  """One draw a row from its nucleus."""
  kept_BV = jnp.where(_nucleus(logits_BV, top_p), logits_BV, -jnp.inf)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
  return drawn_B.astype(jnp.int32)


def _nucleus(logits_BV: Float[Array, 'B V'], top_p) -> Array:
  """True on the most likely tokens, as few as reach a mass of top_p."""
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)
  sorted_BV = jnp.sort(probs_BV, axis=-1, descending=True)
  before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
  count_B1 = jnp.sum(before_BV < top_p, axis=-1, keepdims=True)
  # At least the first is kept, and all that tie with the last one kept.
  last_B1 = jnp.take_along_axis(
    sorted_BV, jnp.maximum(count_B1, 1) - 1, axis=-1
  )
  # Sums in f32 reach 1 before the last tokens; 1 is to keep these too.
  return (probs_BV >= last_B1) | (top_p >= 1.0)
