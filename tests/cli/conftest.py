"""A run of twelve steps by the command, which many of its tests read."""

import fcntl
import os
import pathlib

import pytest

from tests.cli import commands


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """Of all workers of xdist."""
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent
  path = pathlib.Path(base, 'cli')
  path.mkdir(exist_ok=True)
  return path


@pytest.fixture(scope='session')
def env(folder):
  """One compilation cache for all processes."""
  return os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PLATFORMS': 'cpu',
    'XDG_CACHE_HOME': str(folder / 'user-cache'),
  }


@pytest.fixture(scope='session')
def trained(folder, env):
  """Workdir of the run; one worker trains, another waits and reads."""
  workdir = folder / 'trained'
  with open(folder / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / 'is trained').exists():
      args = commands.train_args(folder, workdir, 12, checkpoint__every_steps=4)
      done = commands.process(env, *args)
      assert not done.returncode, done.stderr
      assert 'bits_per_byte' in done.stdout
      (folder / 'is trained').touch()
  return workdir
