"""Device-hours and dollars of a run, and the report's cost table.

The batch ramp has steps of fewer micro-batches, whose bubble weighs more. Where
a batch has fewer micro-batches than the schedule needs, the arrangement is not
published; its time is extrapolated along the same line.
"""

import dataclasses
from collections.abc import Iterator

from dsv3_jax import config
from dsv3_jax.planning import chips, flops, posttrain, step_time
from dsv3_jax.planning.device_layout import DeviceLayout


def ramp_levels(cfg: config.TrainConfig) -> Iterator[tuple[int, float]]:
  """(batch in sequences, tokens trained with it), linear in tokens."""
  start, step = cfg.batch_size_start, cfg.batch_size_step
  ramp = min(cfg.batch_ramp_tokens, cfg.total_tokens)
  if ramp and cfg.batch_size > start:
    per_level = cfg.batch_ramp_tokens * step / (cfg.batch_size - start)
    left = float(ramp)
    for batch in range(start, cfg.batch_size, step):
      yield batch, min(per_level, left)
      left -= min(per_level, left)
  else:
    ramp = 0
  yield cfg.batch_size, float(cfg.total_tokens - ramp)


def run_seconds(
  cfg: config.Config, layout: DeviceLayout, step: step_time.StepTime
) -> float:
  """Seconds of the whole run of `train.total_tokens`."""
  seconds = 0.0
  for batch, tokens in ramp_levels(cfg.train):
    steps = tokens / (batch * cfg.data.seq_len)
    seconds += steps * step.with_microbatches(batch / layout.microbatch)
  return seconds


def hours(devices: int, seconds: float) -> float:
  return devices * seconds / 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the cost table.

  Attributes:
    error: relative, from the ranges of the inputs.
    why: what is probably wrong with a row that misses `TARGET`.
  """

  name: str
  predicted: float
  published: float
  unit: str
  error: float
  why: str = ''

  @property
  def met(self) -> bool:
    return abs(self.residual) <= TARGET

  @property
  def residual(self) -> float:
    return self.predicted / self.published - 1


TARGET = 0.08  # of every row; nothing is fitted to reach it
REPORT_PRICE = 2.0  # dollars an hour of an H800, TR table 1
# TR table 1, thousands of hours; relative error (None: that of the step); what
# is probably wrong.
_TOTALS = {
  'pre-training': (2664.0, None, ''),
  'context extension': (
    119.0,
    0.25,
    'meshes are ours (NP): experiments/long_context.py',
  ),
  'post-training': (
    5.0,
    1.0,
    'lengths, batches, steps are assumed (NP): planning/posttrain.py',
  ),
  'total': (2788.0, None, ''),
}
# ISCA (arXiv 2505.09343) table 4, MPFT; what is probably wrong with a part.
_STEP = {
  'forward': (1.13, 'all-to-alls count as slow as beside computation'),
  'bubble': (2.06, ''),
  'backward': (1.99, 'memory-bound kernels: bytes at an assumed 80 % of HBM'),
  'weight': (
    0.48,
    'Wgrad counts at the rate of Fprop, its casts at 80 % of HBM',
  ),
  'overlapped': (13.95, ''),
  'optimizer': (0.29, 'the stage of the head decides, and nothing is hidden'),
}


def cost_table(
  pretraining: config.Config,
  extensions: list[config.Config],
  chip: chips.Chip,
  layouts: list[DeviceLayout],
) -> list[Row]:
  """Every published cost beside its prediction (TR table 1, ISCA table 4).

  Args:
    extensions: the phases of context extension.
    layouts: of pre-training and of each extension.
  """
  layout, devices = layouts[0], layouts[0].devices
  step = step_time.step_time(pretraining, chip, layout)
  relative = step_time.uncertainty(pretraining, chip, layout)
  error = relative['step']
  seconds = run_seconds(pretraining, layout, step)
  costs = {'pre-training': hours(devices, seconds) / 1e3}
  extension = 0.0
  for cfg, other in zip(extensions, layouts[1:], strict=True):
    times = step_time.step_time(cfg, chip, other)
    extension += hours(other.devices, run_seconds(cfg, other, times)) / 1e3
  costs['context extension'] = extension
  speed = step.tokens_per_second / devices
  costs['post-training'] = (
    posttrain.published_recipe(pretraining, chip, speed) / 1e3
  )
  costs['total'] = sum(costs.values())
  price = REPORT_PRICE if chip.price is None else chip.price
  rows = _step_rows(pretraining, chip, devices, step, relative)
  for unit, paid, asked in (
    ('K hours', 1.0, 1.0),
    ('M$', price / 1e3, REPORT_PRICE / 1e3),
  ):
    for name, value in costs.items():
      known, spread, why = _TOTALS[name]
      rows.append(
        Row(
          name=name,
          predicted=value * paid,
          published=known * asked,
          unit=unit,
          error=error if spread is None else spread,
          why=why,
        )
      )
  return rows


def _step_rows(
  cfg: config.Config,
  chip: chips.Chip,
  devices: int,
  step: step_time.StepTime,
  errors: dict[str, float],
) -> list[Row]:
  speed = step.tokens_per_second
  row = lambda name, value, known, unit, why='': Row(
    name=name,
    predicted=value,
    published=known,
    unit=unit,
    error=errors.get(name.strip(), errors['step']),
    why=why,
  )
  rows = [row('step', step.seconds, 19.926, 's')]
  for name, (known, why) in _STEP.items():
    value = step.parts[name]
    rows.append(row(f'  {name}', value, known, 's', why))
  rows.append(row('tokens a day', speed * 86400 / 1e9, 272.80, 'B'))
  per_trillion = hours(devices, 1e12 / speed)
  rows.append(row('per trillion tokens', per_trillion / 1e3, 180.0, 'K hours'))
  rows.append(
    row('days per trillion', per_trillion / devices / 24, 3.7, 'days')
  )
  for causal, known in ((True, 385.0), (False, 432.0)):
    flop = flops.flops_per_token(cfg.model, cfg.data.seq_len, causal)
    name = 'causal' if causal else 'non-causal'
    used = flop * speed / devices
    rows.append(row(f'FLOP/s, {name}', used / 1e12, known, 'T'))
    known = {True: 38.94, False: 43.73}[causal]
    rows.append(row(f'MFU, {name}', 100 * used / chip.bf16, known, '%'))
  return rows
