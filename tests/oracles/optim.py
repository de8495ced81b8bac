"""AdamW, clipping and the schedules of the recipe in float64 (TR 4.2).

Trees are flat dicts: name -> array. `tokens` counts what was trained on before
the step in question, `step` the steps finished before it.
"""

import math

import numpy as np


def global_norm(grads):
  """Root of the sum of all squares."""
  return math.sqrt(math.fsum(float(np.sum(g**2)) for g in grads.values()))


def clip_by_global_norm(grads, max_norm):
  """(grads * min(1, max_norm / norm), norm before)."""
  norm = global_norm(grads)
  factor = max_norm / norm if norm > max_norm else 1.0
  return {name: g * factor for name, g in grads.items()}, norm


def adamw_step(
  params, grads, mean, square, count, lr, beta1, beta2, eps, decay, decayed
):
  """One AdamW update, bias-corrected, decay decoupled.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p -= lr ((m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps) + decay p)

  Args:
    count: n, the number of this update, from 1.
    decayed: name -> whether weight decay applies.
  Returns:
    params, mean, square after the update.
  """
  new_params, new_mean, new_square = {}, {}, {}
  for name, p in params.items():
    g = np.asarray(grads[name], np.float64)
    m = beta1 * mean[name] + (1.0 - beta1) * g
    v = beta2 * square[name] + (1.0 - beta2) * g**2
    m_hat = m / (1.0 - beta1**count)
    v_hat = v / (1.0 - beta2**count)
    update = m_hat / (np.sqrt(v_hat) + eps)
    if decayed[name]:
      update = update + decay * p
    new_params[name] = p - lr * update
    new_mean[name], new_square[name] = m, v
  return new_params, new_mean, new_square


def learning_rate(
  step,
  tokens,
  peak,
  warmup_steps,
  constant_tokens,
  decay_tokens,
  decay_lr,
  hold_tokens,
  final_lr,
):
  """The five pieces of the learning rate (TR 4.2).

  Linear in steps from 0 (step 0) to peak (step warmup_steps); peak until
  constant_tokens; a half cosine to decay_lr over decay_tokens; decay_lr for
  hold_tokens; final_lr.
  """
  if step < warmup_steps:
    return peak * step / warmup_steps
  if tokens < constant_tokens:
    return peak
  if tokens < constant_tokens + decay_tokens:
    progress = (tokens - constant_tokens) / decay_tokens
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return decay_lr + (peak - decay_lr) * cosine
  if tokens < constant_tokens + decay_tokens + hold_tokens:
    return decay_lr
  return final_lr


def batch_size(tokens, start, final, ramp_tokens, microbatch_size):
  """Sequences of the next step: a line in tokens, whole micro-batches.

  Rounded down, but never below one micro-batch; `final` from ramp_tokens on.
  """
  if tokens >= ramp_tokens:
    return final
  # Whole numbers: a line that is to hit a multiple must not miss it by an ulp.
  wanted = start + (final - start) * int(tokens) // int(ramp_tokens)
  return max(wanted // microbatch_size * microbatch_size, microbatch_size)


def step_schedule(tokens, first, first_tokens, then):
  """`first` while fewer than first_tokens were trained on, then `then`."""
  return first if tokens < first_tokens else then


def ema(average, params, decay):
  """decay * average + (1 - decay) * params, entry by entry."""
  return {
    name: decay * average[name] + (1.0 - decay) * params[name]
    for name in params
  }
