"""Schedules of a run, keyed on tokens (TR 4.2).

They run on the host in Python numbers: 14.8e12 tokens fit neither int32 nor the
mantissa of f32.
"""

import math

from dsv3_jax import config


def lr_at(cfg: config.LrConfig, step: int, tokens: int) -> float:
  """Learning rate of the step after `step` steps and `tokens` tokens (TR 4.2).

  Five pieces: linear in steps, 0 at step 0 and `peak` at `warmup_steps`; `peak`
  until `constant_tokens`; a half cosine to `decay_lr`; `decay_lr`; `final_lr`.
  """
  if step < cfg.warmup_steps:
    return cfg.peak * step / cfg.warmup_steps
  into = tokens - cfg.constant_tokens  # the cosine
  if into < 0:
    return cfg.peak
  if into < cfg.decay_tokens:
    cosine = 0.5 * (1.0 + math.cos(math.pi * into / cfg.decay_tokens))
    return cfg.decay_lr + (cfg.peak - cfg.decay_lr) * cosine
  if into < cfg.decay_tokens + cfg.hold_tokens:
    return cfg.decay_lr
  return cfg.final_lr


def value_at(schedule: config.StepSchedule, tokens: int) -> float:
  """Value of a two-piece schedule after `tokens` tokens."""
  early = tokens < schedule.first_tokens
  return schedule.first if early else schedule.then
