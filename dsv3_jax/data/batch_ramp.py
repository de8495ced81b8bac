"""Batch ramp: a step has more sequences as more tokens were seen (TR 4.2)."""

from dsv3_jax import config


def batch_size_at(cfg: config.TrainConfig, tokens: int) -> int:
  """Sequences of the step after `tokens` tokens (TR 4.2).

  Grows linearly in tokens, by whole `train.batch_size_step`s, rounded down.
  """
  if tokens >= cfg.batch_ramp_tokens:
    return cfg.batch_size
  # Whole numbers: a float would miss a multiple of the step by an ulp.
  grown = (cfg.batch_size - cfg.batch_size_start) * tokens
  wanted = cfg.batch_size_start + grown // cfg.batch_ramp_tokens
  return wanted // cfg.batch_size_step * cfg.batch_size_step
