"""The `dsv3` command: one function a subcommand, a few lines over the library.

Exit codes: 0 done; 2 bad input; 70 stuck (watchdog); 75 a signal came and the
state was saved: run again to go on; 76 non-finite loss; 77 corruption.
"""

import functools
import importlib
import json
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from dsv3_jax import (
  cli_engine,
  cli_generate,
  cli_schedule,
  config,
  errors,
  processes,
  supervise,
)

_EXPORT_DTYPES = ['float32', 'bfloat16', 'fp8']

# Heavy imports are inside the commands: `inspect` and a bad config answer
# without waiting for JAX.


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
      return 0 if asked else supervise.EXIT_BAD_INPUT
    return _fail(f'{asked!r} is no command of dsv3')
  run, define = COMMANDS[argv[0]]
  if define is None:
    return run(argv[1:])
  values = flags.FlagValues()
  flags.DEFINE_boolean('help', False, 'Show this.', flag_values=values)
  define(values, argv)
  if '--help' in argv or '-h' in argv:
    print(f'dsv3 {argv[0]}: {run.__doc__}\n{values.get_help()}')
    return 0
  try:
    _check_overrides(argv)
    rest = values(argv)[1:]
    if rest:
      raise errors.InputError(f'{rest[0]!r} is no flag: write --name=value')
    with supervise.reader_may_leave():
      return run(values) or 0
  except (errors.InputError, flags.Error) as error:
    return _fail(str(error))


def _fail(message: str) -> int:
  if processes.index() == 0:  # of a job: what ends one ends all
    print('dsv3: ' + ' '.join(message.split()), file=sys.stderr)
  return supervise.EXIT_BAD_INPUT


def _first_line(run: Callable) -> str:
  return run.__doc__.splitlines()[0]


def _config_flag(values: flags.FlagValues, argv: list[str]) -> None:
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment, FILE.py or FILE.py:runlocal; --config.a.b=v overrides.',
    lock_config=True,
    flag_values=values,
    sys_argv=argv,
  )


def _check_overrides(argv: list[str]) -> None:
  """Loads the experiment alone and looks up each `--config.a.b` in it.

  Raises:
    InputError: the file cannot be run, or has no such setting.
  """
  pairs = zip(argv, [*argv[1:], ''], strict=True)
  spelt = [f'{a}={b}' if a == '--config' else a for a, b in pairs]
  files = [arg for arg in spelt if arg.startswith('--config=')]
  if not files:
    return
  alone = flags.FlagValues()
  _config_flag(alone, [argv[0], files[-1]])
  try:
    alone([argv[0], files[-1]])
    experiment = dict(alone.config.items())
  except Exception as error:  # an experiment is code of its own
    why = (str(error).strip().splitlines() or [''])[-1].strip()
    where = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, flags.Error | OSError | SyntaxError):
      raise errors.InputError(f'{files[-1]} cannot be read: {why}') from error
    raise errors.InputError(
      f'{files[-1]} cannot be read: {type(error).__name__}: {why} '
      f'({where.filename}:{where.lineno})'
    ) from error
  for arg in argv:
    if arg.startswith('--config.'):
      path = arg.removeprefix('--config.').split('=')[0]
      config.check_path(experiment, path)


def _read_config(values: flags.FlagValues) -> config.Config:
  if values.config is None:
    raise errors.InputError('--config=FILE.py is missing: see experiments/')
  return config.from_config_dict(values.config)


