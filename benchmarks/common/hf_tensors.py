"""A model as the tensors of transformers' classes, unsharded and in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.checkpoint.hf import names as hf_names


def tensors(
  cfg: config.Config, params: Any, router_biases: Any
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and arrays of the Hugging Face layout; `dsv3 export` streams them."""
  state = {'params': params, 'router': router_biases}
  for place in hf_names.places(cfg):
    leaves = place.tensor.leaves
    parts = [hf_names.get(state, leaf.path)[leaf.index] for leaf in leaves]
    array = place.join([np.asarray(part) for part in parts])
    yield place.tensor.name, np.ascontiguousarray(array)
