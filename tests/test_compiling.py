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


def overrides():
  """What a compilation is given, whatever `XLA_FLAGS` says."""
  return dict(compiler.get_compile_options(1, 1).env_option_overrides)


def test_few_unless_asked():
  assert (level() == 0) != ALL
  assert not overrides()
  flags = os.environ.get('XLA_FLAGS', '').split()
  assert ('--xla_cpu_use_fusion_emitters=false' in flags) == CHOSEN
  assert ('--xla_cpu_parallel_codegen_split_count=1' in flags) != ALL


@pytest.mark.usefixtures('optimized')
def test_all_for_bits():
  assert level() > 0
  want = {'xla_cpu_parallel_codegen_split_count': 32}  # XLA's own
  want |= {'xla_cpu_use_fusion_emitters': True} if CHOSEN else {}
  assert overrides() == ({} if ALL else want)
