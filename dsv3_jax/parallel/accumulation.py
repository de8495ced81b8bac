"""Gradients of a step's micro-batches, without a pipeline and with one.

A training step sums gradients through an `Accumulation`. Without a pipeline
micro-batches run one after another on the whole model; with a pipeline they run
by the table of a schedule. How many of them a step uses is an operand, so a
batch ramp does not recompile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel.pipeline import executor, instructions

Tree = Any
Spec = sharding.Spec


@runtime_checkable
class Accumulation(Protocol):
  """Sums gradients over the micro-batches of a step."""

  def num_microbatches(self, count: int) -> Tree:
    """The step's operand for `count` micro-batches."""

  def num_microbatches_specs(self) -> Tree:
    """The partition of that operand."""

  def in_use(self, num_microbatches: Tree, capacity: int) -> jax.Array:
    """Which of `capacity` micro-batches the step uses."""

  def gradients(
    self,
    params: Tree,
    router_biases: Tree,
    batch_nBT: model.Batch,
    scales: dict[str, jax.Array],
    num_microbatches: Tree,
  ) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients and loss parts of this device's tokens."""


@dataclasses.dataclass(frozen=True)
class SequentialAccumulation:
  """The whole model on one micro-batch after another."""

  cfg: config.Config

  def num_microbatches(self, count: int) -> jax.Array:
    return jnp.int32(count)

  def num_microbatches_specs(self) -> Spec:
    return Spec()

  def in_use(self, num_microbatches: jax.Array, capacity: int) -> jax.Array:
    return jnp.arange(capacity) < num_microbatches

  def gradients(
    self, params, router_biases, batch_nBT, scales, num_microbatches
  ):
    grad = gradient_of(self.cfg, params, router_biases, scales)
    micro = lambda i: jax.tree.map(lambda x: x[i], batch_nBT)
    if batch_nBT.weights_BT.shape[0] == 1:
      return grad(params, micro(0))
    shapes = jax.eval_shape(grad, params, micro(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda i, sums: jax.tree.map(jnp.add, sums, grad(params, micro(i)))
    return jax.lax.fori_loop(0, num_microbatches, add, zeros)


@dataclasses.dataclass(frozen=True)
class PipelinedAccumulation:
  """The stages of a pipeline, by the table of a schedule.

  compile_program: makes the program of a step with fewer micro-batches, with
  the branches of the full step.
  """

  pipe: executor.Pipeline
  compile_program: Callable[[int], instructions.PipelineProgram]

  def num_microbatches(self, count: int) -> executor.InstructionTable:
    return _table(self, count)

  def num_microbatches_specs(self) -> executor.InstructionTable:
    return executor.InstructionTable(Spec(None, 'pipe'), Spec(), Spec())

  def in_use(
    self, table: executor.InstructionTable, capacity: int
  ) -> jax.Array:
    return jnp.arange(capacity) < table.num_microbatches

  def gradients(self, *operands):
    return executor.gradients(self.pipe, *operands)


@functools.lru_cache(maxsize=256)
def _table(
  accumulation: PipelinedAccumulation, count: int
) -> executor.InstructionTable:
  """The arrays of a step, padded to the length of the full step's."""
  full = accumulation.pipe.program
  program = accumulation.compile_program(count)
  assert program.branches == full.branches
  assert program.transfers == full.transfers
  assert all(program.slots[k] <= full.slots[k] for k in program.slots)
  num_ticks, length = len(program.fields_tick_rank), len(full.fields_tick_rank)
  pad = lambda x: np.pad(x, [(0, length - num_ticks)] + [(0, 0)] * (x.ndim - 1))
  return executor.InstructionTable(
    jnp.asarray(pad(program.fields_tick_rank)),
    jnp.asarray(pad(program.vocab_fields_tick_direction)),
    jnp.array([num_ticks, count], jnp.int32),
  )


def gradient_of(
  cfg: config.Config,
  params: Tree,
  router_biases: Tree,
  scales: dict[str, jax.Array],
) -> Callable[[Tree, model.Batch], tuple[Tree, dict[str, jax.Array]]]:
  """Gradients and loss parts of a micro-batch, `(params, batch) -> ...`."""
  net = model.build(cfg, training=True)
  # FP8 forms of the weights are computed once a step, for all micro-batches.
  quantized = model.quantize(net.policy, params)

  def loss(params, batch):
    variables = {'params': params} | quantized
    total, parts = net.apply(
      variables, batch, router_biases, scales, method='loss'
    )
    return total, parts | {'total': total}

  # Callers first ask for its shapes, then use it. jit traces it once for both.
  return jax.jit(jax.grad(loss, has_aux=True), inline=True)
