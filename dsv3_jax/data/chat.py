"""The chat template of DeepSeek-V3, as pieces of text and special tokens.

  bos system <User> question <Assistant> answer eos <User> ...

Tools follow the template of DeepSeek-V3-0324. Calls stand after the answer's
text, before its eos; outputs follow it, and the next answer follows those
without a new <Assistant>:

  <Assistant> text <calls begin> call \\n call <calls end> eos
  <outputs begin> output \\n output <outputs end> answer eos

  call: <call begin> type <sep> name \\n ```json \\n args \\n ``` <call end>
  output: <output begin> content <output end>

One deviation: outputs end before any other turn, not before an answer only.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dsv3_jax import errors

EOS = '<\uff5cend\u2581of\u2581sentence\uff5c>'
USER = '<\uff5cUser\uff5c>'
ASSISTANT = '<\uff5cAssistant\uff5c>'
CALLS_BEGIN = '<\uff5ctool\u2581calls\u2581begin\uff5c>'
CALLS_END = '<\uff5ctool\u2581calls\u2581end\uff5c>'
CALL_BEGIN = '<\uff5ctool\u2581call\u2581begin\uff5c>'
CALL_END = '<\uff5ctool\u2581call\u2581end\uff5c>'
OUTPUTS_BEGIN = '<\uff5ctool\u2581outputs\u2581begin\uff5c>'
OUTPUTS_END = '<\uff5ctool\u2581outputs\u2581end\uff5c>'
OUTPUT_BEGIN = '<\uff5ctool\u2581output\u2581begin\uff5c>'
OUTPUT_END = '<\uff5ctool\u2581output\u2581end\uff5c>'
SEPARATOR = '<\uff5ctool\u2581sep\uff5c>'
# In the order of the published ids.
TOOLS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END)
TOOLS += (OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, SEPARATOR)
TOKENS = (EOS, USER, ASSISTANT, *TOOLS)
# Round the arguments of a call, behind the name of its function.
ARGUMENTS_BEGIN, ARGUMENTS_END = '\n```json\n', '\n```'
_ROLES = ('system', 'user', 'assistant', 'tool')

# `pieces` as a template for transformers.
TEMPLATE = (
  '{{ bos_token }}{% set ns = namespace(tool=false) %}'
  "{% for m in messages %}{% if ns.tool and m['role'] != 'tool' %}{{ '"
  + OUTPUTS_END
  + "' }}{% endif %}{% if m['role'] == 'system' %}{{ m['content'] }}"
  "{% elif m['role'] == 'user' %}{{ '"
  + USER
  + "' + m['content'] }}{% elif m['role'] == 'tool' %}"
  "{{ ('\\n' if ns.tool else '"
  + OUTPUTS_BEGIN
  + "') + '"
  + OUTPUT_BEGIN
  + "' + m['content'] + '"
  + OUTPUT_END
  + "' }}{% elif m['role'] == 'assistant' %}{{ ('' if ns.tool else '"
  + ASSISTANT
  + "') + (m['content'] or '') }}{% if m['tool_calls'] %}{{ '"
  + CALLS_BEGIN
  + "' }}{% for c in m['tool_calls'] %}{% set f = c['function'] %}"
  "{{ ('' if loop.first else '\\n') + '"
  + CALL_BEGIN
  + "' + (c['type'] or 'function') + '"
  + SEPARATOR
  + "' + f['name'] + '\\n```json\\n' + (f['arguments'] if f['arguments'] is "
  "string else f['arguments'] | tojson) + '\\n```"
  + CALL_END
  + "' }}{% endfor %}{{ '"
  + CALLS_END
  + "' }}{% endif %}{{ eos_token }}{% endif %}"
  "{% set ns.tool = m['role'] == 'tool' %}{% endfor %}"
  "{% if ns.tool %}{{ '"
  + OUTPUTS_END
  + "' }}{% elif add_generation_prompt %}{{ '"
  + ASSISTANT
  + "' }}{% endif %}"
)


def check(messages: Any) -> None:
  """Checks that a conversation can be encoded.

  Each turn is a dict with 'role' and 'content'. The content is a string; it may
  be None or absent in an answer with 'tool_calls', each of which has a
  'function' with a 'name' and 'arguments', JSON text or an object. Other keys
  have no effect.

  Raises:
    InputError: names the place in the conversation and the rule.
  """
  check_list(messages)
  for i, turn in enumerate(messages):
    _check_turn(turn, f'messages[{i}]')


def check_list(messages: Any) -> None:
  """Checks that there is something that might be a conversation.

  Raises:
    InputError: it is no list, or empty.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise errors.InputError('messages must be a list of turns')
  if not messages:
    raise errors.InputError('messages=[] must hold at least one message')


def has_tools(messages: Sequence[dict[str, Any]]) -> bool:
  """True if a turn calls a tool or is a tool's output."""
  return any(t['role'] == 'tool' or t.get('tool_calls') for t in messages)


