"""Penalties, biases and masks of OpenAI's API and vLLM, in float64."""

import collections

import numpy as np


def adjust(
  logits_V,
  prompt,
  generated,
  *,
  presence=0.0,
  frequency=0.0,
  repetition=1.0,
  biases=(),
  allowed=None,
):
  """Logits of the token behind `prompt + generated`.

  Args:
    biases: pairs of an id and what is added. allowed: ids; None: all.
  """
  adjusted_V = np.array(logits_V, np.float64)
  for token in {*prompt, *generated}:
    logit = adjusted_V[token]
    adjusted_V[token] = logit / repetition if logit > 0 else logit * repetition
  for token, count in collections.Counter(generated).items():
    adjusted_V[token] -= presence + frequency * count
  for token, bias in biases:
    adjusted_V[token] += bias
  if allowed is not None:
    excluded = np.setdiff1d(np.arange(len(adjusted_V)), allowed)
    adjusted_V[excluded] = -np.inf
  return adjusted_V
