"""The files beside a `tokenizer.json`: what they say, and those we write.

`tokenizer_config.json` names the special tokens, and in older folders
`special_tokens_map.json` does. The chat template is in the former, or in
`chat_template.jinja`; others are in `additional_chat_templates/NAME.jinja`.
What counts is what counts for transformers 5.23.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import chat

CONFIG, SPECIAL_MAP = 'tokenizer_config.json', 'special_tokens_map.json'
TEMPLATE, TEMPLATES = 'chat_template.jinja', 'additional_chat_templates'
BOS = '<\uff5cbegin\u2581of\u2581sentence\uff5c>'
PAD = '<\uff5c\u2581pad\u2581\uff5c>'
_PUBLISHED = {'bos_token': BOS, 'eos_token': chat.EOS, 'pad_token': PAD}
_MOST_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
  """What a `tokenizer.json` does not say of itself.

  special_tokens: 'bos_token', 'eos_token' and others -> the token's text.
  adds_bos: texts begin with bos; None: the files do not say.
  templates: of chats, in Jinja, by name; usually one, 'default'.
  origin: the file that has them, for messages.
  eos_ids: tokens that end an answer; None: the tokenizer's eos alone does.
  """

  special_tokens: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: dict(_PUBLISHED)
  )
  adds_bos: bool | None = None
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  origin: str = ''
  eos_ids: tuple[int, ...] | None = None


def read(
  directory: pathlib.Path, eos_ids: tuple[int, ...] | None = None
) -> TokenizerSettings:
  """The settings that the files of a folder make.

  Without these files they are those of DeepSeek-V3, in its chat format.

  Raises:
    InputError: a file, which the message names, is damaged.
  """
  path = directory / CONFIG
  has_names = any((directory / n).exists() for n in (CONFIG, SPECIAL_MAP))
  body = read_object(path)
  named = dict(body)
  if 'added_tokens_decoder' not in body:
    named |= read_object(directory / SPECIAL_MAP)
  tokens = {
    name: token
    for name, value in named.items()
    if name.endswith('_token') and (token := _token(value)) is not None
  }
  adds_bos = None
  if not body.keys().isdisjoint(('add_bos_token', 'add_eos_token')):
    adds_bos = body.get('add_bos_token') or False
    if not isinstance(adds_bos, bool):
      raise errors.InputError(f'{path}: add_bos_token must be true or false')
  templates, origin = _templates(directory, body)
  return TokenizerSettings(
    special_tokens=tokens if has_names else dict(_PUBLISHED),
    adds_bos=adds_bos,
    templates=templates,
    origin=origin,
    eos_ids=eos_ids,
  )


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; {} if there is no such file.

  Raises:
    InputError: it cannot be read, or is no object.
  """
  if not path.exists():
    return {}
  try:
    body = json.loads(_read_text(path))
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f'{path} is not JSON: {error}') from error
  if not isinstance(body, dict):
    raise errors.InputError(f'{path} must hold one JSON object')
  return body


def _token(value: Any) -> str | None:
  """The text of a token, which is a string or an object that has it."""
  if isinstance(value, dict):
    value = value.get('content')
  return value if isinstance(value, str) and value else None


def _templates(
  directory: pathlib.Path, body: dict[str, Any]
) -> tuple[dict[str, str], str]:
  """Templates by name, and where they are; files go before the config's."""
  files = {path.stem: path for path in directory.glob(f'{TEMPLATES}/*.jinja')}
  if (directory / TEMPLATE).exists():
    files['default'] = directory / TEMPLATE
  if files:
    names = sorted(files)
    origin = files.get('default', files[names[0]])
    return {name: _read_text(files[name]) for name in names}, origin.name
  path = directory / CONFIG
  value = body.get('chat_template')
  if isinstance(value, list) and all(isinstance(x, dict) for x in value):
    value = {x.get('name'): x.get('template') for x in value}
  elif isinstance(value, str):
    value = {'default': value}
  value = value or {}
  texts = [*value, *value.values()] if isinstance(value, dict) else [None]
  if not all(isinstance(text, str) for text in texts):
    raise errors.InputError(
      f'{path}: chat_template must be a string, or a list of objects with a '
      'name and a template'
    )
  return value, f'{CONFIG}: chat_template'


def _read_text(path: pathlib.Path) -> str:
  try:
    if path.stat().st_size > _MOST_BYTES:
      raise errors.InputError(f'{path} has more than {_MOST_BYTES} bytes')
    return path.read_bytes().decode()
  except OSError as error:
    raise errors.InputError(
      f'{path} cannot be read ({error.strerror})'
    ) from error
  except UnicodeDecodeError as error:
    raise errors.InputError(f'{path} is not UTF-8: {error.reason}') from error
