"""Fixtures: a tokenizer, a server that counts, and OpenAI's client."""

import importlib

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from tests.server import web


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(web.TEXTS * 30, 280)


@pytest.fixture(scope='session')
def openai():
  """The module; slow to import, so not by those who only collect tests."""
  return importlib.import_module('openai')


@pytest.fixture(scope='module')
def served(tokenizer):
  with web.serving(tokenizer) as server:
    yield server


@pytest.fixture
def ask(served):
  """OpenAI's client of the server."""
  with web.client(served[0]) as client:
    yield client
