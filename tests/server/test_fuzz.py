"""Fuzzed requests, and that a case can be sent again."""

import pytest

from tests.server import fuzz, fuzz_requests


@pytest.mark.parametrize(
  'count', [2000, pytest.param(4000, marks=pytest.mark.nightly)]
)
def test_fuzzed_requests_are_answered_or_refused(tmp_path, count):
  """It looks on both sides of the line, at each endpoint."""
  for accepted, refused in fuzz.run(tmp_path, count, seed=count).values():
    assert 0.2 < accepted / (accepted + refused) < 0.8


def test_fuzzed_requests_can_be_made_again():
  cases = list(fuzz_requests.cases(5, 50))
  assert cases == list(fuzz_requests.cases(5, 50))
  assert cases != list(fuzz_requests.cases(6, 50))
