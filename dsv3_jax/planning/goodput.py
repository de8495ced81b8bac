"""Goodput of a run that is interrupted, and the best checkpoint interval.

Failures of a run with mean time M between them cost a restore R and the work
since the last checkpoint, which took s to save.

  Young (1974)  tau = sqrt(2 s M)
  Daly (2006)   tau = sqrt(2 s M) (1 + sqrt(x) / 3 + x / 9) - s,  x = s / (2 M)
                for s < 2 M, else M
  goodput       tau / (M exp(R / M) (exp((tau + s) / M) - 1))

The last is the share of wall time that advances the run, with exponential times
between failures (Daly's complete model).
"""

import math

from dsv3_jax import errors

# 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3 report, as
# datacenterdynamics.com repeats it): hours of one device between failures.
DEVICE_HOURS = 16384 * 54 * 24 / 419


def run_mtbf(devices: int, device_hours: float = DEVICE_HOURS) -> float:
  """Mean seconds between failures of a run of independent devices."""
  _check(devices=devices, device_hours=device_hours)
  return device_hours * 3600 / devices


def young(save: float, mtbf: float) -> float:
  """Seconds of training between checkpoints."""
  _check(save=save, mtbf=mtbf)
  return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
  """Seconds of training between checkpoints, of higher order."""
  _check(save=save, mtbf=mtbf)
  if save >= 2 * mtbf:
    return mtbf
  x = save / (2 * mtbf)
  return young(save, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save


def goodput(interval: float, save: float, restore: float, mtbf: float) -> float:
  """Share of time that advances the run, 0 to 1."""
  _check(interval=interval, save=save, mtbf=mtbf)
  if restore < 0:
    raise errors.InputError(f'restore={restore} must be >= 0')
  wasted = restore / mtbf + (interval + save) / mtbf
  if wasted > 700:
    return 0.0  # exp overflows
  again = math.exp(restore / mtbf) * math.expm1((interval + save) / mtbf)
  return interval / (mtbf * again)


def _check(**values: int | float) -> None:
  for name, value in values.items():
    if not (value > 0 and math.isfinite(value)):
      raise errors.InputError(f'{name}={value} must be > 0 and finite')
