"""Programs of whole pipelines take most of their time to compile."""

import jax
import pytest


@pytest.fixture
def quick_compile():
  """Compiles with few optimisations: half the time, the same arithmetic."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
