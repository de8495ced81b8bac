"""Which parameters of a test are left to `make nightly`."""

from collections.abc import Iterable

import pytest


def daily(values: Iterable, *chosen: str) -> list:
  """All, as parameters of a test; those not chosen are marked.

  chosen: the daily ones, in their printed form.
  """
  values = list(values)
  assert set(chosen) <= set(map(str, values))
  return [
    value
    if str(value) in chosen
    else pytest.param(value, marks=pytest.mark.nightly)
    for value in values
  ]
