"""A conversation in the chat template, one answer at a time (TR 5.1)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax.inference import detokenizer, engine, llm
from dsv3_jax.inference import request as requests


def initial_messages(system: str) -> list[dict]:
  """The messages before the first message of the user."""
  return [{'role': 'system', 'content': system}] if system else []


class Conversation:
  """The messages so far, and an engine whose prefix cache holds them."""

  def __init__(
    self,
    model: llm.LLM,
    sampling: requests.SamplingParams,
    max_new_tokens: int,
    system: str = '',
    variables: Mapping[str, Any] | None = None,
  ):
    """Args:
    max_new_tokens: of an answer, if so many fit.
    variables: of the chat template, such as `thinking`.
    """
    self._variables = dict(variables or {})
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
    prompt = self._tokenizer.apply_chat_template(messages, **self._variables)
    room = max(self._engine.max_new_tokens(len(prompt.ids)), 1)
    count = min(self._max_new_tokens, room)
    stops = self._tokenizer.eos_ids
    request = self._engine.submit(prompt.ids, count, self._sampling, stops)
    thoughts = detokenizer.Thoughts(prompt.opens_thought)
    try:
      yield from self._answer(request, thoughts, messages)
    finally:  # the caller may stop early
      self._engine.cancel(request)

  def _answer(
    self,
    request: requests.Request,
    thoughts: detokenizer.Thoughts,
    messages: list[dict],
  ) -> Iterator[tuple[bool, str]]:
    decode = functools.partial(self._tokenizer.decode, skip_special=True)
    characters, answer = detokenizer.Characters(decode), ''
    stops = self._tokenizer.eos_ids
    while not request.done:
      for output in self._engine.step():
        new = '' if output.token in stops else characters.feed(output.token)
        if output.is_last:
          new += characters.end()
        pieces = thoughts.feed(new)
        if output.is_last:
          pieces += thoughts.end()
        for is_thought, piece in pieces:
          answer += '' if is_thought else piece
          yield is_thought, piece
    self.messages = [*messages, {'role': 'assistant', 'content': answer}]
