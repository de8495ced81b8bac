"""Fixtures: a tokenizer, and a server that counts."""

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from tests.server import web


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(web.TEXTS * 30, 280)


@pytest.fixture(scope='module')
def served(tokenizer):
  with web.serving(tokenizer) as server:
    yield server