def _define_train(values: flags.FlagValues, argv: list[str]) -> None:
  _config_flag(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string('workdir', None, 'Where all goes.', **add)
  about = 'One of several processes, of the SLURM job or TPU pod around it.'
  flags.DEFINE_boolean('cluster', False, about, **add)


def train(values: flags.FlagValues) -> int:
  """Trains an experiment; run again, it resumes."""
  with processes.joined(values.cluster):
    with processes.together('config'):
      cfg = _read_config(values)
      if not values.workdir:
        raise errors.InputError('--workdir=DIR is missing')
    return _train(cfg, values.workdir)


def _train(cfg: config.Config, workdir: str) -> int:
  from dsv3_jax import train as loop

  try:
    loop.run(cfg, workdir)
  except supervise.Stopped as stopped:
    print(
      f'dsv3: stopped by a signal; step {stopped.step} is saved', flush=True
    )
    return supervise.EXIT_SAVED_ON_SIGNAL
  except loop.NonFiniteError as error:
    step, told = error.args
    print(f'dsv3: non-finite loss at step {step}: {told}', file=sys.stderr)
    return supervise.EXIT_NON_FINITE
  except loop.CorruptionError as error:
    print(f'dsv3: {error}', file=sys.stderr)
    return supervise.EXIT_CORRUPTION
  return 0


def _define_inspect(values: flags.FlagValues, argv: list[str]) -> None:
  _config_flag(values, argv)
  flags.DEFINE_boolean('json', False, 'One JSON object.', flag_values=values)
  told = 'Where each array is on the mesh of config.parallel.'
  flags.DEFINE_boolean('sharding', False, told, flag_values=values)


def inspect(values: flags.FlagValues) -> None:
  """Counts parameters, bytes and FLOP per token; allocates nothing."""
  from dsv3_jax import precision
  from dsv3_jax.planning import flops, memory

  cfg = _read_config(values)
  if values.sharding:
    from dsv3_jax.parallel import describe

    print(describe.render(cfg, as_json=values.json))
    return
  shape = (cfg.model, cfg.data.seq_len)
  kept = (cfg.model, precision.POLICIES[cfg.precision])
  if values.json:
    print(json.dumps(flops.inspect_dict(*shape) | memory.inspect_dict(*kept)))
  else:
    print(f'{flops.render(*shape)}\n\n{memory.render(*kept)}')


def _define_eval(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  cli_engine.checkpoint_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_multi_string(
    'task', ['heldout', 'baselines'], 'heldout, baselines.', **add
  )
  flags.DEFINE_boolean('json', False, 'One JSON object a task.', **add)


def evaluate(values: flags.FlagValues) -> None:
  """Held-out loss and bits per byte in f32, beside n-grams and compressors."""
  from dsv3_jax import evaluate as evaluators
  from dsv3_jax.data import corpus

  for task in values.task:
    if task not in evaluators.EVALUATORS:
      known = ', '.join(evaluators.EVALUATORS)
      raise errors.InputError(f'task={task!r} must be one of: {known}')
  loaded = cli_engine.load(values)
  text = corpus.open_corpus(loaded.config.data)
  about = evaluators.Evaluation(
    cfg=loaded.config,
    params=loaded.params,
    router=loaded.router,
    corpus=text,
    tokenizer=loaded.tokenizer,
    windows=evaluators.open_windows(loaded.config, text, loaded.tokenizer),
  )
  for task in values.task:
    told = evaluators.EVALUATORS[task](about)
    if values.json:
      print(json.dumps({'task': task} | told), flush=True)
    else:
      for name, value in told.items():
        print(f'{task:10} {name:24} {value:12.4f}', flush=True)


def _define_export(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  cli_engine.checkpoint_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_string('output', None, 'Folder to make.', **add)
  flags.DEFINE_enum('dtype', 'bfloat16', _EXPORT_DTYPES, 'Of matrices.', **add)
  flags.DEFINE_float('shard_gb', 5.0, 'Most GB (1e9 bytes) of a file.', **add)


def export(values: flags.FlagValues) -> None:
  """Writes a checkpoint for PyTorch (Hugging Face layout), in little memory."""
  for name in ('checkpoint', 'output'):
    if not values[name].value:
      raise errors.InputError(f'--{name}=DIR is missing')
  if not values.shard_gb > 0:
    raise errors.InputError(f'shard_gb={values.shard_gb} must be > 0')
  from dsv3_jax.checkpoint import export as exporting
  from dsv3_jax.data import tokenizer as tokenizers
  from dsv3_jax.inference import loaded
  from experiments import base

  directory = pathlib.Path(values.checkpoint)
  how = {'step': values.step, 'ema': values.ema, 'keep_fp8': True}
  settings, documents = base.get_config().to_dict(), {}
  with loaded.opened(directory, settings, **how) as (cfg, leaves):
    if (tokenizer := loaded.read_tokenizer(directory)) is not None:
      length = cfg.model.max_seq_len
      documents = tokenizers.hf_documents(tokenizer, length)
    exporting.export(
      cfg,
      leaves,
      values.output,
      dtype=values.dtype,
      shard_bytes=int(values.shard_gb * 1e9),
      documents=documents,
      source=loaded.mark(directory, values.step, values.ema),
      progress=functools.partial(print, flush=True),
    )


def _define_import(values: flags.FlagValues, argv: list[str]) -> None:
  _config_flag(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string('hf', None, 'Folder of safetensors.', **add)
  flags.DEFINE_string('output', None, 'Workdir to make.', **add)
  about = "Stored; 'fp8' keeps what is FP8."
  flags.DEFINE_enum('dtype', 'float32', _EXPORT_DTYPES, about, **add)


def import_(values: flags.FlagValues) -> None:
  """Makes a workdir of a Hugging Face folder; --config names the rest."""
  for name in ('hf', 'output'):
    if not values[name].value:
      raise errors.InputError(f'--{name}=DIR is missing')
  from dsv3_jax.checkpoint import importing
  from experiments import base

  source = base.get_config() if values.config is None else values.config
  settings = source.to_dict()
  importing.to_workdir(values.hf, values.output, settings, values.dtype)
  print(f'{values.output} holds step 0')


def _define_manifest(values: flags.FlagValues, argv: list[str]) -> None:
  _config_flag(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_enum('dtype', 'bfloat16', _EXPORT_DTYPES, 'Of matrices.', **add)


def manifest(values: flags.FlagValues) -> None:
  """Prints name, dtype and shape of every tensor of an export."""
  from dsv3_jax.checkpoint import export as exporting

  for spec in exporting.manifest(_read_config(values), values.dtype):
    shape = 'x'.join(map(str, spec.shape))
    print(f'{spec.name}\t{spec.dtype}\t{shape}')


def bench(argv: list[str]) -> int:
  """Runs a benchmark: NAME, then its own flags (NAME --help)."""
  import benchmarks

  found = pkgutil.iter_modules(benchmarks.__path__)
  names = [each.name for each in found if not each.ispkg]
  name = argv[0] if argv else ''
  if name in ('-h', '--help'):
    print(f'dsv3 bench NAME: {bench.__doc__}\n\n' + '\n'.join(names))
    return 0
  if name not in names:
    return _fail(f'benchmark {name!r} must be one of: {", ".join(names)}')
  before, sys.argv = sys.argv, [name, *argv[1:]]
  try:  # as `python -m benchmarks.NAME` does, so that every script fits
    return importlib.import_module(f'benchmarks.{name}').main() or 0
  except errors.InputError as error:
    return _fail(str(error))
  except SystemExit as ended:
    return ended.code or 0
  finally:
    sys.argv = before


COMMANDS = {
  'train': (train, _define_train),
  'inspect': (inspect, _define_inspect),
  'generate': (cli_generate.generate, cli_generate.define_generate),
  'chat': (cli_generate.chat, cli_generate.define_chat),
  'serve': (cli_generate.serve, cli_generate.define_serve),
  'eval': (evaluate, _define_eval),
  'export': (export, _define_export),
  'import': (import_, _define_import),
  'manifest': (manifest, _define_manifest),
  'schedule': (cli_schedule.schedule, cli_schedule.define),
  'bench': (bench, None),  # its flags are the benchmark's
}

if __name__ == '__main__':
  sys.exit(main())
