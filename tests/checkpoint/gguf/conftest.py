"""A tokenizer, and a model that llama.cpp has."""

import pytest

from tests.checkpoint.gguf import llama


@pytest.fixture(scope='module')
def tokenizer():
  return llama.train_tokenizer()


@pytest.fixture(scope='module')
def model():
  cfg = llama.make('yarn')
  return cfg, *llama.weights(cfg)
