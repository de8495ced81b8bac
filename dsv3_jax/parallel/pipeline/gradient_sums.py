"""Sums over a step's micro-batches: gradients, losses, expert loads.

A rank adds up, in f32 and in place, the weight gradients of its chunks
('grads'), of the final norm and the MTP modules ('tail'), and of its part of
embedding and head ('vocab', which `vocab_parallel` adds to). After the last
tick the chunks' sums go to the ranks that hold the masters, and statistics are
summed over ranks.
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
  """What a rank sums up.

  chunks: parameters of each of its stages. tail: likewise, of the final norm
  and the MTP modules. vocab_params: its part of 'embed' and 'head'. converter:
  brings sums to their masters; scales: of `mtp_loss.loss_scales`.
  """

  program: instructions.PipelineProgram
  chunks: list[stage_params.ChunkParams]
  tail: stage_params.StageWeights
  vocab_params: Tree
  scales: dict[str, jax.Array]
  depth: int
  num_experts: int
  converter: stage_params.MasterConverter | None = None

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
      'mtp_load': jnp.zeros((self.depth, self.num_experts), jnp.float32),
      'loss': jnp.zeros(()),
      'mtp_loss': jnp.zeros(()),
      'balance': jnp.zeros(()),
    }

  def add_grads(
    self, half: instructions.StagePass, state: State, grads: Tree
  ) -> State:
    """Adds a stage's weight gradients to its chunk's and the tail's sums."""
    sums, tail = list(state['grads']), dict(state['tail'])
    chunk = dict(sums[half.chunk])
    for name, grad in grads.items():
      target = tail if name in tail else chunk
      target[name] = jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32), target[name], grad
      )
    sums[half.chunk] = chunk
    return state | {'grads': sums, 'tail': tail}

  def add_stats(
    self, half: instructions.StagePass, state: State, stats: Tree
  ) -> State:
    """Adds what a stage's forward pass says of its balance and its loads."""
    kind, state = self.program.kinds[half.kind], dict(state)
    state['balance'] += stats['balance'] * self.scales['balance']
    state['mtp_load'] += 0 if not kind.last else stats['mtp_load']
    loads = list(state['load'])
    if kind.num_moe:
      at = loads[half.chunk].at[: kind.num_moe]
      loads[half.chunk] = at.add(stats['load'])
    return state | {'load': loads}

  def finish(self, state: State) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of the masters, and the parts of the loss."""
    grads = self.converter.to_masters(state['grads']) | state['tail']
    grads |= state['vocab']
    parts = {name: state[name] for name in ('loss', 'mtp_loss')}
    parts['balance'] = jax.lax.psum(state['balance'], stage_params.AXIS)
    return grads, parts | {
      'total': mtp_loss.total(parts, self.scales),
      'load': self.converter.sums(state['load']),
      'mtp_load': jax.lax.psum(state['mtp_load'], stage_params.AXIS),
    }
