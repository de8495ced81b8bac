"""A folder's chat template: messages to text, in a process with limits."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsv3_jax import errors
from dsv3_jax.data import chat, template_process

_REASONING = ('reasoning_content', 'thinking', 'reasoning')
# What the process needs to start, and the zone of `strftime_now`.
_ENVIRONMENT = (
  *('PATH', 'LD_LIBRARY_PATH', 'TZ'),
  *('PYTHONHOME', 'PYTHONPATH', 'PYTHONUSERBASE'),
)
_MOST_SHOWN = 300  # characters of a template's message
_GIVEN = 'messages, tools or chat_template_kwargs'


class ChatPrompt(NamedTuple):
  """A conversation as the model reads it.

  text: of the ids, special tokens included.
  """

  ids: list[int]
  text: str

  @property
  def opens_thought(self) -> bool:
    """The answer begins within a thought: the prompt has its first tag."""
    return self.text.rstrip().endswith('<think>')


class ChatTemplates:
  """The templates of a folder, and the process that renders them.

  The process starts when it is first needed, and ends with this object. A
  template that exceeds a limit ends it, and the next call starts another.
  Thread-safe.
  """

  def __init__(self, templates: Mapping[str, str], origin: str):
    """Args:
    templates: source by name.
    origin: of the templates, for messages.
    """
    self._templates, self._origin = dict(templates), origin
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None

  def __bool__(self) -> bool:
    return bool(self._templates)

  def check(self) -> None:
    """Checks that Jinja can parse them.

    Raises:
      InputError: names the file and the line.
    """
    for source in self._templates.values():
      self._ask({'template': source})

  def select(self, tools: Any) -> str:
    """The source for a conversation: 'tool_use' if there are tools.

    Raises:
      InputError: no template is the default.
    """
    for name in ('tool_use', 'default') if tools is not None else ('default',):
      if name in self._templates:
        return self._templates[name]
    raise errors.InputError(
      f"{self._origin}: none of the templates is named 'default': "
      f'{", ".join(sorted(self._templates))}'
    )

  def render(
    self,
    messages: Any,
    tools: Any,
    variables: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    controls: Sequence[str],
  ) -> tuple[str, str]:
    """The text of a conversation, and the mark of what is no control token.

    Args:
      variables: of the template, beside messages and tools.
      special_tokens: variables too, such as 'bos_token'.
      controls: special tokens. Where messages, tools and variables spell one,
        the text has the mark behind its first character.

    Raises:
      InputError: there is no message, the input is no JSON, or the template
        raises or exceeds a limit of `template_process`.
    """
    chat.check_list(messages)
    given = dict(variables) | {
      'messages': [_message(i, value) for i, value in enumerate(messages)],
      'tools': tools,
    }
    source = self.select(tools)
    mark = _unused(_dump(given), source)
    try:
      marked = _marked(given, controls, mark)
    except RecursionError as error:
      raise errors.InputError(f'{_GIVEN} is nested too deeply') from error
    given = {'documents': None} | special_tokens | marked
    text = self._ask({'template': source, 'variables': given})
    chat.check_unicode(text, self._origin)
    return text, mark

  def _ask(self, request: dict[str, Any]) -> str:
    """The process's answer."""
    line = json.dumps(request).encode() + b'\n'
    with self._lock:
      process = self._running()
      try:
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline()
      except BrokenPipeError:
        reply = b''
      except BaseException:  # an interrupt: its answer is not the next one's
        _end(process)
        raise
      if not reply.endswith(b'\n'):
        _end(process)
        raise errors.InputError(
          f'{self._origin}: {_reason(process.returncode)}'
        )
    answer = json.loads(reply)
    if 'error' in answer:
      message = ' '.join(answer['error'].split())[:_MOST_SHOWN]
      message = ''.join(c if c.isprintable() else '?' for c in message)
      raise errors.InputError(f'{self._origin}: {message}')
    return answer['text']

  def _running(self) -> subprocess.Popen:
    if self._process is None or self._process.poll() is not None:
      seconds = template_process.CPU_SECONDS
      # A session of its own: an interrupt in the terminal is not for it.
      self._process = subprocess.Popen(
        [sys.executable, '-P', template_process.__file__, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
        start_new_session=True,
      )
      weakref.finalize(self, _end, self._process)
    return self._process


def _end(process: subprocess.Popen) -> None:
  """Ends the process, whatever it does."""
  process.kill()
  with contextlib.suppress(BrokenPipeError):  # what it did not read
    process.stdin.close()
  process.stdout.close()
  process.wait()


def _reason(code: int) -> str:
  if code == -signal.SIGXCPU:
    seconds = template_process.CPU_SECONDS
    return f'the template takes more than {seconds} seconds'
  return f'the process of the template has ended with code {code}'


def _message(i: int, value: Any) -> dict[str, Any]:
  """A message as transformers passes it on.

  Keys without a value are left out, but for the content of a turn that only
  calls tools: DeepSeek's templates ask whether it is none. A thought is
  `reasoning_content`, under whichever of its names it comes.
  """
  if not isinstance(value, Mapping):
    raise errors.InputError(f'messages[{i}] must be an object')
  message = {k: v for k, v in value.items() if v is not None}
  if message.get('tool_calls'):
    message.setdefault('content', None)
  for name in _REASONING:
    if name in message:
      thought = {'reasoning_content': message[name]}
      return {'thinking': message[name]} | message | thought
  return message


def _dump(value: Any) -> str:
  """As JSON.

  Raises:
    InputError: it is no JSON, or its text has a lone surrogate.
  """
  try:
    text = json.dumps(value, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise errors.InputError(f'{_GIVEN} must be JSON: {error}') from error
  chat.check_unicode(text, _GIVEN)
  return text


def _unused(*texts: str) -> str:
  """A character of private use that no text has."""
  for code in itertools.count(0xF0000):
    if not any(chr(code) in text for text in texts):
      return chr(code)


def _marked(value: Any, controls: Sequence[str], mark: str) -> Any:
  """The same, with the mark within each control token that a string spells."""
  words = sorted((x for x in controls if len(x) > 1), key=len, reverse=True)
  if not words:
    return value
  pattern = re.compile('|'.join(map(re.escape, words)))

  def text(value: str) -> str:
    return pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)

  def walk(value: Any) -> Any:
    if isinstance(value, str):
      return text(value)
    if isinstance(value, Mapping):
      return {walk(k): walk(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [walk(x) for x in value]
    return value

  return walk(value)
