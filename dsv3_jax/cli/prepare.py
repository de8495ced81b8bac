"""`dsv3 prepare`: the rows of a run, packed once and kept."""

import json
import os
import pathlib
from typing import Any

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
    num_workers=values.workers or len(os.sched_getaffinity(0)),
    verify=values.verify,
  )
  if values.json:
    print(json.dumps(summary))
    return
  print(_render(summary))


def _render(summary: dict[str, Any]) -> str:
  """The summary as lines and a table."""
  lines = [
    f'{summary["output"]}: {summary["rows"]:,} rows in {summary["shards"]:,} '
    f'shards, {summary["bytes"] / 1e6:,.1f} MB; {summary["written_rows"]:,} '
    f'rows written in {summary["seconds"]:.0f} s',
    f'{summary["tokens"]:,} tokens',
    '',
    f'{"source":24} {"tokens":>16} {"share":>7} {"documents":>12} '
    f'{"epochs":>8}',
  ]
  for name, source in summary['sources'].items():
    share = source['tokens'] / summary['tokens']
    lines.append(
      f'{name or "data.source":24} {source["tokens"]:16,} {share:7.1%} '
      f'{source["documents"]:12,} {source["epochs"]:8.2f}'
    )
  if (chosen := summary['selection']) is None:
    return '\n'.join(lines)
  lines += ['', f'{"":24} {"documents":>12} {"MB":>10}']
  row = lambda name, documents, size: (
    f'{name:24} {documents:12,} {size / 1e6:10,.2f}'
  )
  lines.append(row('corpus', chosen['documents'], chosen['bytes']))
  for rule, entry in chosen['dropped'].items():
    lines.append(row(f'- {rule}', entry['documents'], entry['bytes']))
  lines.append(row('kept', chosen['kept_documents'], chosen['kept_bytes']))
  if len(chosen['sources']) > 1:
    lines += [
      row(f'kept of {name}', x['kept_documents'], x['kept_bytes'])
      for name, x in chosen['sources'].items()
    ]
  for rule, entry in chosen['dropped'].items():
    first = entry['examples'][0]
    partner = f', as {first["partner"]}' if 'partner' in first else ''
    lines.append(f'first {rule}: {first["place"]}{partner}')
  return '\n'.join(lines)
