"""Gradients against float64 finite differences of an oracle.

Along a direction with entries of variance 1 a slope has the size of the
gradient's norm, so a gradient that is wrong by the share r of its norm shows as
an error of about r times that norm, wherever the fault is.
"""

import jax
import numpy as np

from tests import tolerances

_STEP = 1e-5  # central differences in float64: errors near 1e-10


def assert_matches(grads, oracle, values, seed=0, dtype='float32'):
  """Holds each leaf's gradient to the oracle's slope along a direction.

  Args:
    grads: tree of gradients; values: the same tree in float64, where they
      were taken. oracle: tree -> float.
  """
  rng = np.random.default_rng(seed)
  leaves, structure = jax.tree.flatten(values)
  names = [jax.tree_util.keystr(path) for path, _ in paths(values)]
  for i, grad in enumerate(jax.tree.leaves(grads)):
    grad = np.asarray(grad, np.float64)
    assert grad.shape == leaves[i].shape, names[i]
    direction = rng.normal(size=grad.shape)
    values_at = [
      oracle(
        jax.tree.unflatten(
          structure,
          leaves[:i] + [leaves[i] + step * direction] + leaves[i + 1 :],
        )
      )
      for step in (_STEP, -_STEP)
    ]
    want = (values_at[0] - values_at[1]) / (2.0 * _STEP)
    error = abs(np.sum(grad * direction) - want)
    limit = tolerances.TOLERANCE[dtype] * np.linalg.norm(grad) + 1e-8
    assert error <= limit, f'{names[i]}: slope off by {error}, limit {limit}'


def paths(tree):
  """Leaves with their paths, in the order of `jax.tree.leaves`."""
  return jax.tree_util.tree_flatten_with_path(tree)[0]
