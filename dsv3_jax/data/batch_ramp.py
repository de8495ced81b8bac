"""Batch ramp: the batch size grows with the training tokens (TR 4.2)."""

from dsv3_jax import config


def batch_size_at(cfg: config.TrainConfig, tokens: int) -> int:
  """Number of sequences of the step after `tokens` tokens.

  Linear in tokens, rounded down to a multiple of `train.batch_size_step`.
  """
  if tokens >= cfg.batch_ramp_tokens:
    return cfg.batch_size
  # Integers, as a float could be an ulp below a multiple of the step.
  grown = (cfg.batch_size - cfg.batch_size_start) * tokens
  wanted = cfg.batch_size_start + grown // cfg.batch_ramp_tokens
  return wanted // cfg.batch_size_step * cfg.batch_size_step


def rows_of_run(cfg: config.TrainConfig, seq_len: int, tokens: int = 0) -> int:
  """Number of sequences that a run still reads after `tokens` tokens."""
  start = tokens
  while tokens < cfg.total_tokens:
    size = batch_size_at(cfg, tokens)
    if tokens >= cfg.batch_ramp_tokens:  # all further steps are as large
      steps = -(-(cfg.total_tokens - tokens) // (size * seq_len))
      return (tokens - start) // seq_len + steps * size
    tokens += size * seq_len
  return (tokens - start) // seq_len
