"""Fields of a body that say how tokens are sampled."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.inference import request as requests
from dsv3_jax.server import fields

_NUMBER = (int, float)
TYPES = {
  'temperature': _NUMBER,
  'top_p': _NUMBER,
  'top_k': int,
  'min_p': _NUMBER,
  'seed': int,
  'logit_bias': dict,
  'presence_penalty': _NUMBER,
  'frequency_penalty': _NUMBER,
  'repetition_penalty': _NUMBER,
}


def parse(
  values: Mapping[str, Any], vocab_size: int, seed: int, logprobs: int | None
) -> requests.SamplingParams:
  """Parameters of the fields that are there.

  Args:
    seed: if there is none.

  Raises:
    InputError: a value out of range.
  """
  get, within = values.get, fields.within
  top_k = within('top_k', get('top_k', 0), -1, 2**31 - 1)  # -1 keeps all too
  penalty = lambda name: float(within(name, get(name, 0), -2, 2))
  repetition = within(
    'repetition_penalty', get('repetition_penalty', 1), 0.01, 100
  )
  return requests.SamplingParams(
    temperature=float(within('temperature', get('temperature', 1), 0, 100)),
    top_k=max(top_k, 0),
    top_p=float(fields.above('top_p', get('top_p', 1), 0, 1)),
    min_p=float(within('min_p', get('min_p', 0), 0, 1)),
    seed=within('seed', get('seed', seed), -(2**63), 2**64 - 1),
    logit_bias=_logit_bias(get('logit_bias', {}), vocab_size),
    presence_penalty=penalty('presence_penalty'),
    frequency_penalty=penalty('frequency_penalty'),
    repetition_penalty=float(repetition),
    logprobs=logprobs,
  )


def _logit_bias(
  value: dict[str, Any], vocab_size: int
) -> tuple[tuple[int, float], ...]:
  most = requests.MAX_LOGIT_BIASES
  if len(value) > most:
    raise errors.InputError(
      f'logit_bias has {len(value)} entries; at most {most} are taken'
    )
  pairs = []
  for name, bias in value.items():
    where = f'logit_bias[{fields.short(name)}]'
    if not (name.isascii() and name.isdecimal() and len(name) < 10):
      raise errors.InputError(f'{where} must have a token id as its key')
    if int(name) >= vocab_size:
      raise errors.InputError(f'{where}: ids are below {vocab_size}')
    if type(bias) not in _NUMBER:
      raise errors.InputError(f'{where}={fields.short(bias)} must be a number')
    pairs.append((int(name), float(fields.within(where, bias, -100, 100))))
  return tuple(pairs)
