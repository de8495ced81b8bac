"""Answers to a call of the server: its requests, their text, and its JSON.

A call may ask for several answers; their pieces come as they are made.
"""

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
from dsv3_jax.server import engine_thread, protocol


@dataclasses.dataclass(frozen=True)
class Choice:
  """A piece of one answer. finish: 'stop' or 'length' at its end, else None."""

  index: int
  text: str
  finish: str | None = None


class Answers:
  """The requests of one call, and what comes of them as text."""

  def __init__(
    self,
    model: engine_thread.Worker,
    tokenizer: tokenizers.Tokenizer,
    ask: protocol.Ask,
    max_tokens: int,
  ):
    """Args: max_tokens: where `ask` names none. Of a running event loop."""
    self._worker, self._tokenizer, self.ask = model, tokenizer, ask
    self._max_tokens = max_tokens
    self._news: asyncio.Queue = asyncio.Queue()
    self._loop = asyncio.get_running_loop()
    self.tickets: list[engine_thread.Ticket] = []
    self.prompt_tokens = sum(map(len, ask.prompts))
    self.completion_tokens = 0

  def begin(self) -> None:
    """Submits all or none.

    Raises:
      InputError, Full, Closed: see `Worker.submit`.
    """
    try:
      for prompt in self.ask.prompts:
        first = self._submit(prompt)
        for _ in range(self.ask.choices - 1):
          self._submit(prompt, first)
    except (errors.InputError, engine_thread.Full, engine_thread.Closed):
      self.cancel()
      raise

  def _submit(
    self, prompt: list[int], twin: engine_thread.Ticket | None = None
  ) -> engine_thread.Ticket:
    index = len(self.tickets)
    draw = dataclasses.replace(self.ask.draw, stream=index)

    def tell(news):
      with contextlib.suppress(RuntimeError):  # the loop is closed
        self._loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

    stop_ids = [self._tokenizer.eos_id]
    count = self.ask.max_tokens
    if count is None:
      room = self._worker.session.room(len(prompt))
      count = max(min(self._max_tokens, room), 1)
    args = (prompt, count, draw, stop_ids, tell, twin)
    self.tickets.append(self._worker.submit(*args))
    return self.tickets[-1]

  def cancel(self) -> None:
    """Nobody waits any more; nothing happens to what is done."""
    for ticket in self.tickets:
      self._worker.cancel(ticket)

  async def pieces(self) -> AsyncIterator[Choice]:
    """Text as it comes, of all answers."""
    decode = functools.partial(self._tokenizer.decode, skip_special=True)
    eos = self._tokenizer.eos_id
    streams = [
      (detokenizer.Characters(decode), detokenizer.Stops(self.ask.stops))
      for _ in self.tickets
    ]
    left = set(range(len(self.tickets)))
    while left:
      index, news = await self._news.get()
      if index not in left:
        continue
      if news.token is None:
        raise engine_thread.Closed
      self.completion_tokens += 1
      characters, stops = streams[index]
      ended = news.token == eos
      new = '' if ended else characters.feed(news.token)
      if news.is_last:
        new += characters.end()
      new = stops.feed(new)
      finish = None
      if stops.stopped or news.is_last:
        new += stops.end()
        finish = 'stop' if stops.stopped or ended else 'length'
        left.discard(index)
        self._worker.cancel(self.tickets[index])
      if new or finish:
        yield Choice(index, new, finish=finish)


class Form:
  """What a kind of answer looks like; see the two below."""

  prefix = kind = whole_kind = ''

  def __init__(self, model: str):
    self._frame = {
      'id': f'{self.prefix}-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': model,
    }

  def opening(self, count: int) -> list[dict]:
    return []

  def piece(self, choice: Choice) -> dict:
    body = {
      'index': choice.index,
      'finish_reason': choice.finish,
      'logprobs': None,
    }
    return self._frame | {
      'object': self.kind,
      'choices': [body | self._content(choice, 'delta')],
    }

  def usage(self, answers: Answers) -> dict:
    return self._frame | {
      'object': self.kind,
      'choices': [],
      'usage': _usage(answers),
    }

  async def collect(self, answers: Answers) -> dict:
    """The whole answer as one object."""
    texts = [[] for _ in answers.tickets]
    ends = [None for _ in answers.tickets]
    async for piece in answers.pieces():
      texts[piece.index].append(piece.text)
      ends[piece.index] = piece.finish
    choices = []
    for index, (parts, finish) in enumerate(zip(texts, ends, strict=True)):
      choice = Choice(index, ''.join(parts), finish=finish)
      body = {'index': index, 'finish_reason': finish, 'logprobs': None}
      choices.append(body | self._content(choice, 'message'))
    return self._frame | {
      'object': self.whole_kind,
      'choices': choices,
      'usage': _usage(answers),
    }

  def _content(self, choice: Choice, place: str) -> dict:
    raise NotImplementedError


def _usage(answers: Answers) -> dict:
  return {
    'prompt_tokens': answers.prompt_tokens,
    'completion_tokens': answers.completion_tokens,
    'total_tokens': answers.prompt_tokens + answers.completion_tokens,
  }


class Completion(Form):
  prefix, kind, whole_kind = 'cmpl', 'text_completion', 'text_completion'

  def _content(self, choice: Choice, place: str) -> dict:
    return {'text': choice.text}


class Chat(Form):
  """Thoughts go to `reasoning_content`, the rest to `content`."""

  prefix, kind = 'chatcmpl', 'chat.completion.chunk'
  whole_kind = 'chat.completion'

  def __init__(self, model: str):
    super().__init__(model)
    self._thoughts: dict[int, detokenizer.Thoughts] = {}

  def opening(self, count: int) -> list[dict]:
    role = {'role': 'assistant', 'content': ''}
    first = {'finish_reason': None, 'logprobs': None, 'delta': role}
    frame = self._frame | {'object': self.kind}
    return [frame | {'choices': [{'index': i} | first]} for i in range(count)]

  def _content(self, choice: Choice, place: str) -> dict:
    thoughts = self._thoughts.setdefault(choice.index, detokenizer.Thoughts())
    pieces = thoughts.feed(choice.text)
    if choice.finish:
      pieces += thoughts.end()
    told = {'content': '', 'reasoning_content': ''}
    for inside, part in pieces:
      told['reasoning_content' if inside else 'content'] += part
    if not told['reasoning_content']:
      del told['reasoning_content']
    if place == 'message':
      told['role'] = 'assistant'
    return {place: told}
