"""The JSON of answers, as OpenAI's two endpoints give it."""

import abc
import itertools
import secrets
import time
from typing import Any

import numpy as np

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer
from dsv3_jax.server import protocol, responses, tool_calls

_LEAST = -9999.0  # JSON has no -inf


class ResponseFormat(abc.ABC):
  """The JSON of a kind of answer; see the two subclasses."""

  prefix = chunk_kind = kind = ''

  def __init__(self, model: str, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer
    self._frame = {
      'id': f'{self.prefix}-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': model,
    }

  def opening(self, count: int) -> list[dict]:
    """Chunks before the first piece of `count` answers."""
    return []

  def chunk(
    self, piece: responses.TextPiece, stream: responses.ResponseStream
  ) -> dict:
    """A chunk of a stream."""
    body = self._frame | {
      'object': self.chunk_kind,
      'choices': [self._choice(piece, 'delta')],
    }
    if stream.api_request.continuous_usage:
      body['usage'] = _usage(stream)
    return body

  def usage(self, stream: responses.ResponseStream) -> dict:
    """The last chunk of a stream, with the number of tokens."""
    return self._frame | {
      'object': self.chunk_kind,
      'choices': [],
      'usage': _usage(stream),
    }

  async def collect(self, stream: responses.ResponseStream) -> dict:
    """The whole response as one object."""
    parts = [[] for _ in stream.requests]
    async for piece in stream.pieces():
      parts[piece.index].append(piece)
    choices = []
    for index, place in enumerate(_best(stream)):
      text = ''.join(piece.text for piece in parts[place])
      tokens = None
      if stream.api_request.logprobs is not None:
        tokens = itertools.chain(*(piece.tokens for piece in parts[place]))
        tokens = tuple(tokens)
      reason = parts[place][-1].finish_reason
      piece = responses.TextPiece(index, text, reason, tokens)
      choices.append(self._choice(piece, 'message'))
    body = {'object': self.kind, 'choices': choices, 'usage': _usage(stream)}
    if stream.api_request.prompt_logprobs is not None:
      self._add_of_prompts(
        body, [self._of_prompt(stream, place) for place in _best(stream)]
      )
    return self._frame | body

  @abc.abstractmethod
  def _add_of_prompts(self, body: dict, of_prompts: list) -> None:
    """Adds log-probabilities of the prompt of each choice, as vLLM does."""

  def _of_prompt(
    self, stream: responses.ResponseStream, place: int
  ) -> list[dict[str, dict] | None]:
    """Of each token of a prompt, its own and the likeliest in its place.

    In vLLM's form.
    """
    count, entries = stream.api_request.prompt_logprobs, []
    prompt = stream.requests[place].prompt
    logprobs = stream.prompt_logprobs(place)
    for token, of_token in zip(prompt, logprobs, strict=True):
      if of_token is None:
        entries.append(None)
        continue
      top = of_token.top[:count]
      ranks = {v: i for i, (v, _) in enumerate(top, 1)}
      own = (token, of_token.logprob)
      entries.append(
        {
          str(v): {
            'logprob': _finite(x),
            'rank': ranks.get(v, of_token.rank),
            'decoded_token': self._token(v),
          }
          for v, x in [own, *top]
        }
      )
    return entries

  def _choice(self, piece: responses.TextPiece, key: str) -> dict:
    reason = piece.finish_reason
    logprobs = None if piece.tokens is None else self._logprobs(piece)
    body = {'index': piece.index, 'finish_reason': reason}
    return body | {'logprobs': logprobs} | self._content(piece, key)

  @abc.abstractmethod
  def _content(self, piece: responses.TextPiece, key: str) -> dict:
    """What a choice has of the text of a piece.

    Args:
      key: where a chat response has it.
    """

  @abc.abstractmethod
  def _logprobs(self, piece: responses.TextPiece) -> dict:
    """Log-probabilities of its tokens."""

  def _token(self, index: int) -> str:
    """A token as text; bytes that are no whole characters are spelled out."""
    data = self._tokenizer.token_bytes(index)
    if not data:  # the model has more rows than the tokenizer has tokens
      return f'token_id:{index}'
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


class CompletionFormat(ResponseFormat):
  prefix, chunk_kind, kind = 'cmpl', 'text_completion', 'text_completion'

  def _add_of_prompts(self, body: dict, of_prompts: list) -> None:
    for choice, of_prompt in zip(body['choices'], of_prompts, strict=True):
      choice['prompt_logprobs'] = of_prompt

  def _content(self, piece: responses.TextPiece, key: str) -> dict:
    return {'text': piece.text}

  def _logprobs(self, piece: responses.TextPiece) -> dict:
    tops = []
    for token in piece.tokens:
      tops.append(None)
      if token.logprobs is not None:
        own = (token.index, token.logprobs.logprob)
        # Of two that are spelt alike the likelier one stays.
        pairs = sorted([own, *token.logprobs.top], key=lambda pair: pair[1])
        tops[-1] = {self._token(v): _finite(x) for v, x in pairs}
    return {
      'tokens': [self._token(token.index) for token in piece.tokens],
      'token_logprobs': [
        None if token.logprobs is None else _finite(token.logprobs.logprob)
        for token in piece.tokens
      ],
      'top_logprobs': tops,
      'text_offset': [token.offset for token in piece.tokens],
    }


class ChatFormat(ResponseFormat):
  """Thoughts go to `reasoning_content`, calls to `tool_calls`.

  The rest goes to `content`.
  """

  prefix, chunk_kind = 'chatcmpl', 'chat.completion.chunk'
  kind = 'chat.completion'

  def __init__(
    self,
    model: str,
    tokenizer: tokenizers.Tokenizer,
    api_request: protocol.ChatRequest,
  ):
    super().__init__(model, tokenizer)
    self._api_request = api_request
    self._thoughts: dict[int, detokenizer.Thoughts] = {}
    self._calls: dict[int, tool_calls.Parser] = {}

  def opening(self, count: int) -> list[dict]:
    role = {'role': 'assistant', 'content': ''}
    first = {'finish_reason': None, 'logprobs': None, 'delta': role}
    frame = self._frame | {'object': self.chunk_kind}
    return [frame | {'choices': [{'index': i} | first]} for i in range(count)]

  def _add_of_prompts(self, body: dict, of_prompts: list) -> None:
    body['prompt_logprobs'] = of_prompts[0]  # all choices have one prompt

  def _content(self, piece: responses.TextPiece, key: str) -> dict:
    thoughts = self._thoughts.setdefault(
      piece.index, detokenizer.Thoughts(self._api_request.opens_thought)
    )
    parts = thoughts.feed(piece.text)
    if piece.finish_reason:
      parts += thoughts.end()
    content = {'content': '', 'reasoning_content': ''}
    for is_thought, part in parts:
      content['reasoning_content' if is_thought else 'content'] += part
    choice = {key: content}
    if self._api_request.parses_calls:
      self._separate_calls(piece, choice, content)
    if not content['reasoning_content']:
      del content['reasoning_content']
    if key == 'message':
      content['role'] = 'assistant'
      for call in content.get('tool_calls', []):
        del call['index']
    return choice

  def _separate_calls(
    self, piece: responses.TextPiece, choice: dict, content: dict
  ) -> None:
    """Moves calls out of the content; they may be why the answer ends."""
    parser = tool_calls.Parser(self._api_request.max_calls)
    parser = self._calls.setdefault(piece.index, parser)
    first = parser.num_calls
    parts = parser.feed(content['content'])
    if piece.finish_reason:
      parts += parser.end()
    content['content'] = ''.join(x for x in parts if isinstance(x, str))
    calls = [x for x in parts if isinstance(x, tool_calls.Call)]
    if calls:
      content['tool_calls'] = [
        _call(index, call) for index, call in enumerate(calls, first)
      ]
      content['content'] = content['content'] or None
    if piece.finish_reason == 'stop' and parser.num_calls:
      choice['finish_reason'] = 'tool_calls'

  def _logprobs(self, piece: responses.TextPiece) -> dict:
    entries = []
    for token in piece.tokens:
      entry = self._entry(token.index, token.logprobs.logprob)
      top = [self._entry(v, x) for v, x in token.logprobs.top]
      entries.append(entry | {'top_logprobs': top})
    return {'content': entries, 'refusal': None}

  def _entry(self, token: int, logprob: float) -> dict[str, Any]:
    return {
      'token': self._token(token),
      'logprob': _finite(logprob),
      'bytes': list(self._tokenizer.token_bytes(token)),
    }


def _best(stream: responses.ResponseStream) -> list[int]:
  """Which requests are answered with: of each prompt the n likeliest."""
  call, chosen = stream.api_request, []
  for start in range(0, len(stream.requests), call.best_of):
    group = range(start, start + call.best_of)
    if call.best_of > call.n:
      group = sorted(group, key=lambda i: -np.mean(stream.logprobs[i] or [0.0]))
    chosen += group[: call.n]
  return chosen


def _call(index: int, call: tool_calls.Call) -> dict[str, Any]:
  return {
    'index': index,
    'id': f'call_{secrets.token_hex(12)}',
    'type': 'function',
    'function': call._asdict(),
  }


def _finite(logprob: float) -> float:
  return max(logprob, _LEAST)


def _usage(stream: responses.ResponseStream) -> dict:
  return {
    'prompt_tokens': stream.prompt_tokens,
    'completion_tokens': stream.completion_tokens,
    'total_tokens': stream.prompt_tokens + stream.completion_tokens,
  }
