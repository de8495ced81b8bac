"""Answers to a call: requests to the engine, their text, and OpenAI's JSON.

A call may ask for several answers; their text comes piece by piece.
"""

import abc
import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer
from dsv3_jax.inference import request as requests
from dsv3_jax.server import engine_thread, protocol


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """A piece of one answer; `finish_reason` is None except at its end."""

  index: int
  text: str
  finish_reason: requests.FinishReason | None = None


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
    self.api_request, self._max_tokens = api_request, max_tokens
    self._outputs: asyncio.Queue[requests.TokenOutput] = asyncio.Queue()
    self._loop = asyncio.get_running_loop()
    self.requests: list[requests.Request] = []
    self.prompt_tokens = sum(map(len, api_request.prompts))
    self.completion_tokens = 0

  def submit(self) -> None:
    """Submits all requests, or none.

    Raises:
      InputError, QueueFull, Closed: see `EngineThread.submit`.
    """
    try:
      for prompt in self.api_request.prompts:
        first = self._submit(prompt)
        for _ in range(self.api_request.n - 1):
          self._submit(prompt, first)
    except (errors.InputError, engine_thread.QueueFull, engine_thread.Closed):
      self.cancel()
      raise

  def _submit(
    self, prompt: list[int], shares_prompt_with: requests.Request | None = None
  ) -> requests.Request:
    params = self.api_request.sampling
    count = self.api_request.max_tokens
    if count is None:
      room = self._thread.max_new_tokens(len(prompt))
      count = max(min(self._max_tokens, room), 1)
    request = requests.Request(
      prompt,
      count,
      dataclasses.replace(params, rng_stream=len(self.requests)),
      frozenset([self._tokenizer.eos_id]),
      shares_prompt_with,
    )
    self._thread.submit(request, self._on_output)
    self.requests.append(request)
    return request

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
    decode = functools.partial(self._tokenizer.decode, skip_special=True)
    eos, stop = self._tokenizer.eos_id, self.api_request.stop
    # What turns the tokens of each unfinished request into text.
    streams = {
      request: (
        index,
        detokenizer.Characters(decode),
        detokenizer.Stops(stop),
      )
      for index, request in enumerate(self.requests)
    }
    while streams:
      output = await self._outputs.get()
      request = output.request
      if request not in streams:
        continue
      if output.token is None:
        raise engine_thread.Closed
      self.completion_tokens += 1
      index, characters, stops = streams[request]
      text = '' if output.token == eos else characters.feed(output.token)
      if output.is_last:
        text += characters.end()
      text = stops.feed(text)
      finish_reason = 'stop' if stops.stopped else output.finish_reason
      if finish_reason:
        text += stops.end()
        del streams[request]
        self._thread.cancel(request)
      if text or finish_reason:
        yield TextPiece(index, text, finish_reason)


class ResponseFormat(abc.ABC):
  """The JSON of a kind of answer; see the two subclasses."""

  prefix = chunk_kind = kind = ''

  def __init__(self, model: str):
    self._frame = {
      'id': f'{self.prefix}-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': model,
    }

  def opening(self, count: int) -> list[dict]:
    """Chunks before the first piece of `count` answers."""
    return []

  def chunk(self, piece: TextPiece) -> dict:
    """A chunk of a stream."""
    return self._frame | {
      'object': self.chunk_kind,
      'choices': [self._choice(piece, 'delta')],
    }

  def usage(self, stream: ResponseStream) -> dict:
    """The last chunk of a stream, with the number of tokens."""
    return self._frame | {
      'object': self.chunk_kind,
      'choices': [],
      'usage': _usage(stream),
    }

  async def collect(self, stream: ResponseStream) -> dict:
    """The whole response as one object."""
    texts = [[] for _ in stream.requests]
    reasons = [None for _ in stream.requests]
    async for piece in stream.pieces():
      texts[piece.index].append(piece.text)
      reasons[piece.index] = piece.finish_reason
    choices = []
    for index, (parts, reason) in enumerate(zip(texts, reasons, strict=True)):
      piece = TextPiece(index, ''.join(parts), reason)
      choices.append(self._choice(piece, 'message'))
    return self._frame | {
      'object': self.kind,
      'choices': choices,
      'usage': _usage(stream),
    }

  def _choice(self, piece: TextPiece, key: str) -> dict:
    reason = piece.finish_reason
    body = {'index': piece.index, 'finish_reason': reason, 'logprobs': None}
    return body | self._content(piece, key)

  @abc.abstractmethod
  def _content(self, piece: TextPiece, key: str) -> dict:
    """The text of a piece. key: where a chat response has it."""


def _usage(stream: ResponseStream) -> dict:
  return {
    'prompt_tokens': stream.prompt_tokens,
    'completion_tokens': stream.completion_tokens,
    'total_tokens': stream.prompt_tokens + stream.completion_tokens,
  }


class CompletionFormat(ResponseFormat):
  prefix, chunk_kind, kind = 'cmpl', 'text_completion', 'text_completion'

  def _content(self, piece: TextPiece, key: str) -> dict:
    return {'text': piece.text}


class ChatFormat(ResponseFormat):
  """Thoughts go to `reasoning_content`, the rest to `content`."""

  prefix, chunk_kind = 'chatcmpl', 'chat.completion.chunk'
  kind = 'chat.completion'

  def __init__(self, model: str):
    super().__init__(model)
    self._thoughts: dict[int, detokenizer.Thoughts] = {}

  def opening(self, count: int) -> list[dict]:
    role = {'role': 'assistant', 'content': ''}
    first = {'finish_reason': None, 'logprobs': None, 'delta': role}
    frame = self._frame | {'object': self.chunk_kind}
    return [frame | {'choices': [{'index': i} | first]} for i in range(count)]

  def _content(self, piece: TextPiece, key: str) -> dict:
    thoughts = self._thoughts.setdefault(piece.index, detokenizer.Thoughts())
    parts = thoughts.feed(piece.text)
    if piece.finish_reason:
      parts += thoughts.end()
    content = {'content': '', 'reasoning_content': ''}
    for is_thought, part in parts:
      content['reasoning_content' if is_thought else 'content'] += part
    if not content['reasoning_content']:
      del content['reasoning_content']
    if key == 'message':
      content['role'] = 'assistant'
    return {key: content}
