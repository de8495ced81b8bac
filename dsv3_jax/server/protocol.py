"""Bodies of OpenAI's API, parsed and checked field by field.

An unknown field is refused and not ignored, except a field at a value that has
no effect, and a field that never changes an answer.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import request as requests

_COMMON = {
  'model': str,
  'stream': bool,
  'stream_options': dict,
  'temperature': (int, float),
  'top_p': (int, float),
  'top_k': int,
  'seed': int,
  'stop': (str, list),
  'n': int,
  # These never change an answer.
  'metadata': dict,
  'prompt_cache_key': str,
  'safety_identifier': str,
  'user': str,
}
_COMPLETION = _COMMON | {
  'prompt': (str, list),
  'max_tokens': int,
  'best_of': int,
}
_CHAT = _COMMON | {
  'messages': list,
  'max_tokens': int,
  'max_completion_tokens': int,
}
# Accepted at these values, at which they have no effect.
_NEUTRAL = {
  'echo': (False,),
  'frequency_penalty': (0, 0.0),
  'function_call': ('none', 'auto'),
  'functions': ([],),
  'logit_bias': ({},),
  'logprobs': (False, 0),
  'modalities': (['text'],),
  'parallel_tool_calls': (False, True),
  'presence_penalty': (0, 0.0),
  'response_format': ({'type': 'text'},),
  'service_tier': ('auto', 'default'),
  'store': (False,),
  'suffix': ('',),
  'tool_choice': ('none', 'auto'),
  'tools': ([],),
  'top_logprobs': (0,),
}
_MESSAGE = ('role', 'content')
# Fields of an answer that a client sends back in the next conversation turn.
_MESSAGE_NEUTRAL = {
  'annotations': ([],),
  'tool_calls': ([],),
  'audio': (),
  'function_call': (),
  'refusal': (),
}
_MAX_STOPS, _MAX_CHOICES = 16, 16


class NoModelError(errors.InputError):
  """The body names a model that is not served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Limits of a server, and the seed of a call that has none.

  model: name of the model. max_choices: answers of one call. max_tokens: of one
  answer.
  """

  model: str
  max_choices: int
  max_tokens: int
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
  """The parsed body of a call to either endpoint: chat or completions.

  A chat has one prompt, its messages in the chat template; a completion may
  have several.

  prompts: token ids. n: answers to each prompt. max_tokens: of an answer; None:
  as many as fit. stream: answer with server-sent events. include_usage: the
  last event has the number of tokens.
  """

  prompts: list[list[int]]
  n: int
  max_tokens: int | None
  sampling: requests.SamplingParams
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool


def parse_completion(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> ChatRequest:
  """Parses a body of `/v1/completions`.

  Raises:
    NoModelError: it names another model.
    InputError: names the field, its value and the rule.
  """
  fields = _fields(body, _COMPLETION, limits)
  inputs = fields.get('prompt', '')
  is_ids = inputs and all(type(x) is int for x in inputs)
  if isinstance(inputs, str) or is_ids:
    inputs = [inputs]
  n = _num_choices(fields, len(inputs), limits)
  if fields.get('best_of', n) != n:
    raise errors.InputError(
      f'best_of={fields["best_of"]} is not supported here, unless it is n'
    )
  prompts = [_prompt(i, x, tokenizer) for i, x in enumerate(inputs)]
  if not prompts:
    raise errors.InputError('prompt=[] must hold at least one prompt')
  fields = {'max_tokens': min(16, limits.max_tokens)} | fields
  return _chat_request(fields, prompts, n, limits)


def parse_chat(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> ChatRequest:
  """Parses a body of `/v1/chat/completions`; raises as `parse_completion`."""
  fields = _fields(body, _CHAT, limits)
  n = _num_choices(fields, 1, limits)
  if {'max_tokens', 'max_completion_tokens'} <= fields.keys():
    raise errors.InputError(
      'max_tokens and max_completion_tokens are the same: give one of them'
    )
  inputs = enumerate(fields.get('messages', []))
  messages = [_message(f'messages[{i}]', x) for i, x in inputs]
  ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
  return _chat_request(fields, [ids.tolist()], n, limits)


def _fields(
  body: Any, known: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
  """The fields that have an effect, of the right types; null is absent."""
  if not isinstance(body, dict):
    raise errors.InputError('the body must be a JSON object')
  fields = _effective('', body, known, _NEUTRAL)
  for name, value in fields.items():
    wanted = known[name]
    is_bool = isinstance(value, bool)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
      raise errors.InputError(f'{name}={_short(value)} has the wrong type')
  model = fields.get('model', limits.model)
  if model != limits.model:
    raise NoModelError(f'model={_short(model)} is not served here')
  return fields


def _effective(path: str, fields: dict, known, neutral) -> dict[str, Any]:
  """The fields of an object that have an effect.

  Raises:
    InputError: a field that is unknown, or not supported at its value.
  """
  effective = {}
  for name, value in fields.items():
    # Not `in`: for Python, True is 1 and 0.0 is False.
    same = (x for x in neutral.get(name, ()) if type(x) is type(value))
    if value is None or any(x == value for x in same):
      continue
    if name in neutral:
      raise errors.InputError(
        f'{path}{name}={_short(value)} is not supported here'
      )
    if name not in known:
      raise errors.InputError(
        f'{path}{_short(name)} is no field of this request: '
        f'{", ".join(sorted(known))}'
      )
    effective[name] = value
  return effective


def _prompt(i: int, value: Any, tokenizer: tokenizers.Tokenizer) -> list[int]:
  """Ids of one prompt, which is a text or ids."""
  if isinstance(value, str):
    return tokenizer.encode(value, add_bos=True).tolist()
  if isinstance(value, list) and all(type(x) is int for x in value):
    return value
  raise errors.InputError(f'prompt[{i}] must be a string or a list of ids')


def _message(path: str, value: Any) -> dict[str, Any]:
  """A message with one text, and a role of the chat template."""
  if not isinstance(value, dict):
    raise errors.InputError(f'{path} must be an object')
  # The model does not read the thoughts of its answers again.
  fields = {k: v for k, v in value.items() if k != 'reasoning_content'}
  message = _effective(f'{path}.', fields, _MESSAGE, _MESSAGE_NEUTRAL)
  if message.get('role') == 'developer':
    message['role'] = 'system'
  if message.get('role') == 'tool':
    raise errors.InputError(
      f"{path}.role='tool' must be system, user or assistant"
    )
  content = message.get('content')
  if isinstance(content, list):
    parts = [_part(f'{path}.content[{i}]', x) for i, x in enumerate(content)]
    message['content'] = ''.join(parts)
  return message


def _part(path: str, value: Any) -> str:
  """The text of a part of a message."""
  if not isinstance(value, dict):
    raise errors.InputError(f'{path} must be an object')
  if value.get('type') != 'text':
    raise errors.InputError(
      f"{path}.type={_short(value.get('type'))} must be 'text'"
    )
  if value.keys() != {'type', 'text'} or not isinstance(value['text'], str):
    raise errors.InputError(f'{path} must have one string, its text')
  return value['text']


def _num_choices(fields: dict, prompts: int, limits: Limits) -> int:
  """Answers to each prompt; checked before anything is tokenised."""
  n = _within('n', fields.get('n', 1), 1, _MAX_CHOICES)
  _within('n * prompts', n * prompts, 0, limits.max_choices)
  return n


def _chat_request(
  fields: dict, prompts: list, n: int, limits: Limits
) -> ChatRequest:
  max_tokens = None
  for name in ('max_tokens', 'max_completion_tokens'):
    if name in fields:
      max_tokens = _within(name, fields[name], 1, limits.max_tokens)
  stops = fields.get('stop', [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MAX_STOPS or not all(isinstance(s, str) for s in stops):
    raise errors.InputError(f'stop must be at most {_MAX_STOPS} strings')
  temperature = _within('temperature', fields.get('temperature', 1), 0, 100)
  params = requests.SamplingParams(
    temperature=float(temperature),
    top_k=_within('top_k', fields.get('top_k', 0), 0, 2**31 - 1),
    top_p=float(_fraction(fields.get('top_p', 1))),
    seed=_within('seed', fields.get('seed', limits.seed), 0, 2**32 - 1),
  )
  return ChatRequest(
    prompts=prompts,
    n=n,
    max_tokens=max_tokens,
    sampling=params,
    stop=tuple(stops),
    stream=fields.get('stream', False),
    include_usage=_include_usage(fields),
  )


def _include_usage(fields: dict) -> bool:
  options = fields.get('stream_options', {})
  if options and not fields.get('stream'):
    raise errors.InputError('stream_options is for stream=true only')
  neutral = {'include_obfuscation': (False,)}
  known = ('include_usage',)
  options = _effective('stream_options.', options, known, neutral)
  include_usage = options.get('include_usage', False)
  if not isinstance(include_usage, bool):
    raise errors.InputError('stream_options.include_usage must be a bool')
  return include_usage


def _short(value: Any) -> str:
  """The value on one line, shortened if it is long."""
  return reprlib.repr(value)


def _within(name: str, value, low, high):
  if not low <= value <= high:  # NaN is within nothing
    raise errors.InputError(f'{name}={value} must be in [{low}, {high}]')
  return value


def _fraction(value):
  if not 0 < value <= 1:
    raise errors.InputError(f'top_p={value} must be in (0, 1]')
  return value
