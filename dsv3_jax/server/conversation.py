"""Messages and tools of a chat: parsed, and rendered as a prompt."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import chat, chat_template
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import grammar
from dsv3_jax.server import fields

TYPES = {
  'messages': list,
  'tools': list,
  'tool_choice': (str, dict),
  'parallel_tool_calls': bool,
  'chat_template_kwargs': dict,
}
_MESSAGE = ('role', 'content', 'name', 'tool_calls', 'tool_call_id')
# Fields of an answer that a client sends back in the next conversation turn.
_MESSAGE_NEUTRAL = {
  'annotations': ([],),
  'tool_calls': ([],),
  'audio': (),
  'function_call': (),
  'refusal': (),
  'type': ('text',),  # as lm-eval writes
}
_FUNCTION = {
  'name': str,
  'description': str,
  'parameters': dict,
  'strict': bool,
}
_NAME = re.compile(r'[a-zA-Z0-9_.-]{1,64}')
_MAX_TOOLS = 128
# Arguments of other templates, which change nothing here if they are false.
_TEMPLATE_NEUTRAL = ('enable_thinking', 'thinking')
_FIXED = ('self', 'messages', 'tools', 'add_generation_prompt')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
  """The tools that an answer may call.

  definitions: as the client sent them. constraint: of an answer that must call
  one; None: it may. max_calls: None: as many as it likes.
  """

  definitions: list[dict[str, Any]]
  constraint: grammar.Grammar | None
  max_calls: int | None


def parse_messages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Messages with one text each, and roles of the chat template.

  Raises:
    InputError: names the place and the rule.
  """
  inputs = enumerate(values.get('messages', []))
  return [_message(f'messages[{i}]', value) for i, value in inputs]


def parse_tools(
  values: Mapping[str, Any],
  tokenizer: tokenizers.Tokenizer,
  compiler: grammar.Compiler,
) -> Tools | None:
  """The tools of a call; None: there are none, or none may be used.

  Raises:
    InputError: names the field and the rule.
  """
  definitions = values.get('tools', [])
  if len(definitions) > _MAX_TOOLS:
    raise errors.InputError(
      f'tools has {len(definitions)} entries; at most {_MAX_TOOLS} are taken'
    )
  functions = [
    _function(f'tools[{i}]', value) for i, value in enumerate(definitions)
  ]
  names = [function['name'] for function in functions]
  if len(set(names)) < len(names):
    raise errors.InputError('tools: two functions have one name')
  choice = values.get('tool_choice', 'auto')
  if isinstance(choice, dict):
    functions = [functions[names.index(_chosen(choice, names))]]
  elif choice not in ('none', 'auto', 'required'):
    raise errors.InputError(
      f'tool_choice={fields.short(choice)} must be none, auto, required or a '
      'function'
    )
  if choice == 'required' and not functions:
    raise errors.InputError("tool_choice='required' needs tools")
  if choice == 'none' or not functions:
    return None
  for token in chat.TOOLS:
    if token not in tokenizer.tool_ids:
      raise errors.InputError(
        f"tools: this model's tokenizer lacks the special token {token!a}"
      )
  parallel = values.get('parallel_tool_calls', True)
  forced = None
  if choice != 'auto':
    forced = compiler.tool_calls(
      functions,
      parallel=parallel and choice == 'required',
      where='tools: parameters',
    )
  return Tools(
    definitions=definitions,
    constraint=forced,
    max_calls=None if parallel else 1,
  )


def render(
  tokenizer: tokenizers.Tokenizer,
  messages: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] | None = None,
  add_generation_prompt: bool = True,
  /,
  **template_kwargs: Any,
) -> chat_template.ChatPrompt:
  """A conversation in the chat template of the folder, else in the built-in.

  Raises:
    InputError: a message that cannot be encoded, or an argument that the
      template does not have.
  """
  for name in _FIXED:
    if name in template_kwargs:
      raise errors.InputError(f'chat_template_kwargs cannot have {name!r}')
  if tokenizer.templates:
    return tokenizer.apply_chat_template(
      messages, tools, add_generation_prompt, **template_kwargs
    )
  for name, value in template_kwargs.items():
    is_neutral = value is False and name in _TEMPLATE_NEUTRAL
    if value is not None and not is_neutral:
      raise errors.InputError(
        f'chat_template_kwargs.{fields.short(name)}={fields.short(value)} is '
        "not supported here: this model's template has no such argument"
      )
  chat.check(messages)
  if tools:
    messages = chat.with_tools(messages, tools)
  return tokenizer.apply_chat_template(
    messages, add_generation_prompt=add_generation_prompt
  )


def _message(path: str, value: Any) -> dict[str, Any]:
  """A message with one text, and a role of the chat template."""
  if not isinstance(value, dict):
    raise errors.InputError(f'{path} must be an object')
  # The model does not read the thoughts of its answers again.
  given = {k: v for k, v in value.items() if k != 'reasoning_content'}
  message = fields.effective(f'{path}.', given, _MESSAGE, _MESSAGE_NEUTRAL)
  for name in ('name', 'tool_call_id'):
    if not isinstance(message.get(name, ''), str):
      raise errors.InputError(f'{path}.{name} must be a string')
  if message.get('role') == 'developer':
    message['role'] = 'system'
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


def _function(path: str, value: Any) -> dict[str, Any]:
  """The function of a tool."""
  if not isinstance(value, dict) or value.get('type') != 'function':
    raise errors.InputError(f"{path} must be an object of type 'function'")
  fields.effective(f'{path}.', value, ('type', 'function'), {})
  body = value.get('function')
  if not isinstance(body, dict):
    raise errors.InputError(f'{path}.function must be an object')
  try:
    json.dumps(body)
  except RecursionError as error:
    raise errors.InputError(f'{path} is nested too deeply') from error
  path = f'{path}.function.'
  body = fields.effective(path, body, _FUNCTION, {})
  fields.check_types(body, _FUNCTION, path)
  name = body.get('name', '')
  if not _NAME.fullmatch(name):
    raise errors.InputError(
      f'{path}name={fields.short(name)} must be 1 to 64 letters, digits, '
      'underscores, dots or dashes'
    )
  return body


def _chosen(choice: dict[str, Any], names: Sequence[str]) -> str:
  """The name of the function that must be called."""
  function = choice.get('function')
  name = function.get('name') if isinstance(function, dict) else None
  if choice.get('type') != 'function' or name is None:
    raise errors.InputError(
      "tool_choice must have the type 'function' and a function with a name"
    )
  if name not in names:
    raise errors.InputError(
      f'tool_choice.function.name={fields.short(name)} is none of tools'
    )
  return name
