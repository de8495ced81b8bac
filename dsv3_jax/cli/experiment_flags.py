"""`--config=FILE.py` and its overrides, checked before a command runs."""

import pathlib
import traceback

from absl import flags
from ml_collections import config_flags

from dsv3_jax import config, errors


def define(values: flags.FlagValues, argv: list[str]) -> None:
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment, FILE.py or FILE.py:runlocal; --config.a.b=v overrides.',
    lock_config=True,
    flag_values=values,
    sys_argv=argv,
  )


def define_hf(values: flags.FlagValues) -> None:
  about = 'A config.json of Hugging Face, or its folder, in place of --config.'
  flags.DEFINE_string('hf', None, about, flag_values=values)


def check_overrides(argv: list[str]) -> None:
  """Loads the experiment alone and looks up each `--config.a.b` in it.

  Raises:
    InputError: the file cannot be executed, or has no such setting.
  """
  pairs = zip(argv, [*argv[1:], ''], strict=True)
  spelt = [f'{a}={b}' if a == '--config' else a for a, b in pairs]
  files = [arg for arg in spelt if arg.startswith('--config=')]
  if not files:
    return
  alone = flags.FlagValues()
  define(alone, [argv[0], files[-1]])
  try:
    alone([argv[0], files[-1]])
    experiment = dict(alone.config.items())
  except Exception as error:  # an experiment's code may raise anything
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


def read(values: flags.FlagValues) -> config.Config:
  if values.config is None:
    raise errors.InputError('--config=FILE.py is missing: see experiments/')
  return config.from_config_dict(values.config)


def read_any(values: flags.FlagValues) -> config.Config:
  """Of --config, or the model of --hf with the other settings of base."""
  if values.hf is None:
    return read(values)
  if values.config is not None:
    raise errors.InputError('--config and --hf are both given: give one')
  from dsv3_jax.checkpoint.hf import importer
  from experiments import base

  settings = base.get_config().to_dict()
  return importer.read_config_alone(pathlib.Path(values.hf), settings)
