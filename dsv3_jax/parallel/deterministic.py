"""Deterministic gradients: the same bits on any number of devices, slowly.

Floating-point sums depend on their order, and normally the order depends on the
mesh. In this mode it does not:

  Each sequence is computed alone. The program has the same shapes on any mesh.
  All weights are replicated, also experts. There is no all-to-all, so expert
  parallelism saves no work.
  Gradients and losses of a micro-batch are summed in a binary tree: sequences
  2i and 2i + 1, then pairs of pairs. A device holds neighbouring sequences, so
  it computes the lower levels of the tree alone. Arrays are then all-gathered,
  and each device computes the upper levels.
  Micro-batches are summed one after another.
  The norm is computed from replicated gradients.

A device stores a gradient for each of its sequences of a micro-batch, and after
the all-gather one for each device. The mode shows whether a difference between
meshes is a bug. It is too slow for training runs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import model

Tree = Any
# With these passes XLA rounds differently on one device than on several.
# (Measured on CPU only.)
COMPILER_OPTIONS = {'xla_disable_hlo_passes': 'fusion,algsimp'}


def accumulate(
  grad: Callable[[Tree, model.Batch], Tree],
  params: Tree,
  batch_nBT: model.Batch,
  num_microbatches: jax.Array,
) -> Tree:
  """Sum of `grad(params, sequence)` over all devices, under shard_map.

  Args:
    grad: of a batch of one sequence [1, T].
    batch_nBT: this device's rows; B is a power of two.
    num_microbatches: how many micro-batches are summed; the rest is padding.
  """
  rows = batch_nBT.weights_BT.shape[1]

  def sequence(i, j):
    batch = jax.tree.map(lambda x: x[i, j][None], batch_nBT)
    return grad(params, batch)

  shapes = jax.eval_shape(sequence, 0, 0)
  zeros = lambda *lead: jax.tree.map(
    lambda s: jnp.zeros((*lead, *s.shape), s.dtype), shapes
  )

  def microbatch(i, sums):
    put = lambda buffer, x, j: buffer.at[j].set(x)
    store = lambda j, grads: jax.tree.map(
      lambda buffer, x: put(buffer, x, j), grads, sequence(i, j)
    )
    grads = jax.lax.fori_loop(0, rows, store, zeros(rows))
    return jax.tree.map(
      lambda a, x: a + _sum_over_devices(_tree_sum(x)), sums, grads
    )

  return jax.lax.fori_loop(0, num_microbatches, microbatch, zeros())


def norm(grads: Tree) -> jax.Array:
  """L2 norm of replicated gradients."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))


def _sum_over_devices(x: jax.Array) -> jax.Array:
  axes = tuple(a for a in sharding.BATCH_AXES if collectives.axis_size(a) > 1)
  return _tree_sum(jax.lax.all_gather(x, axes)) if axes else x


def _tree_sum(x: jax.Array) -> jax.Array:
  """Sum over the first dim, as a binary tree of neighbours."""
  while len(x) > 1:
    x = x[0::2] + x[1::2]
  return x[0]
