"""Bodies of OpenAI's API, parsed and checked field by field.

An unknown field is refused and not ignored, except a field at a value that has
no effect, and a field that never changes an answer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import request as requests
from dsv3_jax.inference import sampling
from dsv3_jax.server import fields, sampling_fields

_COMMON = {
  'model': str,
  'stream': bool,
  'stream_options': dict,
  'n': int,
  'stop': (str, list),
  'ignore_eos': bool,
  'min_tokens': int,
  # These never change an answer.
  'metadata': dict,
  'prompt_cache_key': str,
  'safety_identifier': str,
  'user': str,
} | sampling_fields.TYPES
_COMPLETION = _COMMON | {
  'prompt': (str, list),
  'suffix': str,
  'add_special_tokens': bool,
  'echo': bool,
  'max_tokens': int,
  'best_of': int,
  'logprobs': int,
}
_CHAT = _COMMON | {
  'messages': list,
  'max_tokens': int,
  'max_completion_tokens': int,
  'logprobs': bool,
  'top_logprobs': int,
}
# Accepted at these values, at which they have no effect.
_NEUTRAL = {
  'add_generation_prompt': (True,),
  'add_special_tokens': (False, True),
  'bad_words': ([],),
  'chat_template_kwargs': ({},),
  'continue_final_message': (False,),
  'early_stopping': (False,),
  'echo': (False,),
  'function_call': ('none', 'auto'),
  'functions': ([],),
  'include_stop_str_in_output': (False,),
  'length_penalty': (1, 1.0),
  'logprobs': (False,),
  'min_tokens': (0,),
  'modalities': (['text'],),
  'parallel_tool_calls': (False, True),
  'priority': (0,),
  'response_format': ({'type': 'text'},),
  'return_token_ids': (False,),
  'return_tokens_as_token_ids': (False,),
  'service_tier': ('auto', 'default'),
  'skip_special_tokens': (True,),
  'spaces_between_special_tokens': (True,),
  'stop_token_ids': ([],),
  'store': (False,),
  'tool_choice': ('none', 'auto'),
  'tools': ([],),
  'use_beam_search': (False,),
  'verbosity': ('medium',),
}
_COMPLETION_NEUTRAL = _NEUTRAL | {'add_special_tokens': (True,)}
_MESSAGE = ('role', 'content', 'name')
# Fields of an answer that a client sends back in the next conversation turn.
_MESSAGE_NEUTRAL = {
  'annotations': ([],),
  'tool_calls': ([],),
  'audio': (),
  'function_call': (),
  'refusal': (),
  'type': ('text',),  # as lm-eval writes
}
_MAX_STOPS, _MAX_CHOICES = 16, 16


class NoModelError(errors.InputError):
  """The body names a model that is not served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Limits of a server, and the seed of a call that has none.

  model: name of the model. max_choices: answers of one call. max_tokens: of one
  answer. vocab_size: of the model. sampling: fields of a body that has none.
  """

  model: str
  max_choices: int
  max_tokens: int
  vocab_size: int
  seed: int
  sampling: Mapping[str, float | int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
  """The parsed body of a call to either endpoint: chat or completions.

  A chat has one prompt, its messages in the chat template; a completion may
  have several.

  prompts: token ids. n: answers to each prompt. best_of: how many of each are
  made, of which the n likeliest are given. max_tokens: of an answer, perhaps 0;
  None: as many as fit. clamps: fewer are made if no more fit. echo: the answer
  begins with its prompt. logprobs: they are part of the answer. ignore_eos: the
  end of the sequence does not end an answer. stream: answer with server-sent
  events. include_usage: the last event has the number of tokens;
  continuous_usage: the others have it too. opens_thought: the prompt ends with
  <think>.
  """

  prompts: list[list[int]]
  n: int
  best_of: int
  max_tokens: int | None
  clamps: bool
  sampling: requests.SamplingParams
  stop: tuple[str, ...]
  echo: bool
  logprobs: bool
  ignore_eos: bool
  stream: bool
  include_usage: bool
  continuous_usage: bool
  opens_thought: bool = False


def parse_completion(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> ChatRequest:
  """Parses a body of `/v1/completions`.

  Raises:
    NoModelError: it names another model.
    InputError: names the field, its value and the rule.
  """
  values = _values(body, _COMPLETION, limits, _COMPLETION_NEUTRAL)
  inputs = values.get('prompt', '')
  is_ids = inputs and all(type(x) is int for x in inputs)
  if isinstance(inputs, str) or is_ids:
    inputs = [inputs]
  best_of = _num_choices(values, len(inputs), limits)
  echo = values.get('echo', False)
  if echo and values.get('suffix'):
    raise errors.InputError('echo=true is not supported here with a suffix')
  prompts = [_prompt(i, x, values, tokenizer) for i, x in enumerate(inputs)]
  if not prompts:
    raise errors.InputError('prompt=[] must hold at least one prompt')
  logprobs = values.get('logprobs')
  if logprobs is not None:
    fields.within('logprobs', logprobs, 0, sampling.TOP_LOGPROBS)
  default = {'max_tokens': min(16, limits.max_tokens)}
  api_request = _chat_request(
    default | values, prompts, best_of, logprobs, limits
  )
  scored = echo and logprobs is not None
  return dataclasses.replace(
    api_request,
    clamps='max_tokens' not in values,
    echo=echo,
    sampling=dataclasses.replace(api_request.sampling, prompt_logprobs=scored),
  )


def parse_chat(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> ChatRequest:
  """Parses a body of `/v1/chat/completions`; raises as `parse_completion`."""
  values = _values(body, _CHAT, limits)
  n = _num_choices(values, 1, limits)
  lengths = [values.get(x) for x in ('max_tokens', 'max_completion_tokens')]
  if None not in lengths and lengths[0] != lengths[1]:
    raise errors.InputError(
      'max_tokens and max_completion_tokens are the same: give one of them'
    )
  inputs = enumerate(values.get('messages', []))
  messages = [_message(f'messages[{i}]', x) for i, x in inputs]
  top = values.get('top_logprobs', 0)
  fields.within('top_logprobs', top, 0, sampling.TOP_LOGPROBS)
  if top and not values.get('logprobs'):
    raise errors.InputError(f'top_logprobs={top} needs logprobs=true')
  prompt = tokenizer.apply_chat_template(messages)
  logprobs = top if values.get('logprobs') else None
  api_request = _chat_request(values, [prompt.ids], n, logprobs, limits)
  return dataclasses.replace(api_request, opens_thought=prompt.opens_thought)


def _values(
  body: Any,
  known: Mapping[str, Any],
  limits: Limits,
  neutral: Mapping[str, Any] = _NEUTRAL,
) -> dict[str, Any]:
  """The fields that have an effect, of the right types; null is absent."""
  if not isinstance(body, dict):
    raise errors.InputError('the body must be a JSON object')
  values = fields.effective('', body, known, neutral)
  fields.check_types(values, known)
  model = values.get('model', limits.model)
  if model != limits.model:
    raise NoModelError(f'model={fields.short(model)} is not served here')
  return values


def _prompt(
  i: int, value: Any, values: dict, tokenizer: tokenizers.Tokenizer
) -> list[int]:
  """Ids of one prompt, which is a text or ids."""
  suffix = values.get('suffix', '')
  add_bos = values.get('add_special_tokens', True)
  if isinstance(value, str) and suffix:
    drop = tokenizer.adds_bos and not add_bos
    return tokenizer.encode_fim(value, suffix).tolist()[drop:]
  if isinstance(value, str):
    return _encode(tokenizer, value, add_bos)
  if suffix:
    raise errors.InputError('a suffix needs a prompt that is a string')
  if isinstance(value, list) and all(type(x) is int for x in value):
    return value
  raise errors.InputError(f'prompt[{i}] must be a string or a list of ids')


def _encode(
  tokenizer: tokenizers.Tokenizer, text: str, add_bos: bool
) -> list[int]:
  """Ids of a text; one that spells bos at its start has it once."""
  bos = tokenizer.named_token('bos_token')
  if bos and text.startswith(bos):
    return [tokenizer.bos_id, *tokenizer.encode(text[len(bos) :]).tolist()]
  return tokenizer.encode(text, add_bos=add_bos).tolist()


def _message(path: str, value: Any) -> dict[str, Any]:
  """A message with one text, and a role of the chat template."""
  if not isinstance(value, dict):
    raise errors.InputError(f'{path} must be an object')
  # The model does not read the thoughts of its answers again.
  given = {k: v for k, v in value.items() if k != 'reasoning_content'}
  message = fields.effective(f'{path}.', given, _MESSAGE, _MESSAGE_NEUTRAL)
  if not isinstance(message.pop('name', ''), str):  # no part of the template
    raise errors.InputError(f'{path}.name must be a string')
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
      f"{path}.type={fields.short(value.get('type'))} must be 'text'"
    )
  if value.keys() != {'type', 'text'} or not isinstance(value['text'], str):
    raise errors.InputError(f'{path} must have one string, its text')
  return value['text']


def _num_choices(values: dict, prompts: int, limits: Limits) -> int:
  """Answers made to each prompt; checked before anything is tokenised."""
  n = fields.within('n', values.get('n', 1), 1, _MAX_CHOICES)
  best_of = values.get('best_of', n)
  fields.within('best_of', best_of, n, _MAX_CHOICES)
  if best_of > n and values.get('stream'):
    raise errors.InputError(
      f'best_of={best_of} above n={n} cannot be streamed: the best is known '
      'at the end'
    )
  name = 'n' if best_of == n else 'best_of'
  fields.within(f'{name} * prompts', best_of * prompts, 0, limits.max_choices)
  return best_of


def _chat_request(
  values: dict,
  prompts: list,
  best_of: int,
  logprobs: int | None,
  limits: Limits,
) -> ChatRequest:
  n, max_tokens = values.get('n', 1), None
  for name in ('max_tokens', 'max_completion_tokens'):
    if name in values:
      max_tokens = fields.within(name, values[name], 0, limits.max_tokens)
  _check_min_tokens(
    values, limits.max_tokens if max_tokens is None else max_tokens
  )
  stops = values.get('stop', [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MAX_STOPS or not all(isinstance(s, str) for s in stops):
    raise errors.InputError(f'stop must be at most {_MAX_STOPS} strings')
  wants_logprobs = logprobs is not None
  if best_of > n and not wants_logprobs:
    logprobs = 0  # which answers are best
  return ChatRequest(
    prompts=prompts,
    n=n,
    best_of=best_of,
    max_tokens=max_tokens,
    clamps=max_tokens is None,
    sampling=sampling_fields.parse(
      dict(limits.sampling) | values, limits.vocab_size, limits.seed, logprobs
    ),
    stop=tuple(stops),
    echo=False,
    logprobs=wants_logprobs,
    ignore_eos=values.get('ignore_eos', False),
    stream=values.get('stream', False),
    **_stream_options(values),
  )


def _check_min_tokens(values: dict, max_tokens: int) -> None:
  """Taken where nothing can end an answer before: as benchmarks send it."""
  if 'min_tokens' not in values:
    return
  count = fields.within('min_tokens', values['min_tokens'], 0, max_tokens)
  if not values.get('ignore_eos') or values.get('stop'):
    raise errors.InputError(
      f'min_tokens={count} is not supported here, except with ignore_eos=true '
      'and without stop'
    )


def _stream_options(values: dict) -> dict[str, bool]:
  options = values.get('stream_options', {})
  if options and not values.get('stream'):
    raise errors.InputError('stream_options is for stream=true only')
  known = ('include_usage', 'continuous_usage_stats')
  neutral = {'include_obfuscation': (False,)}
  options = fields.effective('stream_options.', options, known, neutral)
  for name, value in options.items():
    if not isinstance(value, bool):
      raise errors.InputError(f'stream_options.{name} must be a bool')
  include_usage = options.get('include_usage', False)
  continuous = options.get('continuous_usage_stats', False)
  return {
    'include_usage': include_usage,
    'continuous_usage': include_usage and continuous,
  }


def parse_tokenize(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> list[int]:
  """Ids of a text, or of a conversation; raises as `parse_completion`."""
  known = {
    'model': str,
    'prompt': str,
    'messages': list,
    'add_special_tokens': bool,
    'add_generation_prompt': bool,
  }
  neutral = {'return_token_strs': (False,), 'continue_final_message': (False,)}
  values = _values(body, known, limits, neutral)
  if ('prompt' in values) == ('messages' in values):
    raise errors.InputError('give either prompt or messages')
  alone = {'prompt': 'add_generation_prompt', 'messages': 'add_special_tokens'}
  for name, other in alone.items():
    if name in values and other in values:
      raise errors.InputError(f'{other} has no meaning with {name}')
  if 'prompt' in values:
    add_bos = values.get('add_special_tokens', True)
    return _encode(tokenizer, values['prompt'], add_bos)
  inputs = enumerate(values['messages'])
  messages = [_message(f'messages[{i}]', x) for i, x in inputs]
  opens = values.get('add_generation_prompt', True)
  return tokenizer.apply_chat_template(
    messages, add_generation_prompt=opens
  ).ids


def parse_detokenize(body: Any, limits: Limits) -> list[int]:
  """Ids to decode; raises as `parse_completion`."""
  ids = _values(body, {'model': str, 'tokens': list}, limits, {}).get(
    'tokens', []
  )
  most = limits.vocab_size - 1
  if not all(type(x) is int and 0 <= x <= most for x in ids):
    raise errors.InputError(f'tokens must be ids from 0 to {most}')
  return ids
