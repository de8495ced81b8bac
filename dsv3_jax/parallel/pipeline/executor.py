"""Runs a schedule's table as one SPMD program (TR 3.2.1).

Every rank of `pipe` runs the same loop over ticks. In a tick,

  1. all ranks look up the embeddings that a first or last stage needs now
     (`vocab_parallel`);
  2. each rank runs the branch that its row of the table names: a forward, a
     backward or a half of one, or both overlapped, of one of its stages
     (`stage_compute`); weight gradients and statistics are added to their sums
     (`gradient_sums`);
  3. activations and their gradients go to the next rank (`exchange`);
  4. all ranks compute the head's loss and gradients for a last stage that has
     just run, and the embedding's gradients.

Embedding and head are sharded over the vocabulary, so that no rank has more of
them than another. The table is an input: another number of micro-batches
compiles nothing anew. A branch that is not taken is a loop of zero turns
(`branches`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.nn import model
from dsv3_jax.parallel.pipeline import (
  branches,
  exchange,
  gradient_sums,
  instructions,
  param_layout,
  stage_compute,
  stage_params,
  vocab_parallel,
)

Tree = Any
State = dict[str, Any]


class InstructionTable(NamedTuple):
  """A program's arrays, padded to the longest step.

  fields_tick_rank, globals_tick_direction: of `PipelineProgram`. counts: how
  many ticks count, and how many micro-batches.
  """

  fields_tick_rank: jax.Array
  globals_tick_direction: jax.Array
  counts: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model, the layout of its parameters, and the program of a full step."""

  cfg: config.Config
  layout: param_layout.PipelineLayout
  program: instructions.PipelineProgram


def gradients(
  pipe: Pipeline,
  params: Tree,
  router: Tree,
  batch_nBT: model.Batch,
  scales: dict[str, jax.Array],
  table: InstructionTable,
) -> tuple[Tree, dict[str, jax.Array]]:
  """Gradients of a whole step and its loss parts, in a shard_map'ed function.

  Args:
    params: of `PipelineLayout.from_model`, compute forms of this rank's part.
    router: likewise, `{'moe': [1, c, n, E], 'mtp': [depth, E]}`; c counts
      chunks of a rank, n slots of a chunk.
    scales: of `mtp_loss.loss_scales`, with 'mtp_weight'.
  Returns:
    Gradients like `params`, of this device's tokens, and parts as `Model.loss`
    has them, of all ranks; 'load' is [1, c, n, E], of this one's masters.
  """
  loop = make_tick_loop(pipe, params, router, batch_nBT, scales)

  def tick(t, state):
    fields = table.fields_tick_rank[t, 0]
    return loop.tick(state, fields, table.globals_tick_direction[t])

  state = jax.lax.fori_loop(0, table.counts[0], tick, loop.start())
  return loop.sums.finish(state)


def make_tick_loop(
  pipe: Pipeline,
  params: Tree,
  router: Tree,
  batch_nBT: model.Batch,
  scales: dict[str, jax.Array],
) -> 'TickLoop':
  """The loop of a model's step; arguments as of `gradients`."""
  cfg, program = pipe.cfg, pipe.program
  depth, num_experts = cfg.model.mtp.depth, cfg.model.moe.num_experts
  vocab = vocab_parallel.VocabParallel(
    cfg, program.schedule, params, batch_nBT, scales
  )
  converter = stage_params.MasterConverter(cfg, pipe.layout, program.schedule)
  chunks = converter.from_masters(params, router)
  tail = ['final_norm', *(f'mtp_{k}' for k in range(depth))]
  tail = converter.weights({name: params[name] for name in tail})
  operands = stage_compute.StageOperands(
    program, chunks, tail, batch_nBT, router
  )
  shape = vocab.shape
  parts = stage_compute.split_stages(cfg, operands, shape)
  ends = {name: params[name] for name in ('embed', 'head')}
  return TickLoop(
    program=program,
    vocab=vocab,
    stages=stage_compute.StageCompute(
      operands, parts, scales, depth, num_experts
    ),
    sums=gradient_sums.GradientSums(
      program, chunks, tail, ends, scales, depth, num_experts, converter
    ),
    shape=shape,
    dtype=precision.POLICIES[cfg.precision].compute,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class TickLoop:
  """What does not change from tick to tick, and what happens in one.

  vocab: a `VocabParallel` or a stand-in. shape, dtype: of an activation.
  """

  program: instructions.PipelineProgram
  vocab: Any
  stages: stage_compute.StageCompute
  sums: gradient_sums.GradientSums
  shape: tuple[int, ...]
  dtype: Any

  def start(self) -> State:
    """Empty buffers and sums."""
    buffers = exchange.empty_buffers(
      self.program, self.shape, self.sums.depth, self.dtype
    )
    buffers |= self.stages.empty_buffers()
    return {'acted': jnp.int32(0)} | buffers | self.sums.zeros()

  def tick(self, state: State, fields, globals_) -> State:
    """One tick: an action, the exchange, head and embedding's gradients.

    Args:
      fields: this rank's row of the table. globals_: of each direction.
    """
    row = dict(zip(self.field_names(), fields, strict=True))
    now = [
      dict(zip(instructions.GLOBALS, values, strict=True))
      for values in globals_
    ]
    embedded = [self.vocab.embed(microbatches) for microbatches in now]
    for number, branch in enumerate(self.program.branches):
      if number:
        act = lambda *args, branch=branch: self.act(branch, *args)
        taken = (row['branch'] == number) & branches.after_branches(state)
        state = branches.run_branch(taken, act, embedded, row, state)
    state = self.stages.save_new_residuals(state, row)
    state = exchange.exchange(self.program, state, row)
    for direction, microbatches in enumerate(now):
      state = self._vocab_work(direction, microbatches, row, state)
    return state

  def field_names(self) -> list[Any]:
    """Keys of a row, in the order of its numbers."""
    directions = range(len(self.program.schedule.homes))
    return [
      *instructions.FIELDS,
      *self.program.transfers,
      *(f'head_{direction}' for direction in directions),
    ]

  def act(
    self, branch: instructions.TickBranch, embedded, row: dict, state: State
  ) -> State:
    """A branch's passes, backward first: it frees what forward may take."""
    state = state | {'acted': state['acted'] + 1}
    if branch.backward is not None:
      state, grads = self.stages.backward(branch.backward, row, state)
      if grads is not None:
        state = self.sums.add_grads(branch.backward, state, grads)
    if branch.forward is not None:
      buffer = 'new_residuals' if branch.overlapped else 'residuals'
      state, stats = self.stages.forward(
        branch.forward, embedded, row, buffer, state
      )
      state = self.sums.add_stats(branch.forward, state, stats)
    return state

  def _vocab_work(self, direction, microbatches, row, state: State) -> State:
    """Head and embedding gradient of a direction, if a stage needs them now."""
    last, first_back, last_back = (
      microbatches[name] for name in ('last_f', 'first_b', 'last_b')
    )
    state = branches.when(
      (last >= 0) & branches.after_branches(state),
      lambda state: self.vocab.head(direction, last, row, state),
      state,
    )
    return branches.when(
      (first_back >= 0) | (last_back >= 0),
      lambda state: self.vocab.embed_gradient(direction, microbatches, state),
      state,
    )
