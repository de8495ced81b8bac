"""`dsv3 train`: joins the job, reads the experiment, runs the loop."""

import sys

from absl import flags

from dsv3_jax import config, errors
from dsv3_jax.cli import experiment_flags
from dsv3_jax.distributed import processes
from dsv3_jax.training import watchdog


def define(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string(
    'workdir', None, 'Folder of the run: config, metrics, checkpoints.', **add
  )
  about = 'Run as one process of the surrounding SLURM job or TPU pod.'
  flags.DEFINE_boolean('cluster', False, about, **add)


def train(values: flags.FlagValues) -> int:
  """Trains an experiment; run again, it resumes."""
  with processes.join_job(values.cluster):
    with processes.propagate_errors('config'):
      cfg = experiment_flags.read(values)
      if not values.workdir:
        raise errors.InputError('--workdir=DIR is missing')
    return _train(cfg, values.workdir)


def _train(cfg: config.Config, workdir: str) -> int:
  from dsv3_jax.training import loop

  try:
    loop.run(cfg, workdir)
  except watchdog.Stopped as stopped:
    print(
      f'dsv3: stopped by a signal; step {stopped.step} is saved', flush=True
    )
    return errors.EXIT_SAVED_ON_SIGNAL
  except loop.NonFiniteError as error:
    step, metrics = error.args
    print(f'dsv3: non-finite loss at step {step}: {metrics}', file=sys.stderr)
    return errors.EXIT_NON_FINITE
  except loop.CorruptionError as error:
    print(f'dsv3: {error}', file=sys.stderr)
    return errors.EXIT_CORRUPTION
  return 0
