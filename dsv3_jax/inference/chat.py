"""A conversation in the chat template, answer by answer (TR 5.1)."""

import functools
from collections.abc import Iterator

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer, engine, llm


def opening(system: str) -> list[dict]:
  """The messages before the first word of the user."""
  return [{'role': 'system', 'content': system}] if system else []


def encode(tokenizer: tokenizers.Tokenizer, messages: list[dict]) -> list[int]:
  """Ids that an answer follows."""
  ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
  return ids.tolist()


class Conversation:
  """Messages so far, and a cache that keeps what was said."""

  def __init__(
    self,
    model: llm.LLM,
    draw: engine.Draw,
    max_new_tokens: int,
    system: str = '',
  ):
    """Args: max_new_tokens: of an answer; it has fewer where no more fit."""
    self._tokenizer, self._draw = model.tokenizer, draw
    self._most = max_new_tokens
    full = -(-model.config.model.max_seq_len // engine.PAGE)
    self._session = engine.Engine(
      model.engine.steps, num_pages=full, max_rows=1
    )
    self.messages = opening(system)

  def say(self, words: str) -> Iterator[tuple[bool, str]]:
    """The answer as it comes: pieces, each with whether it is a thought.

    Thoughts are not part of what the model reads later.

    Raises:
      InputError: the conversation has become too long.
    """
    asked = [*self.messages, {'role': 'user', 'content': words}]
    ids = encode(self._tokenizer, asked)
    stops = [self._tokenizer.eos_id]
    most = min(self._most, max(self._session.room(len(ids)), 1))
    request = self._session.submit(ids, most, self._draw, stops)
    try:
      yield from self._answer(request, asked)
    finally:  # the caller may have had enough
      self._session.cancel(request)

  def _answer(
    self, request: engine.Request, asked: list
  ) -> Iterator[tuple[bool, str]]:
    decode = functools.partial(self._tokenizer.decode, skip_special=True)
    characters, stop = detokenizer.Characters(decode), self._tokenizer.eos_id
    thoughts, answer = detokenizer.Thoughts(), ''
    while not request.done:
      for told in self._session.step():
        new = '' if told.token == stop else characters.feed(told.token)
        if told.is_last:
          new += characters.end()
        pieces = thoughts.feed(new)
        if told.is_last:
          pieces += thoughts.end()
        for is_thought, piece in pieces:
          answer += '' if is_thought else piece
          yield is_thought, piece
    self.messages = [*asked, {'role': 'assistant', 'content': answer}]
