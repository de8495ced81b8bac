"""Calls of tools in the text of an answer, piece by piece.

The formats are those of `data.chat` and of DeepSeek-V3.1, whose calls have
neither a type nor a fence:

  <call begin> name <sep> arguments <call end>

A call is given when it is complete. What is no call stays text: its arguments
are no JSON object, or the answer ends before it does.
"""

import json
import re
from typing import NamedTuple

from dsv3_jax.data import chat
from dsv3_jax.inference import detokenizer

_END = re.compile(f'{re.escape(chat.CALL_END)}|{re.escape(chat.CALLS_END)}')


class Call(NamedTuple):
  """arguments: the JSON text of an object."""

  name: str
  arguments: str


class Parser:
  """Separates calls from the text round them.

  num_calls: given so far.
  """

  def __init__(self, max_calls: int | None = None):
    """Args: max_calls: further calls are dropped; None: none is."""
    self._max_calls = max_calls
    self._held = ''
    self._inside = False  # between the first and the last token of all calls
    self._opening = ''  # the first token, if no call followed yet
    self._is_broken = False
    self.num_calls = 0

  def feed(self, text: str) -> list[str | Call]:
    """What is certain to be text or a call, in order."""
    text, self._held = self._held + text, ''
    parts = []
    while text and not self._is_broken:
      text = (
        self._inner(text, parts) if self._inside else self._outer(text, parts)
      )
    parts.append(text)
    return [part for part in parts if part]

  def end(self) -> list[str | Call]:
    """The text held back."""
    text, self._held = self._opening + self._held, ''
    self._opening = ''
    is_gap = self._inside and not text.strip()
    return [text] if text and not is_gap else []

  def _outer(self, text: str, parts: list) -> str:
    """Reads text up to the first call; returns the rest."""
    before, begin, rest = text.partition(chat.CALLS_BEGIN)
    if begin:
      self._inside, self._opening = True, begin
    else:
      size = detokenizer.partial_match(text, chat.CALLS_BEGIN)
      before, self._held = text[: len(text) - size], text[len(text) - size :]
    parts.append(before)
    return rest

  def _inner(self, text: str, parts: list) -> str:
    """Reads a call, or the end of all calls; returns the rest."""
    end = _END.search(text)
    if end is None:
      self._held = text
      return ''
    body, rest = text[: end.start()], text[end.end() :]
    if end[0] == chat.CALLS_END and not body.strip() and not self._opening:
      self._inside = False
      return rest
    call = _parse(body) if end[0] == chat.CALL_END else None
    if call is None:
      self._is_broken = True
      text, self._opening = self._opening + text, ''
      return text
    self._opening = ''
    if self._max_calls is None or self.num_calls < self._max_calls:
      self.num_calls += 1
      parts.append(call)
    return rest


def _parse(text: str) -> Call | None:
  """A call, from its first token up to its last; None: it is none."""
  text = text.strip()
  head, separator, tail = text.partition(chat.SEPARATOR)
  if not text.startswith(chat.CALL_BEGIN) or not separator:
    return None
  name, begin, arguments = tail.partition(chat.ARGUMENTS_BEGIN)
  if begin and arguments.endswith(chat.ARGUMENTS_END):
    arguments = arguments.removesuffix(chat.ARGUMENTS_END)
  else:
    name, arguments = head.removeprefix(chat.CALL_BEGIN), tail
  name, arguments = name.strip(), arguments.strip()
  try:
    is_object = isinstance(json.loads(arguments), dict)
  except (ValueError, RecursionError):
    return None
  return Call(name, arguments) if name and is_object else None
