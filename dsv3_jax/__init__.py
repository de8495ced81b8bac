"""DeepSeek-V3 in JAX. `dsv3_jax.load(DIR)` gives a trained model."""

import pathlib
from typing import Any


def load(
  directory: str | pathlib.Path,
  dtype: str = 'float32',
  step: int = -1,
  ema: bool = False,
) -> Any:
  """The model of a training workdir: see `inference.loaded`."""
  # Here, so that `dsv3 inspect` and config errors need not wait for JAX.
  from dsv3_jax.inference import loaded

  return loaded.load(directory, dtype, step, ema)
