"""Eight fake CPU devices and reproducible examples, for every test."""

import gc
import hashlib
import os
import pathlib
import platform
import re
from unittest import mock

import hypothesis
import jax
import pytest
from jax._src import compiler

# Before anything touches a backend: afterwards these are fixed.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# Compiling is most of the time, and what LLVM makes of a program is not ours to
# test: few of its optimisations, and not through MLIR where there is a choice
# (a third less time), by one thread (a fifth less; each worker has its core).
# Processes that tests start inherit all. A 0 from outside asks for all; so does
# `optimized`, for claims on bits.
_FEW = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS') != '0'
# What tests compile with, and users.
_FLAGS = {'xla_cpu_parallel_codegen_split_count': (1, 32)}
if jax.__version_info__ < (0, 11):
  _FLAGS['xla_cpu_use_fusion_emitters'] = (False, True)
if _FEW:
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  jax.config.update('jax_disable_most_optimizations', True)
  outside = os.environ.get('XLA_FLAGS', '')
  flags = [f'--{k}={x}'.lower() for k, (x, _) in _FLAGS.items()]
  flags = [flag for flag in flags if flag.split('=')[0] not in outside]
  os.environ['XLA_FLAGS'] = ' '.join([outside, *flags]).strip()

# Tracing makes many objects and few cycles: a twentieth of the time.
gc.set_threshold(50_000, 20, 50)

# The same examples in every run, and no failure because a machine is slow.
hypothesis.settings.register_profile(
  'dsv3', derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile('dsv3')


def _cache_folder() -> pathlib.Path:
  """Outside the checkout: a second clone compiles nothing again.

  A folder for each kind of CPU, whose instructions a program may use.
  """
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  info = pathlib.Path('/proc/cpuinfo')
  kind = info.read_text() if info.exists() else platform.processor()
  kind = '\n'.join(sorted(set(re.findall(r'(?:model name|flags).*', kind))))
  name = hashlib.sha256(kind.encode()).hexdigest()[:12]
  return pathlib.Path(root, 'dsv3_jax', 'tests', name)


# What one test compiled, no other process compiles again.
jax.config.update('jax_compilation_cache_dir', str(_cache_folder()))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


_MAPS = pathlib.Path('/proc/self/maps')
_MOST_MAPS = 20_000


@pytest.fixture(scope='module', autouse=True)
def _forget_compiled():
  """What was compiled goes before there is too much of it.

  Each program takes dozens of memory maps, of which Linux grants a process
  65,530: a run of the whole suite would crash. Not after every module, or each
  would compile the operations of `jax.numpy` anew.
  """
  yield
  if not _MAPS.exists() or _MAPS.read_bytes().count(b'\n') > _MOST_MAPS:
    jax.clear_caches()


@pytest.fixture(scope='module')
def optimized():
  """Compiles as users do, for claims on bits, which a compiler may change.

  So do tests that follow in the module.
  """
  if not _FEW:
    yield
    return
  jax.clear_caches()  # what was compiled before would be used again
  jax.config.update('jax_disable_most_optimizations', False)
  with mock.patch.object(compiler, 'get_compile_options', _as_users_do):
    yield
  jax.config.update('jax_disable_most_optimizations', True)


def _as_users_do(*args, _of_tests=compiler.get_compile_options, **kwargs):
  """Options of one compilation, those of users whatever `XLA_FLAGS` says."""
  options = _of_tests(*args, **kwargs)
  given = options.env_option_overrides
  users = [(name, x) for name, (_, x) in _FLAGS.items()]
  options.env_option_overrides = [*given, *users]
  return options


def pytest_collection_modifyitems(items):
  """Module by module, so that fixtures live once; those with long tests first.

  At the end, one process would wait for them.
  """
  long = {
    item.fspath for item in items if item.get_closest_marker('slow') is not None
  }
  items.sort(key=lambda item: (item.fspath not in long, item.fspath))


_LEFT = pytest.StashKey[int]()


def pytest_deselected(items):
  """Counts what is left to `make nightly`."""
  nightly = [item for item in items if item.get_closest_marker('nightly')]
  if nightly and nightly[0].config.option.markexpr == 'not nightly':
    stash = nightly[0].config.stash
    stash[_LEFT] = stash.get(_LEFT, 0) + len(nightly)


def pytest_sessionfinish(session):
  """A worker of xdist tells the process that prints."""
  if hasattr(session.config, 'workeroutput'):
    session.config.workeroutput['left'] = session.config.stash.get(_LEFT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  if output := getattr(node, 'workeroutput', None):
    node.config.stash[_LEFT] = output['left']  # each worker collects all


def pytest_terminal_summary(terminalreporter):
  if left := terminalreporter.config.stash.get(_LEFT, 0):
    terminalreporter.write_line(f'{left} long tests are left to `make nightly`')
