"""DeepSeek-V3 in JAX. `dsv3_jax.load(DIR)` gives a trained model."""

import pathlib
from typing import Any


def load(
  directory: str | pathlib.Path, dtype: str = 'float32', **options: Any
) -> Any:
  """The model of a training workdir or of a Hugging Face folder.

  See `inference.llm.load` for the other arguments.
  """
  # Here, so that `dsv3 inspect` and config errors need not wait for JAX.
  from dsv3_jax.inference import llm
  from experiments import base

  settings = base.get_config().to_dict()
  return llm.load(directory, settings, dtype=dtype, **options)
