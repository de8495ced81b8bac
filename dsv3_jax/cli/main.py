"""The `dsv3` command and its table of subcommands."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from dsv3_jax import errors
from dsv3_jax.checkpoint import full_disk
from dsv3_jax.cli import (
  bench,
  checkpoint,
  experiment_flags,
  inference,
  inspect,
  plan,
  prepare,
  schedule,
  train,
)
from dsv3_jax.distributed import processes

# Heavy imports are inside the commands, so that `inspect` and config errors do
# not wait for JAX.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] not in COMMANDS:
    asked = argv[0] if argv else ''
    names = '\n'.join(
      f'  {name:9} {_first_line(run)}' for name, (run, _) in COMMANDS.items()
    )
    print(f'usage: dsv3 COMMAND [--flag=value ...]\n{names}\n')
    if asked in ('', '-h', '--help', 'help'):
      return 0 if asked else errors.EXIT_BAD_INPUT
    return _fail(f'{asked!r} is no command of dsv3')
  run, define = COMMANDS[argv[0]]
  if define is None:
    try:
      return run(argv[1:])
    except errors.InputError as error:
      return _fail(str(error))
  values = flags.FlagValues()
  flags.DEFINE_boolean('help', False, 'Show this help.', flag_values=values)
  define(values, argv)
  if '--help' in argv or '-h' in argv:
    print(f'dsv3 {argv[0]}: {run.__doc__}\n{values.get_help()}')
    return 0
  try:
    experiment_flags.check_overrides(argv)
    rest = values([_negation(arg, values) for arg in argv])[1:]
    if rest:
      raise errors.InputError(f'{rest[0]!r} is no flag: write --name=value')
    with _reader_may_leave():
      return run(values) or 0
  except (errors.InputError, flags.Error) as error:
    return _fail(str(error))
  except OSError as error:
    if (why := full_disk.reason(error)) is None:
      raise
    advice = 'what is finished is safe; free space, and repeat the command'
    path = error.filename or _folder(values)  # a write names no file
    return _fail(str(errors.FullDiskError(path, why, advice)))


def _folder(values: flags.FlagValues) -> str:
  """Where a command writes."""
  names = (name for name in ('workdir', 'output') if name in values)
  return next(
    (values[name].value for name in names if values[name].value), 'a file'
  )


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
  """Ends the process silently if stdout is a closed pipe."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(errors.EXIT_NO_READER)


def _negation(arg: str, values: flags.FlagValues) -> str:
  """`--no-NAME` of a boolean flag as absl spells it: `--noNAME`."""
  name = arg.removeprefix('--no-')
  is_switch = name != arg and name in values and values[name].boolean
  return f'--no{name}' if is_switch else arg


def _fail(message: str) -> int:
  if processes.index() == 0:  # all processes of a job fail alike
    print('dsv3: ' + ' '.join(message.split()), file=sys.stderr)
  return errors.EXIT_BAD_INPUT


def _first_line(run: Callable) -> str:
  return run.__doc__.splitlines()[0]


COMMANDS = {
  'train': (train.train, train.define),
  'prepare': (prepare.prepare, prepare.define),
  'inspect': (inspect.inspect, inspect.define_inspect),
  'generate': (inference.generate, inference.define_generate),
  'chat': (inference.chat, inference.define_chat),
  'serve': (inference.serve, inference.define_serve),
  'eval': (inspect.evaluate, inspect.define_eval),
  'export': (checkpoint.export, checkpoint.define_export),
  'import': (checkpoint.import_, checkpoint.define_import),
  'manifest': (checkpoint.manifest, checkpoint.define_manifest),
  'schedule': (schedule.schedule, schedule.define),
  'plan': (plan.plan, plan.define),
  'bench': (bench.bench, None),  # each benchmark parses its own flags
}

if __name__ == '__main__':
  sys.exit(main())
