"""What a rank computes in a tick: a pass through one of its stages.

A pass is a forward (F), a full backward (B), or the input or weight half of a
backward (I, W). `split_stages` makes these functions once for each kind of
stage, from one trace of it. `StageCompute` runs one of them on operands out of
the rank's buffers:

  F  reads 'in' (the first stage: the embedding), writes 'y' or, of the last
     stage, 'hidden', and saves residuals
  B  reads 'grad' (the last stage: 'head') and residuals, writes 'dx' and, of
     the last stage, 'dahead'; returns weight gradients
  I  likewise, but saves a carry in place of weight gradients
  W  reads the carry; returns weight gradients

Which slots are meant is in the rank's row of the instruction table.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.nn import model
from dsv3_jax.nn import stage as stages
from dsv3_jax.parallel.pipeline import (
  activation_buffers,
  branches,
  instructions,
  split_backward,
  stage_params,
)

Tree = Any
State = dict[str, Any]


class StageKind(NamedTuple):
  """What distinguishes the program of one stage from that of another."""

  num_dense: int
  num_moe: int
  first: bool
  last: bool


@dataclasses.dataclass(frozen=True, eq=False)
class StageOperands:
  """What the passes read besides activations.

  chunks: parameters of each of this rank's stages. tail: weights of the final
  norm and the MTP modules. router: `{'mtp': [depth, E]}` where there is MTP.
  """

  program: instructions.PipelineProgram
  chunks: list[stage_params.ChunkParams]
  tail: stage_params.StageWeights
  batch_nBT: model.Batch
  router: Tree

  def weights(self, half: instructions.StagePass) -> stage_params.StageWeights:
    """What the stage's module declares, out of its chunk."""
    kind = self.program.kinds[half.kind]
    names = [f'dense_{n}' for n in range(kind.num_dense)]
    names += [f'moe_{n}' for n in range(kind.num_moe)]
    pick = lambda tree: {name: tree[name] for name in names if name in tree}
    layers = self.chunks[half.chunk].layers
    weights = stage_params.StageWeights(*map(pick, layers))
    if kind.last:
      pairs = zip(weights, self.tail, strict=True)
      weights = stage_params.StageWeights(*(a | b for a, b in pairs))
    return weights

  def consts(self, half: instructions.StagePass, microbatch) -> tuple:
    """Batch and router biases that a stage reads."""
    kind = self.program.kinds[half.kind]
    batch = jax.tree.map(
      lambda x: activation_buffers.read_slot(x, microbatch), self.batch_nBT
    )
    router = {'moe': self.chunks[half.chunk].bias_nE[: kind.num_moe]}
    return batch, router | {k: v for k, v in self.router.items() if k == 'mtp'}


def split_stages(
  cfg: config.Config, operands: StageOperands, shape: tuple[int, ...]
) -> dict[int, split_backward.SplitStage]:
  """The functions of every kind of stage, by its number in the program.

  Args:
    shape: [B, T, D] of an activation.
  """
  # One pass of each kind stands for all: weights have the same shapes.
  passes = [half for branch in operands.program.branches for half in branch]
  examples = {half.kind: half for half in passes if half is not None}
  return {
    kind: _split_stage(cfg, operands, shape, half)
    for kind, half in examples.items()
  }


