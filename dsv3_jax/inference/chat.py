"""A conversation in the chat template, one answer at a time (TR 5.1)."""

import functools
from collections.abc import Iterator

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer, engine, llm
from dsv3_jax.inference import request as requests


def initial_messages(system: str) -> list[dict]:
  """The messages before the first message of the user."""
  return [{'role': 'system', 'content': system}] if system else []


def encode(tokenizer: tokenizers.Tokenizer, messages: list[dict]) -> list[int]:
  """The prompt that an answer follows."""
  ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
  return ids.tolist()


class Conversation:
  """The messages so far, and an engine whose prefix cache holds them."""

  def __init__(
    self,
    model: llm.LLM,
    sampling: requests.SamplingParams,
    max_new_tokens: int,
    system: str = '',
  ):
    """Args: max_new_tokens: of an answer, if so many fit."""
    self._tokenizer, self._sampling = model.tokenizer, sampling
    self._max_new_tokens = max_new_tokens
    num_blocks = -(-model.config.model.max_seq_len // engine.BLOCK_SIZE)
    self._engine = engine.Engine(
      model.runner, num_blocks=num_blocks, max_rows=1
    )
    self.messages = initial_messages(system)

  def say(self, text: str) -> Iterator[tuple[bool, str]]:
    """Yields pieces of the answer, each with whether it is a thought.

    The model does not read its thoughts again in later turns.

    Raises:
      InputError: the conversation has become too long.
    """
    messages = [*self.messages, {'role': 'user', 'content': text}]
    ids = encode(self._tokenizer, messages)
    room = max(self._engine.max_new_tokens(len(ids)), 1)
    count = min(self._max_new_tokens, room)
    stops = [self._tokenizer.eos_id]
    request = self._engine.submit(ids, count, self._sampling, stops)
    try:
      yield from self._answer(request, messages)
    finally:  # the caller may stop early
      self._engine.cancel(request)

  def _answer(
    self, request: requests.Request, messages: list
  ) -> Iterator[tuple[bool, str]]:
    decode = functools.partial(self._tokenizer.decode, skip_special=True)
    characters, stop = detokenizer.Characters(decode), self._tokenizer.eos_id
    thoughts, answer = detokenizer.Thoughts(), ''
    while not request.done:
      for output in self._engine.step():
        new = '' if output.token == stop else characters.feed(output.token)
        if output.is_last:
          new += characters.end()
        pieces = thoughts.feed(new)
        if output.is_last:
          pieces += thoughts.end()
        for is_thought, piece in pieces:
          answer += '' if is_thought else piece
          yield is_thought, piece
    self.messages = [*messages, {'role': 'assistant', 'content': answer}]
