"""The command as a process, and the arguments of a small run."""

import contextlib
import io
import pathlib
import subprocess
import sys

from dsv3_jax.cli import main as cli
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


def in_process(*args):
  """The same in this one, which has imported JAX."""
  # ml_collections runs every experiment in one module: forget the last one's.
  sys.modules.pop('config_config', None)
  out, err = io.StringIO(), io.StringIO()
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.chdir(ROOT))
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    code = cli.main(list(map(str, args)))
  return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def train_args(folder, workdir, steps, **changes):
  named = {n.replace('__', '.'): x for n, x in changes.items()}
  flags = tiny_run.overrides(folder / 'data', steps) | named
  overrides = [f'--config.{name}={value}' for name, value in flags.items()]
  return 'train', CONFIG, f'--workdir={workdir}', *overrides
