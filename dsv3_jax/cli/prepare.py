"""`dsv3 prepare`: the rows of a run, packed once and kept."""

import json
import os
import pathlib

from absl import flags

from dsv3_jax import errors
from dsv3_jax.cli import experiment_flags


def define(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string(
    'output', None, 'Folder of the rows, for data.prepared.', **add
  )
  about = 'Rows that the folder is to have; default: those that the run reads.'
  flags.DEFINE_integer('rows', None, about, **add)
  about = 'Threads that encode; default: the cores. They do not change a byte.'
  flags.DEFINE_integer('workers', None, about, **add)
  about = 'Also check the digests of finished shards, and mend what is damaged.'
  flags.DEFINE_boolean('verify', False, about, **add)
  flags.DEFINE_boolean('json', False, 'Print one JSON object.', **add)


def prepare(values: flags.FlagValues) -> None:
  """Packs a run's rows into shards; run again, it goes on."""
  cfg = experiment_flags.read(values)
  if not values.output:
    raise errors.InputError('--output=DIR is missing')
  for name in ('rows', 'workers'):
    if values[name].value is not None and values[name].value < 1:
      raise errors.InputError(f'{name}={values[name].value} must be >= 1')
  from dsv3_jax.data import prepare

  summary = prepare.prepare(
    cfg,
    pathlib.Path(values.output).expanduser(),
    rows=values.rows or 0,
    num_threads=values.workers or len(os.sched_getaffinity(0)),
    verify=values.verify,
  )
  if values.json:
    print(json.dumps(summary))
    return
  print(
    f'{summary["output"]}: {summary["rows"]:,} rows, '
    f'{summary["tokens"]:,} tokens of {summary["documents"]:,} documents in '
    f'{summary["shards"]:,} shards, {summary["bytes"] / 1e6:,.1f} MB; '
    f'{summary["written_rows"]:,} rows written in {summary["seconds"]:.0f} s'
  )
