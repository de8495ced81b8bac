"""The JSON of answers, as OpenAI's two endpoints give it."""

import abc
import secrets
import time
from typing import Any

import numpy as np

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer
from dsv3_jax.inference import request as requests
from dsv3_jax.server import responses

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

  def chunk(self, piece: responses.TextPiece) -> dict:
    """A chunk of a stream."""
    return self._frame | {
      'object': self.chunk_kind,
      'choices': [self._choice(piece, 'delta')],
    }

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
      tokens = sum((piece.tokens for piece in parts[place]), ())
      reason = parts[place][-1].finish_reason
      piece = responses.TextPiece(index, text, reason, tokens)
      choices.append(self._choice(piece, 'message'))
    return self._frame | {
      'object': self.kind,
      'choices': choices,
      'usage': _usage(stream),
    }

  def _choice(self, piece: responses.TextPiece, key: str) -> dict:
    reason = piece.finish_reason
    logprobs = self._logprobs(piece) if piece.tokens else None
    body = {'index': piece.index, 'finish_reason': reason}
    return body | {'logprobs': logprobs} | self._content(piece, key)

  @abc.abstractmethod
  def _content(self, piece: responses.TextPiece, key: str) -> dict:
    """The text of a piece. key: where a chat response has it."""

  @abc.abstractmethod
  def _logprobs(self, piece: responses.TextPiece) -> dict:
    """Log-probabilities of its tokens."""

  def _token(self, index: int) -> str:
    """A token as text; bytes that are no whole characters are spelled out."""
    data = self._tokenizer.token_bytes(index)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


class CompletionFormat(ResponseFormat):
  prefix, chunk_kind, kind = 'cmpl', 'text_completion', 'text_completion'

  def __init__(self, model: str, tokenizer: tokenizers.Tokenizer):
    super().__init__(model, tokenizer)
    self._offsets: dict[int, int] = {}

  def _content(self, piece: responses.TextPiece, key: str) -> dict:
    return {'text': piece.text}

  def _logprobs(self, piece: responses.TextPiece) -> dict:
    offset, offsets, tops = self._offsets.get(piece.index, 0), [], []
    for token, logprobs in piece.tokens:
      offsets.append(offset)
      offset += len(self._tokenizer.decode([token], skip_special=True))
      if logprobs is None:
        tops.append(None)
        continue
      own = {self._token(token): _finite(logprobs.logprob)}
      tops.append({self._token(v): _finite(x) for v, x in logprobs.top} | own)
    self._offsets[piece.index] = offset
    return {
      'tokens': [self._token(token) for token, _ in piece.tokens],
      'token_logprobs': [
        None if logprobs is None else _finite(logprobs.logprob)
        for _, logprobs in piece.tokens
      ],
      'top_logprobs': tops,
      'text_offset': offsets,
    }


class ChatFormat(ResponseFormat):
  """Thoughts go to `reasoning_content`, the rest to `content`."""

  prefix, chunk_kind = 'chatcmpl', 'chat.completion.chunk'
  kind = 'chat.completion'

  def __init__(self, model: str, tokenizer: tokenizers.Tokenizer):
    super().__init__(model, tokenizer)
    self._thoughts: dict[int, detokenizer.Thoughts] = {}

  def opening(self, count: int) -> list[dict]:
    role = {'role': 'assistant', 'content': ''}
    first = {'finish_reason': None, 'logprobs': None, 'delta': role}
    frame = self._frame | {'object': self.chunk_kind}
    return [frame | {'choices': [{'index': i} | first]} for i in range(count)]

  def _content(self, piece: responses.TextPiece, key: str) -> dict:
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

  def _logprobs(self, piece: responses.TextPiece) -> dict:
    entries = []
    for token, logprobs in piece.tokens:
      entry = self._entry(token, logprobs.logprob)
      entry['top_logprobs'] = [self._entry(v, x) for v, x in logprobs.top]
      entries.append(entry)
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
      group = sorted(group, key=lambda i: -_mean_logprob(stream.requests[i]))
    chosen += group[: call.n]
  return chosen


def _mean_logprob(request: requests.Request) -> float:
  return float(np.mean([x.logprob for x in request.logprobs]))


def _finite(logprob: float) -> float:
  return max(logprob, _LEAST)


def _usage(stream: responses.ResponseStream) -> dict:
  return {
    'prompt_tokens': stream.prompt_tokens,
    'completion_tokens': stream.completion_tokens,
    'total_tokens': stream.prompt_tokens + stream.completion_tokens,
  }
