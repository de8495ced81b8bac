"""`dsv3 schedule`: simulates a pipeline schedule."""

import fractions
import json

from absl import flags

from dsv3_jax import errors

_MOST_TASKS = 200_000  # stages x micro-batches; seconds of simulation


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags; the defaults give figure 5 of the report."""
  del argv
  add = {'flag_values': values}
  flags.DEFINE_string(
    'kind',
    'dualpipe',
    'gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev.',
    **add,
  )
  flags.DEFINE_integer(
    'stages',
    8,
    'Stages of the model. The number of ranks is the same, but half of it for '
    'dualpipev and stages / chunks for interleaved.',
    **add,
  )
  flags.DEFINE_integer(
    'microbatches',
    20,
    'Micro-batches of a step; for dualpipe, of both directions.',
    **add,
  )
  flags.DEFINE_integer(
    'chunks', None, 'Stages of a rank for interleaved; default: 2.', **add
  )
  suffix = 'of a micro-batch in a stage: a number, or one for each stage'
  flags.DEFINE_list('f', '1', f'Time of the forward {suffix}.', **add)
  flags.DEFINE_list('b', '2', f'Time of the full backward {suffix}.', **add)
  flags.DEFINE_list(
    'w', '1', 'Time of the weight gradients, a part of b.', **add
  )
  flags.DEFINE_list(
    'fb',
    None,
    'Time of an overlapped forward/backward; default: f + b.',
    **add,
  )
  flags.DEFINE_string('comm', '0', 'Time of a transfer between ranks.', **add)
  flags.DEFINE_boolean(
    'split', False, 'Split full backwards (gpipe, 1f1b, interleaved).', **add
  )
  flags.DEFINE_string('png', None, 'Draw the schedule into this file.', **add)
  flags.DEFINE_boolean('json', False, 'Print one JSON object.', **add)


def schedule(values: flags.FlagValues) -> None:
  """Prints bubble, memory and table of a pipeline schedule; --png draws it."""
  from dsv3_jax.parallel.schedules import make as schedules
  from dsv3_jax.parallel.schedules import report, simulate

  if values.stages * values.microbatches > _MOST_TASKS:
    raise errors.InputError(
      f'stages * microbatches = {values.stages * values.microbatches} must be '
      f'<= {_MOST_TASKS}'
    )
  if values.png and not values.png.endswith('.png'):
    raise errors.InputError(f'png={values.png!r} must end in .png')
  pipeline = schedules.make_schedule(
    values.kind,
    stages=values.stages,
    microbatches=values.microbatches,
    chunks=values.chunks,
    split_backward=values.split,
  )
  fb = None if values.fb is None else _times('fb', values.fb)
  times = simulate.Times(
    **{name: _times(name, values[name].value) for name in 'fbw'},
    fb=fb,
    comm=_time('comm', values.comm),
  )
  played = report.simulate_clocks(pipeline, times)
  if values.png:
    from dsv3_jax.parallel.schedules import plot

    try:
      plot.save(played, values.png)
    except OSError as error:
      raise errors.InputError(f'png={values.png}: {error.strerror}') from error
  if values.json:
    print(json.dumps(report.as_json(played)))
  else:
    print(
      f'{report.summary(played)}\n\n{report.text_table(pipeline, played.table)}'
    )


def _times(
  name: str, texts: list[str]
) -> fractions.Fraction | tuple[fractions.Fraction, ...]:
  times = tuple(_time(name, text) for text in texts)
  return times[0] if len(times) == 1 else times


def _time(name: str, text: str) -> fractions.Fraction:
  """Parses a decimal exactly, so that sums of times are exact."""
  try:
    value = fractions.Fraction(text)
  except (ValueError, ZeroDivisionError) as error:
    raise errors.InputError(f'{name}={text!r} must be a number') from error
  if abs(value) > 10**12:
    raise errors.InputError(f'{name}={text} must be <= 1e12')
  return value
