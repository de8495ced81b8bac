"""The command as a process, and the arguments of a small run."""

import pathlib
import subprocess
import sys

from tests import tiny_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=experiments/quickstart.py:runlocal'


def command(*args):
  return [sys.executable, '-m', 'dsv3_jax.cli', *map(str, args)]


def process(env, *args):
  """The command in a process of its own."""
  return subprocess.run(
    command(*args), capture_output=True, text=True, cwd=ROOT, env=env
  )


def train_args(folder, workdir, steps, **changes):
  named = {n.replace('__', '.'): x for n, x in changes.items()}
  flags = tiny_run.overrides(folder / 'data', steps) | named
  overrides = [f'--config.{name}={value}' for name, value in flags.items()]
  return 'train', CONFIG, f'--workdir={workdir}', *overrides
