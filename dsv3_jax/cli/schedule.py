"""`dsv3 schedule`: its flags, and a few lines over `parallel`."""

import fractions
import json

from absl import flags

from dsv3_jax import errors

_MOST_TASKS = 200_000  # stages x micro-batches; seconds of simulation


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """The flags; the defaults are the report's figure 5."""
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
    'Pieces that the layers are cut into, over all ranks. There are as many '
    'ranks, but half as many under dualpipev and stages / chunks under '
    'interleaved.',
    **add,
  )
  flags.DEFINE_integer(
    'microbatches', 20, 'Of a step; under dualpipe, of both directions.', **add
  )
  flags.DEFINE_integer(
    'chunks', None, 'Stages a rank under interleaved; 2 if not given.', **add
  )
  each = 'of a micro-batch at a stage: a number, or one for each stage'
  flags.DEFINE_list('f', '1', f'Time of the forward {each}.', **add)
  flags.DEFINE_list('b', '2', f'Time of the full backward {each}.', **add)
  flags.DEFINE_list('w', '1', 'Time of the weight half within b.', **add)
  flags.DEFINE_list(
    'fb', None, 'Time of an overlapped pair; f + b if not given.', **add
  )
  flags.DEFINE_string('comm', '0', 'Time from a rank to the next.', **add)
  flags.DEFINE_boolean(
    'split', False, 'Split full backwards (gpipe, 1f1b, interleaved).', **add
  )
  flags.DEFINE_string('png', None, 'Draw it into this file.', **add)
  flags.DEFINE_boolean('json', False, 'One JSON object.', **add)


def schedule(values: flags.FlagValues) -> None:
  """Bubble, memory and table of a pipeline schedule; --png draws it."""
  from dsv3_jax.parallel.schedules import make as schedules
  from dsv3_jax.parallel.schedules import report, simulate

  if values.stages * values.microbatches > _MOST_TASKS:
    raise errors.InputError(
      f'stages * microbatches = {values.stages * values.microbatches} must be '
      f'<= {_MOST_TASKS}'
    )
  if values.png and not values.png.endswith('.png'):
    raise errors.InputError(f'png={values.png!r} must end in .png')
  made = schedules.make_schedule(
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
  played = report.simulate_clocks(made, times)
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
      f'{report.summary(played)}\n\n{report.text_table(made, played.table)}'
    )


def _times(
  name: str, texts: list[str]
) -> fractions.Fraction | tuple[fractions.Fraction, ...]:
  each = tuple(_time(name, text) for text in texts)
  return each[0] if len(each) == 1 else each


def _time(name: str, text: str) -> fractions.Fraction:
  """Decimals as written, so that sums of them are exact."""
  try:
    value = fractions.Fraction(text)
  except (ValueError, ZeroDivisionError) as error:
    raise errors.InputError(f'{name}={text!r} must be a number') from error
  if abs(value) > 10**12:
    raise errors.InputError(f'{name}={text} must be <= 1e12')
  return value