def _split_stage(cfg, operands, shape, half) -> split_backward.SplitStage:
  kind = operands.program.kinds[half.kind]
  policy = precision.POLICIES[cfg.precision]
  net = stages.PipelineStage(
    cfg.model,
    cfg.balance,
    policy,
    cfg.data.isolate_samples,
    kind.num_dense,
    kind.num_moe,
    kind.last,
  )

  def run(w, x, consts):
    variables = {'params': w.weights}
    if w.quantized:
      variables['quantized'] = w.quantized
    return net.apply(variables, *x, *consts)

  x_BTD = jnp.zeros(shape, policy.compute)
  x = (x_BTD, [x_BTD] * cfg.model.mtp.depth if kind.last else [])
  return split_backward.split_stage(
    run,
    operands.weights(half),
    x,
    operands.consts(half, jnp.int32(0)),
    trained=lambda w: w.weights,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class StageCompute:
  """Runs the passes of a rank's stages.

  operands: `StageOperands` or a stand-in. parts: the functions of each kind, as
  of `split_stages`. scales: of `mtp_loss.loss_scales`.
  """

  operands: Any
  parts: dict[int, Any]
  scales: dict[str, jax.Array]
  depth: int
  num_experts: int

  @property
  def program(self) -> instructions.PipelineProgram:
    return self.operands.program

  @functools.cached_property
  def residuals(self) -> activation_buffers.ActivationBuffers:
    """What F saves for B or I."""
    return activation_buffers.ActivationBuffers(
      {kind: part.residuals for kind, part in self.parts.items()}
    )

  @functools.cached_property
  def carry(self) -> activation_buffers.ActivationBuffers:
    """What I saves for W."""
    return activation_buffers.ActivationBuffers(
      {kind: part.carry for kind, part in self.parts.items()}
    )

  def empty_buffers(self) -> State:
    """Residuals, those of an overlapped forward, and carries."""
    slots = self.program.slots
    overlapped = any(branch.overlapped for branch in self.program.branches)
    return {
      'residuals': self.residuals.empty(slots['residuals']),
      'new_residuals': self.residuals.empty(int(overlapped)),
      'carry': self.carry.empty(slots.get('carry', 0)),
    }

  def forward(
    self,
    half: instructions.StagePass,
    embedded: Tree,
    row: dict,
    buffer: str,
    state: State,
  ) -> tuple[State, Tree]:
    """F: the new state, and statistics of balance and loads.

    Args:
      embedded: inputs of the first and the last stage, of each direction.
      buffer: 'residuals', or 'new_residuals' beside a backward pass.
    """
    kind = self.program.kinds[half.kind]
    direction = row['f_direction']
    x = activation_buffers.read_slot(state['in'], row['f_in'])
    if kind.first:
      x = jnp.stack([x for x, _ in embedded])[direction]
    ahead = []
    if kind.last and self.depth:
      ahead = list(jnp.stack([jnp.stack(a) for _, a in embedded])[direction])
    consts = self.operands.consts(half, row['f_microbatch'])
    with jax.named_scope('forward'):
      y, stats, residuals = self.parts[half.kind].forward(
        self.operands.weights(half), (x, ahead), consts
      )
    state = state | {'hidden' if kind.last else 'y': y}
    slot = row['f_residuals'] if buffer == 'residuals' else jnp.int32(0)
    state[buffer] = self.residuals.put(
      state[buffer], half.kind, slot, residuals
    )
    return state, stats

  def save_new_residuals(self, state: State, row: dict) -> State:
    """Puts residuals of an overlapped forward in their slot.

    In the overlapped pass itself the buffers would be copied as a whole, since
    its backward reads them.
    """
    overlapped = [branch.overlapped for branch in self.program.branches]
    if not any(overlapped):
      return state

    def save(state):
      residuals = {
        name: activation_buffers.write_slot(
          buffer, row['f_residuals'], state['new_residuals'][name][0]
        )
        for name, buffer in state['residuals'].items()
      }
      return state | {'residuals': residuals}

    taken = jnp.array(overlapped)[row['branch']]
    return branches.when(taken & branches.after_branches(state), save, state)

  def backward(
    self, half: instructions.StagePass, row: dict, state: State
  ) -> tuple[State, Tree | None]:
    """B, I or W: the new state, and weight gradients (None after I)."""
    kind, parts = self.program.kinds[half.kind], self.parts[half.kind]
    weights, state = self.operands.weights(half), dict(state)
    late = lambda xs: [branches.depend_on(x, row['turn']) for x in xs]
    if half.part == 'W':
      with jax.named_scope('backward_weight'):
        carry = self.carry.take(state['carry'], half.kind, row['b_carry'])
        return state, parts.backward_weight(weights, late(carry))
    dy = activation_buffers.read_slot(
      state['head' if kind.last else 'grad'], row['b_grad']
    )
    dstats = self._stats_gradient(kind)
    residuals = late(
      self.residuals.take(state['residuals'], half.kind, row['b_residuals'])
    )
    grads = None
    if half.part == 'I':
      with jax.named_scope('backward_input'):
        dx, carry = parts.backward_input(weights, residuals, dy, dstats)
      state['carry'] = self.carry.put(
        state['carry'], half.kind, row['b_carry'], carry
      )
    else:
      with jax.named_scope('backward'):
        dx, grads = parts.backward(weights, residuals, dy, dstats)
    state['dx'], dahead = dx
    if kind.last and self.depth:
      state['dahead'] = jnp.stack(dahead)
    return state, grads

  def _stats_gradient(self, kind: StageKind) -> Tree:
    """Gradients of a stage's statistics: only the balance loss counts."""
    zeros = lambda n: jnp.zeros((n, self.num_experts), jnp.float32)
    return {
      'balance': self.scales['balance'],
      'load': zeros(kind.num_moe),
      'mtp_load': zeros(self.depth if kind.last else 0),
    }