def with_tools(
  messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """A conversation whose system turn ends with the definitions of tools.

  The template of DeepSeek-V3-0324 has no place for them.

  Args:
    messages: a checked conversation.
    tools: JSON objects, as in OpenAI's API.
  """
  lines = ['You may call these functions:']
  for tool in tools:
    body = json.dumps(tool.get('function', tool), ensure_ascii=False)
    lines.append('```json\n' + body + '\n```')
  text, turns = '\n\n'.join(lines), list(messages)
  if turns and turns[0]['role'] == 'system':
    system = turns.pop(0)['content']
    text = f'{system}\n\n{text}'
  return [{'role': 'system', 'content': text}, *turns]


def pieces(
  messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> Iterator[tuple[str, bool, bool]]:
  """What a checked conversation consists of, after bos.

  Yields:
    text; whether it is a special token; whether it is a target of the loss:
    answers with their calls and eos are, outputs of tools are not.
  """
  after_tool = False
  for turn in messages:
    role, content = turn['role'], turn.get('content')
    if after_tool and role != 'tool':
      yield OUTPUTS_END, True, False
    if role == 'user':
      yield USER, True, False
    elif role == 'tool':
      yield ('\n', False, False) if after_tool else (OUTPUTS_BEGIN, True, False)
      yield OUTPUT_BEGIN, True, False
    elif role == 'assistant' and not after_tool:
      yield ASSISTANT, True, False
    is_answer = role == 'assistant'
    yield content or '', False, is_answer
    if role == 'tool':
      yield OUTPUT_END, True, False
    elif is_answer:
      for text, special in _calls(turn.get('tool_calls') or ()):
        yield text, special, True
      yield EOS, True, True
    after_tool = role == 'tool'
  if after_tool:
    yield OUTPUTS_END, True, False
  elif add_generation_prompt:
    yield ASSISTANT, True, False


def plain_text(messages: Sequence[dict[str, Any]]) -> str:
  """The turns one after the other, without special tokens."""
  lines = []
  for turn in messages:
    lines.append(turn.get('content') or '')
    for call in turn.get('tool_calls') or ():
      lines += [call['function']['name'], _arguments(call)]
  return '\n'.join(lines)


def _calls(calls: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
  """The calls of one answer: text, and whether it is a special token."""
  if not calls:
    return
  yield CALLS_BEGIN, True
  for i, call in enumerate(calls):
    if i:
      yield '\n', False
    yield CALL_BEGIN, True
    yield call.get('type') or 'function', False
    yield SEPARATOR, True
    name = call['function']['name']
    yield name + ARGUMENTS_BEGIN + _arguments(call) + ARGUMENTS_END, False
    yield CALL_END, True
  yield CALLS_END, True


def _arguments(call: dict[str, Any]) -> str:
  arguments = call['function']['arguments']
  if isinstance(arguments, str):
    return arguments
  return json.dumps(arguments, ensure_ascii=False)


def _check_turn(turn: Any, where: str) -> None:
  if not isinstance(turn, dict):
    raise errors.InputError(f'{where} must be an object')
  role, content = turn.get('role'), turn.get('content')
  if role not in _ROLES:
    raise errors.InputError(
      f'{where}.role={short(role)} must be one of: {", ".join(_ROLES)}'
    )
  calls = turn.get('tool_calls')
  if calls and role != 'assistant':
    raise errors.InputError(f'{where}.tool_calls must be those of an assistant')
  if not isinstance(content, str) and (content is not None or not calls):
    beside = ', or null beside tool_calls' if role == 'assistant' else ''
    raise errors.InputError(f'{where}.content must be a string{beside}')
  check_unicode(content or '', f'{where}.content')
  if not calls:
    return
  if not isinstance(calls, list):
    raise errors.InputError(f'{where}.tool_calls must be a list')
  for i, call in enumerate(calls):
    _check_call(call, f'{where}.tool_calls[{i}]')


def _check_call(call: Any, where: str) -> None:
  function = call.get('function') if isinstance(call, dict) else None
  if not isinstance(function, dict):
    raise errors.InputError(f"{where} must have an object in 'function'")
  name, kind = function.get('name'), call.get('type') or 'function'
  for key, value in (('function.name', name), ('type', kind)):
    if not isinstance(value, str):
      raise errors.InputError(f'{where}.{key} must be a string')
    check_unicode(value, f'{where}.{key}')
  if not isinstance(function.get('arguments'), (str, dict)):
    raise errors.InputError(
      f'{where}.function.arguments must be JSON text or an object'
    )
  try:
    arguments = _arguments(call)
  except TypeError as error:  # dates or bytes of a struct in Parquet
    raise errors.InputError(f'{where}.function.arguments: {error}') from error
  check_unicode(arguments, f'{where}.function.arguments')


def check_unicode(text: str, where: str) -> None:
  """Checks that UTF-8 can encode a text.

  Raises:
    InputError: it has a lone surrogate; names the place.
  """
  if text.isascii():
    return
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise errors.InputError(
      f'{where} has a lone surrogate at character {error.start}'
    ) from error


def short(value: Any) -> str:
  """The start of a value, in one line of ASCII."""
  text = ascii(value)
  return text if len(text) <= 60 else text[:60] + '...'
