"""What the steps of inference compute: a chunk of prompts, or a decode step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.inference import sampling, token_cache
from dsv3_jax.nn import model


class StepInput(NamedTuple):
  """Tokens to compute.

  index_BT: int32, position of each token in its row, -1 for padding.
  last_B: which of a row's tokens is the last. after_B: the token behind it, -1
  if it is to be sampled. table_Bb: block table of each row.
  """

  tokens_BT: np.ndarray
  index_BT: np.ndarray
  last_B: np.ndarray
  after_B: np.ndarray
  table_Bb: np.ndarray


class StepOutput(NamedTuple):
  """New tokens of each row, and speculative tokens that may follow them.

  The first `count_B` of `tokens_Bt` are new.
  logprobs: of the new tokens, [B, t] and [B, t, K]. prompt_logprobs: of the
  token behind each computed one, [B, T] and [B, T, K]; of `score` only.
  """

  tokens_Bt: Int[Array, 'B t']
  count_B: Int[Array, 'B']
  speculative_Bk: Int[Array, 'B k']
  logprobs: sampling.Logprobs | None = None
  prompt_logprobs: sampling.Logprobs | None = None


class _DraftInput(NamedTuple):
  """What the MTP module drafts from.

  previous_BTD: hidden states of the step's tokens. next_BT: the token behind
  each of them. at_B1: index of each row's last accepted token. tokens_BS: of
  each row.
  """

  previous_BTD: Array
  next_BT: Array
  at_B1: Array
  tokens_BS: Array


class Forward(NamedTuple):
  """The functions that steps compile.

  net: the model in the form that takes the step's tokens; absorbed: the form
  that takes rows with tokens in the cache.
  """

  net: model.Model
  absorbed: model.Model
  num_speculative_tokens: int

  def chunk(
    self, variables, router_biases, step_input, caches, arrays, *, scores=False
  ):
    """One pass over a chunk, and the token behind its last one."""
    tokens_BT, last_B1 = step_input.tokens_BT, step_input.last_B[:, None]
    at_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    caches, tokens_BS = _remember(step_input, caches)
    logits_BtV, previous_BTD, caches, load_LE = self.net.apply(
      variables,
      tokens_BT,
      step_input.index_BT,
      at_BT if scores else last_B1,
      step_input.table_Bb,
      router_biases,
      caches,
      method='forward_cached',
    )
    logits_B1V = logits_BtV
    if scores:
      logits_B1V = jnp.take_along_axis(logits_BtV, last_B1[:, :, None], axis=1)
    # A sample depends on its position in the row only, not on the chunks.
    place_B1 = jnp.take_along_axis(step_input.index_BT, last_B1, axis=1)
    place_B = place_B1[:, 0]
    row_tokens = sampling.RowTokens(tokens_BS, place_B + 1)
    token_B = sampling.sample(logits_B1V[:, 0], arrays, place_B, row_tokens)
    after_B = step_input.after_B
    follows_B = jnp.where(after_B < 0, token_B, after_B)
    is_last_BT = jnp.arange(tokens_BT.shape[1]) == last_B1
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    next_BT = jnp.where(is_last_BT, follows_B[:, None], next_BT)
    draft_input = _DraftInput(previous_BTD, next_BT, last_B1, tokens_BS)
    speculative_Bk, caches = self._draft(
      variables, router_biases, step_input, draft_input, caches, arrays
    )
    token_B1, wanted_B = token_B[:, None], arrays.logprobs_B
    output = StepOutput(
      token_B1,
      jnp.ones_like(token_B),
      speculative_Bk,
      _logprobs(logits_B1V, token_B1, wanted_B),
      _logprobs(logits_BtV, next_BT, wanted_B) if scores else None,
    )
    return output, caches, load_LE

  def score(self, *args):
    """As `chunk`, with the log-probabilities of the chunk's own tokens."""
    return self.chunk(*args, scores=True)

  def verify(self, variables, router_biases, step_input, caches, arrays):
    """One pass over last and speculative tokens; samples behind each."""
    batch, width = step_input.tokens_BT.shape
    index_BT = step_input.index_BT
    at_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
    caches, tokens_BS = _remember(step_input, caches)
    logits_BTV, previous_BTD, caches, load_LE = self.net.apply(
      variables,
      step_input.tokens_BT,
      index_BT,
      at_BT,
      step_input.table_Bb,
      router_biases,
      caches,
      method='forward_cached',
    )
    repeat = lambda x: jnp.repeat(x, width, axis=0)
    arrays_M = jax.tree.map(repeat, arrays)
    logits_MV = logits_BTV.reshape(batch * width, -1)
    # Behind each token, those up to it count.
    place_M = index_BT.ravel()
    row_tokens = sampling.RowTokens(repeat(tokens_BS), place_M + 1)
    token_M = sampling.sample(logits_MV, arrays_M, place_M, row_tokens)
    token_BT = token_M.reshape(batch, width)
    agrees_Bk = token_BT[:, :-1] == step_input.tokens_BT[:, 1:]
    agrees_Bk &= index_BT[:, 1:] >= 0
    accepted_B1 = jnp.sum(jnp.cumprod(agrees_Bk, axis=1), axis=1, keepdims=True)
    draft_input = _DraftInput(previous_BTD, token_BT, accepted_B1, tokens_BS)
    speculative_Bk, caches = self._draft(
      variables, router_biases, step_input, draft_input, caches, arrays
    )
    logprobs = _logprobs(logits_BTV, token_BT, arrays.logprobs_B)
    count_B = accepted_B1[:, 0] + 1
    output = StepOutput(token_BT, count_B, speculative_Bk, logprobs)
    return output, caches, load_LE

  def _draft(
    self, variables, router_biases, step_input, draft_input, caches, arrays
  ):
    """Drafts, by the MTP module, the speculative tokens of the next step.

    The first comes from one pass over all tokens of the step, which also fills
    the module's cache. Each further one comes from the module's own hidden
    state; the latents that it writes are overwritten when the tokens are known.
    Tokens are drafted with the random numbers that the main model will sample
    with: those of the same position. Penalties do not count drafted tokens.
    """
    previous_BTD, next_BT, at_B1, tokens_BS = draft_input
    index_BT, net, speculative = step_input.index_BT, self.net, []
    place_B1 = jnp.take_along_axis(index_BT, at_B1, axis=1)
    row_tokens = sampling.RowTokens(tokens_BS, place_B1[:, 0] + 1)
    for _ in range(self.num_speculative_tokens):
      logits_B1V, previous_BTD, caches = net.apply(
        variables,
        previous_BTD,
        next_BT,
        index_BT,
        at_B1,
        step_input.table_Bb,
        router_biases,
        caches,
        method='draft',
      )
      place_B1 = jnp.where(place_B1 < 0, place_B1, place_B1 + 1)
      token_B = sampling.sample(
        logits_B1V[:, 0], arrays, place_B1[:, 0], row_tokens
      )
      speculative.append(token_B)
      net, next_BT, index_BT = self.absorbed, token_B[:, None], place_B1
      at_B1 = jnp.zeros_like(at_B1)
    if not speculative:
      return jnp.zeros((len(at_B1), 0), jnp.int32), caches
    return jnp.stack(speculative, axis=1), caches


def _remember(step_input, caches) -> tuple[model.Caches, Array]:
  """Writes the tokens of a step; all tokens of each row, in its blocks."""
  table_Bb = step_input.table_Bb
  args = (step_input.tokens_BT, step_input.index_BT, table_Bb)
  tokens_1ps1 = token_cache.write(caches.tokens_1ps1, *args)
  tokens_BS = token_cache.read(tokens_1ps1, table_Bb)
  return caches._replace(tokens_1ps1=tokens_1ps1), tokens_BS


def _logprobs(logits_BtV, token_Bt, wanted_B) -> sampling.Logprobs:
  """Of one token in each place: [B, t] and [B, t, K]."""
  logits_MV = logits_BtV.reshape(-1, logits_BtV.shape[-1])
  args = (logits_MV, token_Bt.ravel(), jnp.any(wanted_B))
  split = lambda x: x.reshape(*token_Bt.shape, *x.shape[1:])
  return jax.tree.map(split, sampling.logprobs(*args))
