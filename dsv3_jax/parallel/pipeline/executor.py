"""Runs a schedule's table as one SPMD program (TR 3.2.1).

Every rank of `pipe` runs the same loop over ticks (`TickLoop`). In a tick

  1. all ranks look up the embeddings for the forward of a first stage and, for
     the MTP modules, of a last stage (`vocab_parallel`);
  2. each rank runs the branch that its row of the table names (`stage_compute`)
     and adds weight gradients and statistics to their sums (`gradient_sums`). A
     branch is a forward, a backward or a half of one, or a forward overlapped
     with a backward;
  3. activations and their gradients go to the neighbouring ranks (`exchange`);
  4. if a last stage has run, all ranks compute its losses and the gradients of
     the head; if a first or last stage's backward has run, they compute the
     gradients of the embedding (`vocab_parallel`).

Embedding and head are sharded over the vocabulary, so every rank has as much of
them. The table is an input, so another number of micro-batches does not
recompile. A branch that is not taken is a loop of zero iterations (`branches`).
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
# A rank's fields of one tick: `instructions.FIELDS` and slots of arrivals.
Row = dict[str | instructions.Transfer, jax.Array]


class InstructionTable(NamedTuple):
  """A program's arrays, padded to the longest step.

  fields_tick_rank, vocab_fields_tick_direction: of `PipelineProgram`. counts:
  number of ticks, number of micro-batches.
  """

  fields_tick_rank: jax.Array
  vocab_fields_tick_direction: jax.Array
  counts: jax.Array

  @property
  def num_ticks(self) -> jax.Array:
    """Ticks of this step; the rest of the table is padding."""
    return self.counts[0]

  @property
  def num_microbatches(self) -> jax.Array:
    """Micro-batches of this step; the rest of the batch is padding."""
    return self.counts[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model, the layout of its parameters, and the program of a full step."""

  cfg: config.Config
  layout: param_layout.PipelineLayout
  program: instructions.PipelineProgram


def gradients(
  pipe: Pipeline,
  params: Tree,
  router_biases: Tree,
  batch_nBT: model.Batch,
  scales: dict[str, jax.Array],
  table: InstructionTable,
) -> tuple[Tree, dict[str, jax.Array]]:
  """Gradients and losses of a whole step, in a shard_map'ed function.

  Args:
    params: compute forms of this rank's parameters, in the form of
      `PipelineLayout.from_model`.
    router_biases: of this rank, `{'moe': [1, c, n, E], 'mtp': [mtp_depth, E]}`;
      c counts chunks of a rank, n slots of a chunk.
    scales: of `mtp_loss.loss_scales`, with 'mtp_weight'.
  Returns:
    Gradients like `params`, of this device's tokens. Losses and expert loads by
    the keys of `Model.loss`, summed over ranks; 'load' is [1, c, n, E], of the
    stages whose masters this rank holds.
  """
  loop = make_tick_loop(pipe, params, router_biases, batch_nBT, scales)

  def tick(t, state):
    fields = table.fields_tick_rank[t, 0]
    return loop.tick(state, fields, table.vocab_fields_tick_direction[t])

  state = jax.lax.fori_loop(0, table.num_ticks, tick, loop.start())
  return loop.sums.finish(state)


