"""Bodies of OpenAI's API, parsed and checked field by field.

An unknown field is refused and not ignored, except a field at a value that has
no effect, and a field that never changes an answer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import grammar, sampling
from dsv3_jax.inference import request as requests
from dsv3_jax.server import (
  conversation,
  fields,
  sampling_fields,
  structured_outputs,
)

_COMMON = (
  {
    'model': str,
    'stream': bool,
    'stream_options': dict,
    'n': int,
    'stop': (str, list),
    'ignore_eos': bool,
    'min_tokens': int,
    'prompt_logprobs': int,
    # These never change an answer.
    'metadata': dict,
    'prompt_cache_key': str,
    'safety_identifier': str,
    'user': str,
  }
  | sampling_fields.TYPES
  | structured_outputs.TYPES
)
_COMPLETION = _COMMON | {
  'prompt': (str, list),
  'suffix': str,
  'add_special_tokens': bool,
  'echo': bool,
  'max_tokens': int,
  'best_of': int,
  'logprobs': int,
}
_CHAT = (
  _COMMON
  | {
    'max_tokens': int,
    'max_completion_tokens': int,
    'logprobs': bool,
    'top_logprobs': int,
  }
  | conversation.TYPES
)
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
} | structured_outputs.NEUTRAL
_COMPLETION_NEUTRAL = _NEUTRAL | {'add_special_tokens': (True,)}
_MAX_STOPS, _MAX_CHOICES = 16, 16


class NoModelError(errors.InputError):
  """The body names a model that is not served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Limits of a server, and the seed of a call that has none.

  model: name of the model. max_choices: answers of one call. max_tokens: of one
  answer. vocab_size: of the model. sampling: fields of a body that has none.
  grammars: compiles those of all calls; None: a call makes its own.
  """

  model: str
  max_choices: int
  max_tokens: int
  vocab_size: int
  seed: int
  sampling: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
  grammars: grammar.Compiler | None = None

  def compiler(self, tokenizer: tokenizers.Tokenizer) -> grammar.Compiler:
    return self.grammars or grammar.Compiler(tokenizer, self.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
  """The parsed body of a call to either endpoint: chat or completions.

  A chat has one prompt, its messages in the chat template; a completion may
  have several.

  prompts: token ids. n: answers to each prompt. best_of: how many of each are
  made, of which the n likeliest are given. max_tokens: of an answer, perhaps 0;
  None: as many as fit. clamps: fewer are made if no more fit. echo: the answer
  begins with its prompt. logprobs: how many likeliest tokens the answer has
  beside each of its own; None: no log-probabilities. prompt_logprobs: the same
  of the prompt, apart from the answer. ignore_eos: the end of the sequence does
  not end an answer. constraint: that an answer follows; None: any answer.
  parses_calls: of tools, of which max_calls are given; None: all. stream:
  answer with server-sent events. include_usage: the last event has the number
  of tokens; continuous_usage: the others have it too. opens_thought: the answer
  begins within a thought.
  """

  prompts: list[list[int]]
  n: int
  best_of: int
  max_tokens: int | None
  clamps: bool
  sampling: requests.SamplingParams
  stop: tuple[str, ...]
  echo: bool
  logprobs: int | None
  prompt_logprobs: int | None
  ignore_eos: bool
  constraint: grammar.Grammar | None = None
  parses_calls: bool = False
  max_calls: int | None = None
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
  values = known_values(body, _COMPLETION, limits, _COMPLETION_NEUTRAL)
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
  constraint = structured_outputs.parse(values, limits.compiler(tokenizer))
  _check_grammar(constraint, values)
  scored = api_request.sampling.prompt_logprobs
  scored |= echo and logprobs is not None
  return dataclasses.replace(
    api_request,
    clamps='max_tokens' not in values,
    echo=echo,
    constraint=constraint,
    sampling=dataclasses.replace(api_request.sampling, prompt_logprobs=scored),
  )


def parse_chat(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: Limits
) -> ChatRequest:
  """Parses a body of `/v1/chat/completions`; raises as `parse_completion`."""
  neutral = {
    name: values
    for name, values in _NEUTRAL.items()
    if name not in conversation.TYPES
  }
  values = known_values(body, _CHAT, limits, neutral)
  n = _num_choices(values, 1, limits)
  lengths = [values.get(x) for x in ('max_tokens', 'max_completion_tokens')]
  if None not in lengths and lengths[0] != lengths[1]:
    raise errors.InputError(
      'max_tokens and max_completion_tokens are the same: give one of them'
    )
  messages = conversation.parse_messages(values)
  top = values.get('top_logprobs', 0)
  fields.within('top_logprobs', top, 0, sampling.TOP_LOGPROBS)
  if top and not values.get('logprobs'):
    raise errors.InputError(f'top_logprobs={top} needs logprobs=true')
  compiler = limits.compiler(tokenizer)
  tools = conversation.parse_tools(values, tokenizer, compiler)
  prompt = conversation.render(
    tokenizer,
    messages,
    tools and tools.definitions,
    **values.get('chat_template_kwargs', {}),
  )
  logprobs = top if values.get('logprobs') else None
  api_request = _chat_request(values, [prompt.ids], n, logprobs, limits)
  constraint = structured_outputs.parse(values, compiler)
  if constraint and tools:
    raise errors.InputError(
      'tools: a constrained answer cannot call them; give tool_choice="none"'
    )
  constraint = tools.constraint if tools else constraint
  _check_grammar(constraint, values)
  return dataclasses.replace(
    api_request,
    constraint=constraint,
    parses_calls=tools is not None,
    max_calls=tools.max_calls if tools else None,
    # A constrained answer has no thought.
    opens_thought=prompt.opens_thought and constraint is None,
  )


def _check_grammar(
  constraint: grammar.Grammar | None, values: Mapping[str, Any]
) -> None:
  if constraint and values.get('ignore_eos'):
    raise errors.InputError(
      'ignore_eos=true has no meaning with a constrained answer'
    )


def known_values(
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
    return encode(tokenizer, value, add_bos)
  if suffix:
    raise errors.InputError('a suffix needs a prompt that is a string')
  if isinstance(value, list) and all(type(x) is int for x in value):
    return value
  raise errors.InputError(f'prompt[{i}] must be a string or a list of ids')


def encode(
  tokenizer: tokenizers.Tokenizer, text: str, add_bos: bool
) -> list[int]:
  """Ids of a text; one that spells bos at its start has it once."""
  bos = tokenizer.named_token('bos_token')
  if bos and text.startswith(bos):
    return [tokenizer.bos_id, *tokenizer.encode(text[len(bos) :]).tolist()]
  return tokenizer.encode(text, add_bos=add_bos).tolist()


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
  of_prompt = values.get('prompt_logprobs')
  if of_prompt is not None:
    fields.within('prompt_logprobs', of_prompt, 0, sampling.TOP_LOGPROBS)
    if values.get('stream'):
      raise errors.InputError('prompt_logprobs is not for stream=true')
  most = [count for count in (logprobs, of_prompt) if count is not None]
  if best_of > n:
    most.append(0)  # which answers are best
  params = sampling_fields.parse(
    dict(limits.sampling) | values,
    limits.vocab_size,
    limits.seed,
    max(most, default=None),
  )
  return ChatRequest(
    prompts=prompts,
    n=n,
    best_of=best_of,
    max_tokens=max_tokens,
    clamps=max_tokens is None,
    sampling=dataclasses.replace(params, prompt_logprobs=of_prompt is not None),
    stop=tuple(stops),
    echo=False,
    logprobs=logprobs,
    prompt_logprobs=of_prompt,
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
