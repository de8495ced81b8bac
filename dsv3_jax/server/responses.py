"""Answers to a call: requests to the engine, and their text piece by piece.

A call may ask for several answers.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer
from dsv3_jax.inference import request as requests
from dsv3_jax.server import engine_thread, protocol


class Token(NamedTuple):
  """A token of an answer, or of its prompt.

  logprobs: None of the first token of a prompt. offset: characters before it.
  """

  index: int
  logprobs: requests.TokenLogprobs | None
  offset: int


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """A piece of one answer; `finish_reason` is None except at its end.

  tokens: those that the text came from; None: no log-probabilities are wanted.
  """

  index: int
  text: str
  finish_reason: requests.FinishReason | None = None
  tokens: tuple[Token, ...] | None = None


class ContextLengthError(errors.InputError):
  """Prompt and answer are longer than what the model or its cache takes."""


class ResponseStream:
  """The engine's requests for one call, and their tokens as text."""

  def __init__(
    self,
    thread: engine_thread.EngineThread,
    tokenizer: tokenizers.Tokenizer,
    api_request: protocol.ChatRequest,
    max_tokens: int,
  ):
    """Must be called in a running event loop.

    Args:
      max_tokens: of an answer, if `api_request` has no limit.
    """
    self._thread, self._tokenizer = thread, tokenizer
    self._hidden_ids = tokenizer.special_ids
    if api_request.parses_calls:  # their tokens are read from the text
      self._hidden_ids -= set(tokenizer.tool_ids.values())
    self.api_request, self._max_tokens = api_request, max_tokens
    self._outputs: asyncio.Queue[requests.TokenOutput] = asyncio.Queue()
    self._loop = asyncio.get_running_loop()
    self.requests: list[requests.Request] = []
    self.prompt_tokens = sum(map(len, api_request.prompts))
    self.completion_tokens = 0
    self.logprobs: list[list[float]] = []  # of each answer, up to its end

  def submit(self) -> None:
    """Submits all requests, or none.

    Raises:
      ContextLengthError: a prompt and its answer do not fit.
      InputError, QueueFull, Closed: see `EngineThread.submit`.
    """
    for prompt in self.api_request.prompts:
      self._check_length(len(prompt))
    try:
      for prompt in self.api_request.prompts:
        first = self._submit(prompt)
        for _ in range(self.api_request.best_of - 1):
          self._submit(prompt, first)
    except (errors.InputError, engine_thread.QueueFull, engine_thread.Closed):
      self.cancel()
      raise

  def _submit(
    self, prompt: list[int], shares_prompt_with: requests.Request | None = None
  ) -> requests.Request:
    call, sampling = self.api_request, self.api_request.sampling
    if shares_prompt_with:  # whose prompt is scored for all
      sampling = dataclasses.replace(sampling, prompt_logprobs=False)
    count = self._max_tokens if call.max_tokens is None else call.max_tokens
    if call.clamps:
      count = min(count, self._thread.max_new_tokens(len(prompt)))
    request = requests.Request(
      prompt,
      max(count, 1),  # if none is wanted, it is dropped
      dataclasses.replace(sampling, rng_stream=len(self.requests)),
      frozenset(() if call.ignore_eos else self._tokenizer.eos_ids),
      shares_prompt_with,
      call.constraint.matcher() if call.constraint else None,
    )
    self._thread.submit(request, self._on_output)
    self.requests.append(request)
    self.logprobs.append([])
    return request

  def _decode(self, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones that are none of it."""
    hidden = self._hidden_ids
    return self._tokenizer.decode([i for i in ids if i not in hidden])

  def _check_length(self, length: int) -> None:
    """Clients look for the words of the message."""
    call, limit = self.api_request, self._thread.max_new_tokens(0)
    count = 1 if call.clamps else max(call.max_tokens, 1)
    if length + count > limit:
      raise ContextLengthError(
        f"This model's maximum context length is {limit} tokens. However, you "
        f'requested {length + count} tokens ({length} in the prompt, {count} '
        'in the completion): shorten one of them (context_length_exceeded)'
      )

  def _on_output(self, output: requests.TokenOutput) -> None:
    """Hands an output over to the event loop; runs in the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
      self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

  def cancel(self) -> None:
    """Cancels the requests that are not finished."""
    for request in self.requests:
      self._thread.cancel(request)

  async def pieces(self) -> AsyncIterator[TextPiece]:
    """Pieces of all answers as they come.

    Raises:
      Closed: the engine has stopped before the answers were finished.
    """
    answers = {
      request: _Answer(
        index,
        detokenizer.Characters(self._decode),
        detokenizer.Stops(self.api_request.stop),
      )
      for index, request in enumerate(self.requests)
    }
    waiting: list[requests.TokenOutput] = []
    while answers:
      output = await self._next_output(waiting)
      request = output.request
      if request not in answers:
        continue
      if output.token is None:
        raise engine_thread.Closed
      piece = self._feed(answers[request], output)
      if piece.finish_reason:
        del answers[request]
        self._thread.cancel(request, piece.finish_reason)
      if piece.text or piece.finish_reason:
        yield piece

  async def _next_output(
    self, waiting: list[requests.TokenOutput]
  ) -> requests.TokenOutput:
    """The next output of an answer whose prompt has its scores, if wanted.

    Args:
      waiting: outputs that came before their prompt had them.
    """
    while True:
      for i, output in enumerate(waiting):
        scored = self._scored(output.request)
        if output.token is None or scored.has_prompt_logprobs:
          return waiting.pop(i)
      waiting.append(await self._outputs.get())

  def _scored(self, request: requests.Request) -> requests.Request:
    """The request whose scores of the prompt are those of an answer."""
    index, best_of = self.requests.index(request), self.api_request.best_of
    return self.requests[index // best_of * best_of]

  def _feed(self, answer: '_Answer', output: requests.TokenOutput) -> TextPiece:
    """What a token adds to an answer: nothing while its text is held back."""
    call, text, reason = self.api_request, '', output.finish_reason
    if call.echo and not answer.begun:
      text = self._echo(answer, self._scored(output.request))
    answer.begun = True
    if call.max_tokens == 0:
      reason = 'length'
    else:
      text += self._answer_text(answer, output)
      reason = 'stop' if answer.stops.stopped else reason
    if reason:
      text += answer.stops.end()
    if not text and not reason:
      return TextPiece(answer.index, '')
    answer.num_given += len(text)
    most = answer.num_given  # a stop string is cut off
    tokens = [x._replace(offset=min(x.offset, most)) for x in answer.tokens]
    answer.tokens.clear()
    tokens = None if call.logprobs is None else tuple(tokens)
    return TextPiece(answer.index, text, reason, tokens)

  def _answer_text(
    self, answer: '_Answer', output: requests.TokenOutput
  ) -> str:
    """The text of a new token, as far as it is certain."""
    self.completion_tokens += 1
    if output.logprobs is not None:
      self.logprobs[answer.index].append(output.logprobs.logprob)
      self._add_token(answer, output.token, output.logprobs)
    text = ''
    if output.finish_reason != 'stop':  # eos is no text, whatever it spells
      text = answer.characters.feed(output.token)
    if output.is_last:
      text += answer.characters.end()
    answer.length += len(text)
    return answer.stops.feed(text)

  def _add_token(
    self,
    answer: '_Answer',
    index: int,
    logprobs: requests.TokenLogprobs | None,
  ) -> None:
    """Adds a token with as many of the likeliest as are wanted."""
    count = self.api_request.logprobs
    if count is None:
      return
    if logprobs is not None:
      logprobs = logprobs._replace(top=logprobs.top[:count])
    answer.tokens.append(Token(index, logprobs, answer.length))

  def prompt_logprobs(self, index: int) -> list[requests.TokenLogprobs | None]:
    """Those of the prompt of an answer, once it has ended; None of the first.

    Args:
      index: of the answer.
    """
    return self._scored(self.requests[index]).prompt_logprobs

  def _echo(self, answer: '_Answer', request: requests.Request) -> str:
    """The text of the prompt; its tokens come with it."""
    characters = detokenizer.Characters(self._decode)
    text = []
    for i, index in enumerate(request.prompt):
      if request.prompt_logprobs:
        self._add_token(answer, index, request.prompt_logprobs[i])
      text.append(characters.feed(index))
      answer.length += len(text[-1])
    text.append(characters.end())
    answer.length += len(text[-1])
    return ''.join(text)


@dataclasses.dataclass
class _Answer:
  """What turns the tokens of an unfinished request into text.

  tokens: not given yet. length, num_given: characters of the whole text, and
  of what was given of it. begun: it has a token.
  """

  index: int
  characters: detokenizer.Characters
  stops: detokenizer.Stops
  tokens: list[Token] = dataclasses.field(default_factory=list)
  length: int = 0
  num_given: int = 0
  begun: bool = False
