"""`generation_config.json`: what ends an answer, and how it is sampled.

As in transformers it goes before `config.json`, whose token ids count where
there is none. Sampling parameters are defaults, as vLLM takes them.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsv3_jax import errors
from dsv3_jax.data import tokenizer_files

NAME = 'generation_config.json'
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_MOST_ID = 2**31 - 1
# Parameter -> what its value must be, and the test of it.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  'temperature': ('in [0, 100]', lambda x: 0 <= x <= 100),
  'top_p': ('in (0, 1]', lambda x: 0 < x <= 1),
  'top_k': ('an integer >= -1', lambda x: x == int(x) and -1 <= x < 2**31),
  'min_p': ('in [0, 1]', lambda x: 0 <= x <= 1),
  'repetition_penalty': ('in [0.01, 100]', lambda x: 0.01 <= x <= 100),
}


class GenerationConfig(NamedTuple):
  """Defaults of a model's answers.

  eos_ids: tokens that end one; None: the files name none.
  sampling: parameters that the file names. Greedy is a temperature of 0.
  """

  eos_ids: tuple[int, ...] | None
  sampling: Mapping[str, float | int]


def read(directory: pathlib.Path) -> GenerationConfig:
  """Of a Hugging Face folder, or of a workdir that was imported from one.

  Raises:
    InputError: a value is out of range; names the file and the field.
  """
  path = directory / NAME
  body = tokenizer_files.read_object(path)
  eos = _eos_ids(path, body)
  if eos is None:
    other = directory / 'config.json'
    settings = tokenizer_files.read_object(other)
    if 'model_type' in settings:  # not of a workdir
      eos = _eos_ids(other, settings)
  return GenerationConfig(eos, _sampling(path, body))


def from_config(body: Mapping[str, Any]) -> dict[str, bytes]:
  """The file with the token ids of a `config.json`, by name; {} without ids."""
  ids = {name: body[name] for name in TOKEN_IDS if body.get(name) is not None}
  text = json.dumps({'_from_model_config': True} | ids, indent=2) + '\n'
  return {NAME: text.encode()} if ids else {}


def token_ids(files: Mapping[str, bytes]) -> dict[str, Any]:
  """What the file among these, if it is there, puts into a `config.json`."""
  body = json.loads(files.get(NAME, b'{}'))
  return {name: body[name] for name in TOKEN_IDS if body.get(name) is not None}


def _eos_ids(
  path: pathlib.Path, body: Mapping[str, Any]
) -> tuple[int, ...] | None:
  value = body.get('eos_token_id')
  if value is None:
    return None
  ids = value if isinstance(value, list) else [value]
  if not all(type(i) is int and 0 <= i <= _MOST_ID for i in ids):
    raise errors.InputError(
      f'{path}: eos_token_id={_short(value)} must be an id or a list of ids'
    )
  return tuple(ids)


def _sampling(
  path: pathlib.Path, body: Mapping[str, Any]
) -> dict[str, float | int]:
  samples = body.get('do_sample')
  if samples not in (True, False, None):
    raise errors.InputError(
      f'{path}: do_sample={_short(samples)} must be true or false'
    )
  sampling = {}
  for name, (rule, holds) in _RULES.items():
    value = body.get(name)
    if value is None:
      continue
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or not holds(value):
      raise errors.InputError(f'{path}: {name}={_short(value)} must be {rule}')
    sampling[name] = float(value)
  if 'top_k' in sampling:
    sampling['top_k'] = max(int(sampling['top_k']), 0)  # -1 keeps all too
  if samples is False:
    penalty = {k: v for k, v in sampling.items() if k == 'repetition_penalty'}
    return {'temperature': 0.0} | penalty
  return sampling


def _short(value: Any) -> str:
  text = ascii(value)
  return text if len(text) <= 60 else text[:60] + '...'
