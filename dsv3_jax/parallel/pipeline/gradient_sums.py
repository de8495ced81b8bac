"""Sums over a step's micro-batches: gradients, losses, expert loads.

A rank sums weight gradients in f32 and in place:

  'grads'  of its chunks
  'tail'   of the final norm and the MTP modules
  'vocab'  of its part of embedding and head; `vocab_parallel` adds to it

After the last tick the sums of the chunks go to the ranks that hold the
masters, and statistics are summed over ranks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.ops import mtp_loss
from dsv3_jax.parallel.pipeline import instructions, stage_params

Tree = Any
State = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class GradientSums:
  """The sums of a rank, and how they grow.

  Attributes:
    chunks: parameters of each of the rank's stages.
    tail: weights of the final norm and the MTP modules.
    vocab_params: the rank's part of 'embed' and 'head'.
    scales: of `mtp_loss.loss_scales`.
    converter: sends sums of chunks to the ranks that hold the masters.
  """

  program: instructions.PipelineProgram
  chunks: list[stage_params.ChunkParams]
  tail: stage_params.StageWeights
  vocab_params: Tree
  scales: dict[str, jax.Array]
  mtp_depth: int
  num_experts: int
  converter: stage_params.MasterConverter

  def zeros(self) -> State:
    """All sums at the start of a step."""
    f32 = lambda tree: jax.tree.map(
      lambda w: jnp.zeros(w.shape, jnp.float32), tree
    )
    return {
      'grads': [f32(chunk.layers.weights) for chunk in self.chunks],
      'tail': f32(self.tail.weights),
      'vocab': f32(self.vocab_params),
      'load': [jnp.zeros_like(chunk.bias_nE) for chunk in self.chunks],
      'mtp_load': jnp.zeros((self.mtp_depth, self.num_experts), jnp.float32),
      'loss': jnp.zeros(()),
      'mtp_loss': jnp.zeros(()),
      'balance': jnp.zeros(()),
    }

  def add_grads(
    self, stage_pass: instructions.StagePass, state: State, grads: Tree
  ) -> State:
    """Adds a stage's weight gradients to its chunk's and the tail's sums."""
    sums, tail = list(state['grads']), dict(state['tail'])
    chunk = dict(sums[stage_pass.chunk])
    for name, grad in grads.items():
      target = tail if name in tail else chunk
      target[name] = jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32), target[name], grad
      )
    sums[stage_pass.chunk] = chunk
    return state | {'grads': sums, 'tail': tail}

  def add_stats(
    self, stage_pass: instructions.StagePass, state: State, stats: Tree
  ) -> State:
    """Adds the balance loss and the expert loads of a stage's forward pass."""
    kind, state = self.program.kinds[stage_pass.stage_kind], dict(state)
    state['balance'] += stats['balance'] * self.scales['balance']
    state['mtp_load'] += 0 if not kind.last else stats['mtp_load']
    loads = list(state['load'])
    if kind.num_moe:
      load_nE = loads[stage_pass.chunk]
      loads[stage_pass.chunk] = load_nE.at[: kind.num_moe].add(stats['load'])
    return state | {'load': loads}

  def finish(self, state: State) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of the masters, and losses and loads of the step."""
    grads = self.converter.to_masters(state['grads']) | state['tail']
    grads |= state['vocab']
    losses = {name: state[name] for name in ('loss', 'mtp_loss')}
    losses['balance'] = jax.lax.psum(state['balance'], stage_params.AXIS)
    return grads, losses | {
      'total': mtp_loss.total(losses, self.scales),
      'load': self.converter.sums(state['load']),
      'mtp_load': jax.lax.psum(state['mtp_load'], stage_params.AXIS),
    }
