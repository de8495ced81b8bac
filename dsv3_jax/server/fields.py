"""Checks of the fields of a JSON body."""

import reprlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors

_LONGEST = 200  # characters of a value in a message


def effective(path: str, fields: dict, known, neutral) -> dict[str, Any]:
  """The fields of an object that have an effect.

  Raises:
    InputError: a field that is unknown, or not supported at its value.
  """
  effective = {}
  for name, value in fields.items():
    # Not `in`: for Python, True is 1 and 0.0 is False.
    same = (x for x in neutral.get(name, ()) if type(x) is type(value))
    if value is None or any(x == value for x in same):
      continue
    if name in neutral and name not in known:
      raise errors.InputError(
        f'{path}{name}={short(value)} is not supported here'
      )
    if name not in known:
      raise errors.InputError(
        f'{path}{short(name)} is no field of this request: '
        f'{", ".join(sorted(known))}'
      )
    effective[name] = value
  return effective


def check_types(
  fields: Mapping[str, Any], known: Mapping[str, Any], path: str = ''
) -> None:
  """Checks that each value has the type that `known` has under its name."""
  for name, value in fields.items():
    wanted = known[name]
    is_bool = isinstance(value, bool)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
      raise errors.InputError(f'{path}{name}={short(value)} has the wrong type')


def short(value: Any) -> str:
  """The value on one line, shortened if it is long."""
  text = reprlib.repr(value)
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'


def within(name: str, value, low, high):
  """The value, if it lies in [low, high].

  Raises:
    InputError: it does not.
  """
  if not low <= value <= high:  # NaN is within nothing
    raise errors.InputError(f'{name}={short(value)} must be in [{low}, {high}]')
  return value


def above(name: str, value, low, high):
  """The value, if it lies in (low, high]; raises as `within`."""
  if not low < value <= high:
    raise errors.InputError(f'{name}={short(value)} must be in ({low}, {high}]')
  return value