def make_tick_loop(
  pipe: Pipeline,
  params: Tree,
  router_biases: Tree,
  batch_nBT: model.Batch,
  scales: dict[str, jax.Array],
) -> 'TickLoop':
  """The loop of a model's step; arguments as in `gradients`."""
  cfg, program = pipe.cfg, pipe.program
  mtp_depth, num_experts = cfg.model.mtp.depth, cfg.model.moe.num_experts
  vocab = vocab_parallel.VocabParallel(
    cfg, program.schedule, params, batch_nBT, scales
  )
  converter = stage_params.MasterConverter(cfg, pipe.layout, program.schedule)
  chunks = converter.from_masters(params, router_biases)
  tail = ['final_norm', *(f'mtp_{k}' for k in range(mtp_depth))]
  tail = converter.weights({name: params[name] for name in tail})
  operands = stage_compute.StageOperands(
    program, chunks, tail, batch_nBT, router_biases
  )
  shape = vocab.shape
  split_stages = stage_compute.split_stages(cfg, operands, shape)
  vocab_params = {name: params[name] for name in ('embed', 'head')}
  return TickLoop(
    program=program,
    vocab=vocab,
    stages=stage_compute.StageCompute(
      operands, split_stages, scales, mtp_depth, num_experts
    ),
    sums=gradient_sums.GradientSums(
      program,
      chunks,
      tail,
      vocab_params,
      scales,
      mtp_depth,
      num_experts,
      converter,
    ),
    shape=shape,
    dtype=precision.POLICIES[cfg.precision].compute,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class TickLoop:
  """The body of the loop over ticks, and what it reads in every tick.

  shape, dtype: of an activation.
  """

  program: instructions.PipelineProgram
  vocab: vocab_parallel.Vocab
  stages: stage_compute.StageCompute
  sums: gradient_sums.GradientSums
  shape: tuple[int, ...]
  dtype: str

  def start(self) -> State:
    """Empty buffers and sums."""
    buffers = exchange.empty_buffers(
      self.program, self.shape, self.sums.mtp_depth, self.dtype
    )
    buffers |= self.stages.empty_buffers()
    return {'acted': jnp.int32(0)} | buffers | self.sums.zeros()

  def tick(
    self, state: State, fields: jax.Array, vocab_fields_direction: jax.Array
  ) -> State:
    """One tick: embeddings, an action, the exchange, head and their gradients.

    Args:
      fields: this tick's and rank's entry of `fields_tick_rank`.
      vocab_fields_direction: this tick's of `vocab_fields_tick_direction`.
    """
    row = dict(zip(self.field_names(), fields, strict=True))
    vocab_rows = [
      dict(zip(instructions.VOCAB_FIELDS, values, strict=True))
      for values in vocab_fields_direction
    ]
    embedded = [self.vocab.embed(microbatches) for microbatches in vocab_rows]
    for number, branch in enumerate(self.program.branches):
      if number:
        act = lambda *args, branch=branch: self.act(branch, *args)
        taken = (row['branch'] == number) & branches.after_branches(state)
        state = branches.run_branch(taken, act, embedded, row, state)
    state = self.stages.save_new_residuals(state, row)
    state = exchange.exchange(self.program, state, row)
    for direction, microbatches in enumerate(vocab_rows):
      state = self._vocab_work(direction, microbatches, row, state)
    return state

  def field_names(self) -> list[str | instructions.Transfer]:
    """Keys of a row, in the order of `fields_tick_rank`."""
    directions = range(len(self.program.schedule.homes))
    return [
      *instructions.FIELDS,
      *self.program.transfers,
      *(f'head_{direction}' for direction in directions),
    ]

  def act(
    self, branch: instructions.TickBranch, embedded, row: Row, state: State
  ) -> State:
    """Runs a branch.

    In F&B the two passes share no data, so that XLA can run the all-to-alls of
    one beside the products of the other (`Trainer.jit` asks for it). The
    backward is traced first: the forward may take the slot of its residuals.
    """
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
    """Head and embedding gradients, if a direction's end stages have run."""
    last_forward, first_backward, last_backward = (
      microbatches[name] for name in ('last_f', 'first_b', 'last_b')
    )
    state = branches.when(
      (last_forward >= 0) & branches.after_branches(state),
      lambda state: self.vocab.head(direction, last_forward, row, state),
      state,
    )
    return branches.when(
      (first_backward >= 0) | (last_backward >= 0),
      lambda state: self.vocab.embed_gradient(direction, microbatches, state),
      state,
    )
