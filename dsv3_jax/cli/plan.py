"""`dsv3 plan`: time, memory and cost of an experiment, before it runs."""

import json
import math

from absl import flags

from dsv3_jax import config, errors
from dsv3_jax.cli import experiment_flags


def define(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string(
    'chip',
    'h800',
    'h800, h100, h200, b200, gb200, gb300, v5p, v6e or ironwood.',
    **add,
  )
  flags.DEFINE_integer(
    'chips', None, 'Number of chips; default: those of config.parallel.', **add
  )
  flags.DEFINE_enum(
    'vocabulary',
    'last',
    ['last', 'sharded'],
    'Embedding and head on the end stages, as in the report, or over pipe, as '
    'dsv3 train has them.',
    **add,
  )
  flags.DEFINE_float('price', None, 'Dollars of a chip-hour.', **add)
  flags.DEFINE_float('save_seconds', 60.0, 'Time to save.', **add)
  flags.DEFINE_float('restore_seconds', 600.0, 'Time to restart.', **add)
  flags.DEFINE_float(
    'device_hours',
    None,
    "Mean hours of one device between failures; default: Llama 3's H100.",
    **add,
  )
  flags.DEFINE_boolean('search', False, 'Rank the layouts that fit.', **add)
  flags.DEFINE_boolean('fewest', False, 'Find the fewest chips.', **add)
  about = "Predict the report's cost table; needs no --config."
  flags.DEFINE_boolean('cost_table', False, about, **add)
  flags.DEFINE_string('png', None, 'Draw memory and time here.', **add)
  flags.DEFINE_string('html', None, 'Write one page here.', **add)
  flags.DEFINE_boolean('json', False, 'Print one JSON object.', **add)


def plan(values: flags.FlagValues) -> None:
  """Predicts step time, memory, chip-hours and dollars; runs nothing."""
  from dsv3_jax.planning import chips, planner, report, search

  _check(values)
  chip = chips.find(values.chip)
  if values.cost_table:
    print(_cost_table(values, chip))
    return
  cfg = experiment_flags.read(values)
  mesh = math.prod(
    getattr(cfg.parallel, a)
    for a in ('pipe', 'data', 'context', 'node', 'expert')
  )
  num_chips = mesh if values.chips is None else values.chips
  layout = planner.choose_layout(cfg, chip, num_chips, **_changes(values))
  planned = planner.plan(cfg, chip, layout)
  summary = report.as_json(planned, **_run(values))
  if values.search:
    ranked = search.search(cfg, chip, num_chips, layout)
    summary['layouts'] = [_candidate(c) for c in ranked]
  if not planned.fits:
    near = search.nearest(cfg, chip, layout)
    summary['nearest'] = near and _candidate(near) | {
      'changes': search.changed(layout, near.layout)
    }
  if values.fewest:
    least = search.fewest_chips(cfg, chip, layout)
    summary['fewest_chips'] = least and least[0]
  _draw(values, planned, summary)
  if values.json:
    print(json.dumps(summary))
    return
  print(report.render(planned, summary))
  if values.search:
    print(f'\n{report.render_search(ranked)}')
  if not planned.fits:
    print(f'\nnearest layout that fits: {_describe(summary["nearest"])}')
  if values.fewest:
    print(f'\nfewest chips (a power of two): {summary["fewest_chips"]}')


def _check(values: flags.FlagValues) -> None:
  for name in ('png', 'html'):
    path = values[name].value
    if path and not path.endswith(f'.{name}'):
      raise errors.InputError(f'{name}={path!r} must end in .{name}')
  for name in ('price', 'save_seconds', 'device_hours'):
    value = values[name].value
    if value is not None and not (value > 0 and math.isfinite(value)):
      raise errors.InputError(f'{name}={value} must be > 0 and finite')
  if not 0 <= values.restore_seconds < math.inf:
    raise errors.InputError(
      f'restore_seconds={values.restore_seconds} must be >= 0 and finite'
    )
  if values.chips is not None and not 1 <= values.chips <= 1 << 20:
    raise errors.InputError(f'chips={values.chips} must be >= 1 and <= 2**20')


def _changes(values: flags.FlagValues) -> dict[str, object]:
  return {'vocabulary': values.vocabulary}


def _run(values: flags.FlagValues) -> dict[str, float | None]:
  given = {'price': values.price, 'save_seconds': values.save_seconds}
  given['restore_seconds'] = values.restore_seconds
  if values.device_hours is not None:
    given['device_hours'] = values.device_hours
  return given


def _candidate(candidate) -> dict[str, object]:
  return {
    'step_seconds': candidate.seconds,
    'memory_bytes': candidate.memory.total,
    'layout': candidate.layout.describe(),
  }


def _describe(near: dict[str, object] | None) -> str:
  if near is None:
    return 'none with these chips; --fewest says how many it needs'
  changes = ', '.join(f'{k}={v}' for k, v in near['changes'].items())
  return (
    f'{near["layout"]} (changes {changes}): {near["step_seconds"]:.2f} s, '
    f'{near["memory_bytes"] / 1e9:.1f} GB'
  )


def _cost_table(values: flags.FlagValues, chip) -> str:
  from dsv3_jax.planning import device_layout, report, run_cost
  from experiments import long_context, v3_671b

  sources = [v3_671b.get_config('pod')]
  sources += [long_context.get_config(phase) for phase in ('32k', '128k')]
  cfgs = [config.from_config_dict(source) for source in sources]
  num_chips = 2048 if values.chips is None else values.chips
  layouts = [
    device_layout.from_config(cfg, num_chips, **_changes(values))
    for cfg in cfgs
  ]
  rows = run_cost.cost_table(cfgs[0], cfgs[1:], chip, layouts)
  if values.json:
    return json.dumps(report.costs_as_json(rows))
  return report.render_costs(rows)


def _draw(values: flags.FlagValues, planned, summary: dict) -> None:
  if not (values.png or values.html):
    return
  from dsv3_jax.planning import pictures

  try:
    if values.png:
      pictures.save_png(planned, values.png)
    if values.html:
      text = pictures.page(planned, summary)
      with open(values.html, 'w', encoding='utf-8') as file:
        file.write(text)
  except OSError as error:
    path = error.filename or values.png or values.html
    raise errors.InputError(f'{path}: {error.strerror}') from error
