"""Eight fake CPU devices and reproducible examples, for every test."""

import pathlib

import hypothesis
import jax
import pytest

# Before anything touches a backend: afterwards both are fixed.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# The same examples in every run, and no failure because a machine is slow.
hypothesis.settings.register_profile(
  'dsv3', derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile('dsv3')

# What one test compiled, no other process compiles again.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / '.pytest_cache'
jax.config.update('jax_compilation_cache_dir', str(_CACHE / 'compiled'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='module', autouse=True)
def _forget_compiled():
  """What a module compiled goes with it.

  Each program takes dozens of memory maps, of which Linux grants a process
  65,530: a run of the whole suite would crash.
  """
  yield
  jax.clear_caches()


def pytest_collection_modifyitems(items):
  """Long tests first: at the end, one process would wait for them."""
  items.sort(key=lambda item: item.get_closest_marker('slow') is None)
