"""One record of somebody else's file: a text or a conversation, checked."""

import json
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import chat

# Levels of lists and objects in a JSON value. Python's parser ends at about a
# thousand frames, those of its caller included.
_MOST_LEVELS = 64


def from_json(line: bytes, text_key: str) -> dict[str, Any]:
  """Reads one JSON object: `{'messages': [...]}` or `{'text': str}`.

  A conversation is in 'messages', unless that is null; a text at `text_key`.

  Raises:
    InputError: the reason, without the place.
  """
  try:
    record = json.loads(line.decode())
  except UnicodeDecodeError as error:
    raise errors.InputError(_not_unicode(error)) from error
  except json.JSONDecodeError as error:
    raise errors.InputError(
      f'not JSON: {error.msg} at character {error.pos}'
    ) from error
  except ValueError as error:  # Python's limit, against quadratic time
    raise errors.InputError(
      'not read: an integer of more than 4,300 digits'
    ) from error
  except RecursionError as error:
    raise errors.InputError(_too_deep()) from error
  if not isinstance(record, dict):
    raise errors.InputError('not a JSON object')
  if not _is_shallow(record, _MOST_LEVELS):
    raise errors.InputError(_too_deep())
  if record.get('messages') is not None:
    return from_value(record['messages'], 'messages', text_key)
  if not isinstance(record.get(text_key), str):
    known = ', '.join(chat.short(name) for name in list(record)[:8])
    raise errors.InputError(
      f'data.text_key={text_key!r} must be a string, or messages a list; the '
      f'record has: {known}'
    )
  return from_value(record[text_key], text_key, text_key)


def from_value(value: Any, key: str, text_key: str) -> dict[str, Any]:
  """Checks a text, or a conversation: a list, or anything not at `text_key`.

  Raises:
    InputError: the reason, without the place.
  """
  if isinstance(value, list) or key != text_key:
    chat.check(value)
    return {'messages': value}
  if not isinstance(value, str):
    raise errors.InputError(
      f'data.text_key={key!r} must be a string, not {chat.short(value)}'
    )
  chat.check_unicode(value, key)
  return {'text': value}


def from_text(data: bytes) -> dict[str, str]:
  """Reads a whole file of text; any line end becomes a newline.

  Raises:
    InputError: the reason, without the place.
  """
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    raise errors.InputError(_not_unicode(error)) from error
  return {'text': text.replace('\r\n', '\n').replace('\r', '\n')}


def _not_unicode(error: UnicodeDecodeError) -> str:
  return f'not UTF-8: {error.reason} at byte {error.start}'


def _too_deep() -> str:
  return f'not read: more than {_MOST_LEVELS} levels of lists and objects'


def _is_shallow(value: Any, levels: int) -> bool:
  """True if lists and objects are nested in at most so many levels."""
  if isinstance(value, dict):
    value = value.values()
  elif not isinstance(value, list):
    return True
  return levels > 0 and all(
    _is_shallow(x, levels - 1) for x in value if isinstance(x, (dict, list))
  )
