"""`SamplingArrays` of rows that want neither min-p nor log-probabilities."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.inference import sampling


def make(keys_B2, temperature_B, top_k_B, top_p_B, min_p=0.0):
  rows = len(keys_B2)
  return sampling.SamplingArrays(
    keys_B2,
    temperature_B,
    top_k_B,
    top_p_B,
    jnp.full(rows, min_p, jnp.float32),
    np.zeros(rows, bool),
  )
