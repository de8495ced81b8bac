"""A request, its sampling parameters, and the engine's output for it."""

import collections
import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.inference import block_pool
from dsv3_jax.inference import matcher as matchers

FinishReason = Literal['stop', 'length', 'aborted']
MAX_LOGIT_BIASES = 1024  # ids of a request; each step has room for so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How the tokens of a request are sampled; see `sampling.SamplingArrays`.

  seed: any integer; its lowest 64 bits count.
  rng_stream: number of a random stream; requests of one seed with different
    streams have independent random numbers.
  logit_bias: ids, and what is added to their logits.
  presence_penalty, frequency_penalty: subtracted from the logits of generated
    tokens, once, and as often as they occur.
  repetition_penalty: divides positive logits of the tokens so far, prompt
    included, and multiplies negative ones.
  logprobs: how many likeliest tokens are reported with each new one, and its
    own log-probability; None: neither.
  prompt_logprobs: the same of the prompt's tokens.

  Raises:
    ValueError: `prompt_logprobs` without `logprobs`, or too many ids in
      `logit_bias`.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  rng_stream: int = 0
  logit_bias: tuple[tuple[int, float], ...] = ()
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  repetition_penalty: float = 1.0
  logprobs: int | None = None
  prompt_logprobs: bool = False

  def __post_init__(self):
    if self.prompt_logprobs and self.logprobs is None:
      raise ValueError('prompt_logprobs=True needs a number of logprobs')
    if len(self.bias_arrays[0]) > MAX_LOGIT_BIASES:
      raise ValueError(f'logit_bias has more than {MAX_LOGIT_BIASES} ids')

  @functools.cached_property
  def bias_arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """The ids of `logit_bias`, each once, and what is added to each."""
    biases = collections.Counter()
    for token, bias in self.logit_bias:
      biases[token] += bias
    ids = np.array(list(biases), np.int32)
    return ids, np.array(list(biases.values()), np.float32)


GREEDY = SamplingParams()


class RequestState(enum.Enum):
  """Running requests have a block table; all others have none."""

  WAITING = enum.auto()
  RUNNING = enum.auto()
  FINISHED = enum.auto()


class TokenLogprobs(NamedTuple):
  """Log-probability of a token, and the likeliest in its place by id.

  rank: of the token; that of the likeliest is 1.
  """

  logprob: float
  rank: int
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(eq=False)
class Request:
  """A request to the engine, from its prompt to its last token.

  shares_prompt_with: an earlier request with the same prompt. While that
    request prefills the prompt, this one is running but has no blocks. It then
    takes a reference to the other's blocks.
  all_tokens: the prompt and the tokens generated so far.
  number: its place in the order of arrival.
  rank: whose cache holds its tokens.
  num_cached_tokens: tokens of the prompt that it did not compute, because the
    prefix cache or the other request had them. None until that is known.
  speculative_tokens: draft tokens behind `all_tokens`, not verified yet.
  num_reported: how many of `all_tokens` had a `TokenOutput` before a
    preemption. These are not reported again when they are regenerated.
  key_2: data of its PRNG key.
  matcher: which tokens its grammar allows next; None: all.
  logprobs: of the generated tokens, if wanted. prompt_logprobs: of the prompt's
  tokens, if wanted; None of the first.
  """

  prompt: list[int]
  max_new_tokens: int
  sampling: SamplingParams = GREEDY
  stop_ids: frozenset[int] = frozenset()
  shares_prompt_with: 'Request | None' = None
  matcher: matchers.Matcher | None = None
  state: RequestState = RequestState.WAITING
  all_tokens: list[int] = dataclasses.field(init=False)
  block_table: block_pool.BlockTable | None = None
  number: int = 0
  rank: int = 0
  num_cached_tokens: int | None = None
  speculative_tokens: list[int] = dataclasses.field(default_factory=list)
  num_reported: int = 0
  key_2: np.ndarray | None = None
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
  prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(init=False)

  def __post_init__(self):
    self.all_tokens = list(self.prompt)
    self.prompt_logprobs = [None] * (
      len(self.prompt) if self.sampling.prompt_logprobs else 0
    )

  @property
  def has_prompt_logprobs(self) -> bool:
    """All that are wanted are there; they come in order."""
    logprobs = self.prompt_logprobs
    return len(logprobs) < 2 or logprobs[-1] is not None

  @property
  def tokens(self) -> list[int]:
    """The tokens generated so far, the stop token included."""
    return self.all_tokens[len(self.prompt) :]

  @property
  def max_length(self) -> int:
    """The most tokens that prompt and answer can have together."""
    return len(self.prompt) + self.max_new_tokens

  @property
  def num_uncomputed(self) -> int:
    """Tokens to compute before the next one can be sampled."""
    return len(self.all_tokens) - self.block_table.length

  @property
  def is_uncached(self) -> bool:
    """It is running, and the cache holds none of its tokens."""
    return self.block_table.length == 0

  @property
  def done(self) -> bool:
    """Its last token has been generated, or it was cancelled."""
    return self.state is RequestState.FINISHED

  @property
  def finish_reason(self) -> FinishReason | None:
    """Why the last token generated is the last of all; None: it is not."""
    if self.all_tokens[-1] in self.stop_ids:
      is_cut = self.matcher is not None and self.matcher.failed
      return 'length' if is_cut else 'stop'
    return 'length' if len(self.all_tokens) == self.max_length else None


class TokenOutput(NamedTuple):
  """One new token of a request.

  token: None only where `finish_reason` is 'aborted': the engine has stopped
  before the request was finished.
  finish_reason: None: more tokens follow.
  logprobs: None if they are not wanted.
  """

  request: Request
  token: int | None
  finish_reason: FinishReason | None = None
  logprobs: TokenLogprobs | None = None

  @property
  def is_last(self) -> bool:
    return self.finish_reason is not None


def check_prompt(
  cfg: config.ModelConfig,
  prompt: Sequence[int],
  max_new_tokens: int,
  name: str = 'the prompt',
) -> None:
  """Checks that a model can continue a prompt.

  Args:
    name: of the prompt, in messages.

  Raises:
    InputError: an empty prompt, a token outside the vocabulary, or a prompt
      that leaves no room for `max_new_tokens`.
  """
  room = cfg.max_seq_len - max_new_tokens
  if not prompt:
    raise errors.InputError(f'{name} is empty: it needs one token at least')
  if room < 1:
    raise errors.InputError(
      f'max_new_tokens={max_new_tokens} must be below model.max_seq_len='
      f'{cfg.max_seq_len}, which a prompt shares'
    )
  if len(prompt) > room:
    raise errors.InputError(
      f'{name} has {len(prompt)} tokens; with max_new_tokens='
      f'{max_new_tokens} and model.max_seq_len={cfg.max_seq_len} at most '
      f'{room} fit'
    )
  if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
    raise errors.InputError(f'{name} has ids outside 0..{cfg.vocab_size - 1}')
