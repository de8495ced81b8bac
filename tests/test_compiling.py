"""Tests of bits are compiled as users' programs are, others quickly."""

import os

import jax
import pytest
from jax._src import compiler

ALL = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS') == '0'
# Where XLA has two kinds of emitters, and these tests choose.
CHOSEN = jax.__version_info__ < (0, 11) and not ALL


def level():
  """LLVM's level of optimisation for what is compiled now."""
  options = compiler.get_compile_options(1, 1)
  debug = options.executable_build_options.debug_options
  return debug.xla_backend_optimization_level


def emitters():
  """The choice between them that a compilation is given, if any."""
  options = compiler.get_compile_options(1, 1)
  return dict(options.env_option_overrides).get('xla_cpu_use_fusion_emitters')


def test_few_unless_asked():
  assert (level() == 0) != ALL
  assert emitters() is None
  older = '--xla_cpu_use_fusion_emitters=false'
  assert (older in os.environ.get('XLA_FLAGS', '')) == CHOSEN


@pytest.mark.usefixtures('optimized')
def test_all_for_bits():
  assert level() > 0
  assert emitters() == (True if CHOSEN else None)
