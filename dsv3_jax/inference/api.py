"""What an OpenAI client asks for, checked field by field, and what it is told.

Fields that are not here are refused rather than overlooked, but for those that
say nothing at the value that they have.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import batching

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
  'user': str,
}
_COMPLETION = _COMMON | {'prompt': (str, list), 'max_tokens': int}
_CHAT = _COMMON | {
  'messages': list,
  'max_tokens': int,
  'max_completion_tokens': int,
}
# Taken at the value at which they do nothing.
_NEUTRAL = {
  'best_of': (1,),
  'echo': (False,),
  'frequency_penalty': (0,),
  'logit_bias': ({},),
  'logprobs': (False, 0),
  'presence_penalty': (0,),
  'response_format': ({'type': 'text'},),
  'suffix': ('',),
  'tools': ([],),
}
_MOST_STOPS, _MOST_CHOICES = 16, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """A request as the engine takes it.

  prompts: token ids; each is answered `choices` times. max_tokens: None is as
  many as fit.
  """

  prompts: list[list[int]]
  choices: int
  max_tokens: int | None
  draw: batching.Draw
  stops: tuple[str, ...]
  stream: bool
  with_usage: bool


def completion(
  body: Any, tokenizer: tokenizers.Tokenizer, seed: int, most_answers: int
) -> Ask:
  """A body of `/v1/completions`.

  Args:
    seed: where the body has none. most_answers: prompts times choices.

  Raises:
    InputError: names the field, its value and the rule.
  """
  fields = _fields(body, _COMPLETION)
  given = fields.get('prompt', '')
  if isinstance(given, str) or (all(type(x) is int for x in given) and given):
    given = [given]
  _within('n * prompts', fields.get('n', 1) * len(given), 0, most_answers)
  prompts = [_prompt(i, x, tokenizer) for i, x in enumerate(given)]
  if not prompts:
    raise errors.InputError('prompt=[] must hold at least one prompt')
  most = fields.get('max_tokens', 16)
  return _ask(fields, prompts, most, seed)


def chat(
  body: Any, tokenizer: tokenizers.Tokenizer, seed: int, most_answers: int
) -> Ask:
  """A body of `/v1/chat/completions`; raises as `completion`."""
  fields = _fields(body, _CHAT)
  _within('n', fields.get('n', 1), 1, most_answers)
  messages = fields.get('messages', [])
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise errors.InputError(f'messages[{i}] must be an object')
  ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
  most = fields.get('max_completion_tokens', fields.get('max_tokens'))
  return _ask(fields, [ids.tolist()], most, seed)


def _fields(body: Any, known: Mapping[str, Any]) -> dict[str, Any]:
  """Those that say something, of the right types; null is as not given."""
  if not isinstance(body, dict):
    raise errors.InputError('the body must be a JSON object')
  found = {}
  for name, value in body.items():
    if value is None or value in _NEUTRAL.get(name, ()):
      continue
    if name in _NEUTRAL:
      raise errors.InputError(f'{name}={_short(value)} is not supported here')
    if name not in known:
      raise errors.InputError(
        f'{_short(name)} is no field of this request: '
        f'{", ".join(sorted(known))}'
      )
    wanted = known[name]
    is_bool = isinstance(value, bool)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
      raise errors.InputError(f'{name}={_short(value)} has the wrong type')
    found[name] = value
  return found


def _prompt(i: int, given: Any, tokenizer: tokenizers.Tokenizer) -> list[int]:
  """Ids of one prompt: of text, or as they are."""
  if isinstance(given, str):
    return tokenizer.encode(given, add_bos=True).tolist()
  if isinstance(given, list) and all(type(x) is int for x in given):
    return given
  raise errors.InputError(f'prompt[{i}] must be a string or a list of ids')


def _ask(fields: dict, prompts: list, most: int | None, seed: int) -> Ask:
  if most is not None:
    _within('max_tokens', most, 1, math.inf)
  choices = _within('n', fields.get('n', 1), 1, _MOST_CHOICES)
  stops = fields.get('stop', [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MOST_STOPS or not all(isinstance(s, str) for s in stops):
    raise errors.InputError(f'stop must be at most {_MOST_STOPS} strings')
  options = fields.get('stream_options', {})
  if options.keys() - {'include_usage'}:
    raise errors.InputError('stream_options may hold include_usage only')
  draw = batching.Draw(
    temperature=float(
      _within('temperature', fields.get('temperature', 1), 0, 100)
    ),
    top_k=_within('top_k', fields.get('top_k', 0), 0, 2**31 - 1),
    top_p=float(_share(fields.get('top_p', 1))),
    seed=_within('seed', fields.get('seed', seed), 0, 2**32 - 1),
  )
  return Ask(
    prompts=prompts,
    choices=choices,
    max_tokens=most,
    draw=draw,
    stops=tuple(stops),
    stream=fields.get('stream', False),
    with_usage=bool(options.get('include_usage')),
  )


def _short(value: Any) -> str:
  """On one line, however long it is."""
  return reprlib.repr(value)


def _within(name: str, value, low, high):
  if not low <= value <= high:  # NaN is within nothing
    raise errors.InputError(f'{name}={value} must be in [{low}, {high}]')
  return value


def _share(value):
  if not 0 < value <= 1:
    raise errors.InputError(f'top_p={value} must be in (0, 1]')
  return value
