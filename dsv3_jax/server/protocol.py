"""What an OpenAI client asks for, checked field by field, and what it is told.

Fields that are not here are refused rather than overlooked, but for those that
say nothing at the value that they have, or that change no answer.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine

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
  # These change no answer.
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
# Taken at the values at which they do nothing.
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
# What a client sends back with an answer that it was given.
_MESSAGE_NEUTRAL = {
  'annotations': ([],),
  'tool_calls': ([],),
  'audio': (),
  'function_call': (),
  'refusal': (),
}
_MOST_STOPS, _MOST_CHOICES = 16, 16


class NoModelError(errors.InputError):
  """A client asks for a model that is not served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Of a server. model: its name. answers: of one call. tokens: of one answer.

  seed: of a call that has none.
  """

  model: str
  answers: int
  tokens: int
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """A request as the engine takes it.

  prompts: token ids; each is answered `choices` times. max_tokens: None is as
  many as fit.
  """

  prompts: list[list[int]]
  choices: int
  max_tokens: int | None
  draw: engine.Draw
  stops: tuple[str, ...]
  stream: bool
  with_usage: bool


def completion(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> Ask:
  """A body of `/v1/completions`.

  Raises:
    NoModelError: it names another model.
    InputError: names the field, its value and the rule.
  """
  fields = _fields(body, _COMPLETION, limits)
  given = fields.get('prompt', '')
  if isinstance(given, str) or (all(type(x) is int for x in given) and given):
    given = [given]
  choices = _choices(fields, len(given), limits)
  if fields.get('best_of', choices) != choices:
    raise errors.InputError(
      f'best_of={fields["best_of"]} is not supported here, unless it is n'
    )
  prompts = [_prompt(i, x, tokenizer) for i, x in enumerate(given)]
  if not prompts:
    raise errors.InputError('prompt=[] must hold at least one prompt')
  fields = {'max_tokens': min(16, limits.tokens)} | fields
  return _ask(fields, prompts, choices, limits)


def chat(body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits) -> Ask:
  """A body of `/v1/chat/completions`; raises as `completion`."""
  fields = _fields(body, _CHAT, limits)
  choices = _choices(fields, 1, limits)
  if {'max_tokens', 'max_completion_tokens'} <= fields.keys():
    raise errors.InputError(
      'max_tokens and max_completion_tokens are the same: give one of them'
    )
  given = enumerate(fields.get('messages', []))
  messages = [_message(f'messages[{i}]', x) for i, x in given]
  ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
  return _ask(fields, [ids.tolist()], choices, limits)


def _fields(
  body: Any, known: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
  """Those that say something, of the right types; null is as not given."""
  if not isinstance(body, dict):
    raise errors.InputError('the body must be a JSON object')
  found = _saying('', body, known, _NEUTRAL)
  for name, value in found.items():
    wanted = known[name]
    is_bool = isinstance(value, bool)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
      raise errors.InputError(f'{name}={_short(value)} has the wrong type')
  model = found.get('model', limits.model)
  if model != limits.model:
    raise NoModelError(f'model={_short(model)} is not served here')
  return found


def _saying(where: str, given: dict, known, neutral) -> dict[str, Any]:
  """What of an object says something.

  Raises:
    InputError: a field that is unknown, or not supported at its value.
  """
  found = {}
  for name, value in given.items():
    # Not `in`: for Python, True is 1 and 0.0 is False.
    same = (x for x in neutral.get(name, ()) if type(x) is type(value))
    if value is None or any(x == value for x in same):
      continue
    if name in neutral:
      raise errors.InputError(
        f'{where}{name}={_short(value)} is not supported here'
      )
    if name not in known:
      raise errors.InputError(
        f'{where}{_short(name)} is no field of this request: '
        f'{", ".join(sorted(known))}'
      )
    found[name] = value
  return found


def _prompt(i: int, given: Any, tokenizer: tokenizers.Tokenizer) -> list[int]:
  """Ids of one prompt: of text, or as they are."""
  if isinstance(given, str):
    return tokenizer.encode(given, add_bos=True).tolist()
  if isinstance(given, list) and all(type(x) is int for x in given):
    return given
  raise errors.InputError(f'prompt[{i}] must be a string or a list of ids')


def _message(where: str, given: Any) -> dict[str, Any]:
  """A message with one text, of a role that the template has."""
  if not isinstance(given, dict):
    raise errors.InputError(f'{where} must be an object')
  # A thought that an answer came with is not read again.
  given = {k: v for k, v in given.items() if k != 'reasoning_content'}
  found = _saying(f'{where}.', given, _MESSAGE, _MESSAGE_NEUTRAL)
  if found.get('role') == 'developer':
    found['role'] = 'system'
  content = found.get('content')
  if isinstance(content, list):
    parts = [_part(f'{where}.content[{i}]', x) for i, x in enumerate(content)]
    found['content'] = ''.join(parts)
  return found


def _part(where: str, given: Any) -> str:
  """The text of a part of a message."""
  if not isinstance(given, dict):
    raise errors.InputError(f'{where} must be an object')
  if given.get('type') != 'text':
    raise errors.InputError(
      f"{where}.type={_short(given.get('type'))} must be 'text'"
    )
  if given.keys() != {'type', 'text'} or not isinstance(given['text'], str):
    raise errors.InputError(f'{where} must have one string, its text')
  return given['text']


def _choices(fields: dict, prompts: int, limits: Limits) -> int:
  """How many answers a prompt gets; before anything is tokenised."""
  choices = _within('n', fields.get('n', 1), 1, _MOST_CHOICES)
  _within('n * prompts', choices * prompts, 0, limits.answers)
  return choices


def _ask(fields: dict, prompts: list, choices: int, limits: Limits) -> Ask:
  most = None
  for name in ('max_tokens', 'max_completion_tokens'):
    if name in fields:
      most = _within(name, fields[name], 1, limits.tokens)
  stops = fields.get('stop', [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MOST_STOPS or not all(isinstance(s, str) for s in stops):
    raise errors.InputError(f'stop must be at most {_MOST_STOPS} strings')
  temperature = _within('temperature', fields.get('temperature', 1), 0, 100)
  draw = engine.Draw(
    temperature=float(temperature),
    top_k=_within('top_k', fields.get('top_k', 0), 0, 2**31 - 1),
    top_p=float(_share(fields.get('top_p', 1))),
    seed=_within('seed', fields.get('seed', limits.seed), 0, 2**32 - 1),
  )
  return Ask(
    prompts=prompts,
    choices=choices,
    max_tokens=most,
    draw=draw,
    stops=tuple(stops),
    stream=fields.get('stream', False),
    with_usage=_with_usage(fields),
  )


def _with_usage(fields: dict) -> bool:
  options = fields.get('stream_options', {})
  if options and not fields.get('stream'):
    raise errors.InputError('stream_options is for stream=true only')
  neutral = {'include_obfuscation': (False,)}
  found = _saying('stream_options.', options, ('include_usage',), neutral)
  wanted = found.get('include_usage', False)
  if not isinstance(wanted, bool):
    raise errors.InputError('stream_options.include_usage must be a bool')
  return wanted


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
