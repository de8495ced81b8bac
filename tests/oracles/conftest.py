"""PyTorch, which takes seconds to import, for the tests that ask for it."""

import importlib

import pytest


@pytest.fixture(scope='session')
def torch():
  return importlib.import_module('torch')
