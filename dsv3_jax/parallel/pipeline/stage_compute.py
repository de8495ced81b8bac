"""What a rank computes in a tick: a pass through one of its stages.

A pass is a forward (F), a full backward (B), or the input or weight half of a
backward (I, W). `split_stages` traces each kind of stage once and derives the
functions of all four passes. `StageCompute` runs one of them on operands from
the rank's buffers:

  F  reads 'in' (the first stage: the embedding), writes 'y' (the last stage:
     'hidden') and saves residuals
  B  reads 'grad' (the last stage: 'head') and residuals, writes 'dx' (the last
     stage: also 'dmtp_x') and returns weight gradients
  I  reads and writes like B, but saves a carry instead of returning weight
     gradients
  W  reads the carry and returns weight gradients

The rank's row of the instruction table says which slots are read and written.
The MTP modules belong to the last stage. 'hidden' stacks the main model's
hidden states and theirs; 'dmtp_x' is the gradient of their embeddings.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
  """Stages of one kind run the same program.

  num_dense, num_moe: layers. first, last: whether it is that stage.
  """

  num_dense: int
  num_moe: int
  first: bool
  last: bool


@runtime_checkable
class Operands(Protocol):
  """What `StageCompute` reads besides activations.

  `StageOperands` has a model's. Benchmarks pass others.
  """

  program: instructions.PipelineProgram

  def weights(self, stage_pass: instructions.StagePass) -> Tree:
    """The stage's parameters."""

  def consts(self, stage_pass: instructions.StagePass, microbatch) -> tuple:
    """Inputs without gradients."""


@dataclasses.dataclass(frozen=True, eq=False)
class StageOperands:
  """What the passes read besides activations.

  Attributes:
    chunks: parameters of each of this rank's stages.
    tail: weights of the final norm and the MTP modules.
    router_biases: 'mtp' [mtp_depth, E] is used where there is MTP.
  """

  program: instructions.PipelineProgram
  chunks: list[stage_params.ChunkParams]
  tail: stage_params.StageWeights
  batch_nBT: model.Batch
  router_biases: Tree

  def weights(
    self, stage_pass: instructions.StagePass
  ) -> stage_params.StageWeights:
    """The parameters that the stage's module declares."""
    kind = self.program.kinds[stage_pass.stage_kind]
    names = [f'dense_{n}' for n in range(kind.num_dense)]
    names += [f'moe_{n}' for n in range(kind.num_moe)]
    pick = lambda tree: {name: tree[name] for name in names if name in tree}
    layers = self.chunks[stage_pass.chunk].layers
    weights = stage_params.StageWeights(*map(pick, layers))
    if kind.last:
      pairs = zip(weights, self.tail, strict=True)
      weights = stage_params.StageWeights(*(a | b for a, b in pairs))
    return weights

  def consts(self, stage_pass: instructions.StagePass, microbatch) -> tuple:
    """The micro-batch and the router biases that the stage reads."""
    kind = self.program.kinds[stage_pass.stage_kind]
    batch = jax.tree.map(
      lambda x: activation_buffers.read_slot(x, microbatch), self.batch_nBT
    )
    bias_nE = self.chunks[stage_pass.chunk].bias_nE[: kind.num_moe]
    shared = {k: v for k, v in self.router_biases.items() if k == 'mtp'}
    return batch, {'moe': bias_nE} | shared


def split_stages(
  cfg: config.Config, operands: StageOperands, shape: tuple[int, ...]
) -> dict[int, split_backward.SplitStage]:
  """The functions of every kind of stage, by its number in the program.

  Args:
    shape: [B, T, D] of an activation.
  """
  # Stages of one kind have weights of the same shapes, so one pass of each kind
  # is traced.
  passes = [x for branch in operands.program.branches for x in branch if x]
  examples = {stage_pass.stage_kind: stage_pass for stage_pass in passes}
  return {
    kind: _split_stage(cfg, operands, shape, stage_pass)
    for kind, stage_pass in examples.items()
  }


def _split_stage(cfg, operands, shape, stage_pass) -> split_backward.SplitStage:
  kind = operands.program.kinds[stage_pass.stage_kind]
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
    operands.weights(stage_pass),
    x,
    operands.consts(stage_pass, jnp.int32(0)),
    trained=lambda w: w.weights,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class StageCompute:
  """Runs the passes of a rank's stages.

  Attributes:
    operands: `StageOperands` in training.
    split_stages: the functions of each kind of stage, of `split_stages`.
    scales: of `mtp_loss.loss_scales`.
  """

  operands: Operands
  split_stages: dict[int, split_backward.StageFunctions]
  scales: dict[str, jax.Array]
  mtp_depth: int
  num_experts: int

  @property
  def program(self) -> instructions.PipelineProgram:
    return self.operands.program

  @functools.cached_property
  def residuals(self) -> activation_buffers.ActivationBuffers:
    """What F saves for B or I."""
    return activation_buffers.ActivationBuffers(
      {
        kind: split_stage.residuals
        for kind, split_stage in self.split_stages.items()
      }
    )

  @functools.cached_property
  def carry(self) -> activation_buffers.ActivationBuffers:
    """What I saves for W."""
    return activation_buffers.ActivationBuffers(
      {
        kind: split_stage.carry
        for kind, split_stage in self.split_stages.items()
      }
    )

  def empty_buffers(self) -> State:
    """Zeros for residuals, carries, and residuals of an overlapped forward."""
    slots = self.program.slots
    overlapped = any(branch.overlapped for branch in self.program.branches)
    return {
      'residuals': self.residuals.empty(slots['residuals']),
      'new_residuals': self.residuals.empty(int(overlapped)),
      'carry': self.carry.empty(slots.get('carry', 0)),
    }

  def forward(
    self,
    stage_pass: instructions.StagePass,
    embedded: Tree,
    row: dict,
    buffer: str,
    state: State,
  ) -> tuple[State, Tree]:
    """F: the new state, and statistics of balance and loads.

    Args:
      embedded: of each direction, `VocabParallel.embed`'s inputs of the first
        stage and of the MTP modules.
      buffer: where residuals go: 'residuals' or, if the forward is overlapped
        with a backward, 'new_residuals'.
    """
    kind = self.program.kinds[stage_pass.stage_kind]
    direction = row['f_direction']
    x = activation_buffers.read_slot(state['in'], row['f_in'])
    if kind.first:
      x = jnp.stack([x for x, _ in embedded])[direction]
    mtp_x = []
    if kind.last and self.mtp_depth:
      mtp_x = list(jnp.stack([jnp.stack(xs) for _, xs in embedded])[direction])
    consts = self.operands.consts(stage_pass, row['f_microbatch'])
    with jax.named_scope('forward'):
      y, stats, residuals = self.split_stages[stage_pass.stage_kind].forward(
        self.operands.weights(stage_pass), (x, mtp_x), consts
      )
    state = state | {'hidden' if kind.last else 'y': y}
    slot = row['f_residuals'] if buffer == 'residuals' else jnp.int32(0)
    state[buffer] = self.residuals.put(
      state[buffer], stage_pass.stage_kind, slot, residuals
    )
    return state, stats

  def save_new_residuals(self, state: State, row: dict) -> State:
    """Puts residuals of an overlapped forward in their slot.

    The overlapped branch cannot do so itself: its backward reads the same
    buffers, so the compiler would copy them.
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
    self, stage_pass: instructions.StagePass, row: dict, state: State
  ) -> tuple[State, Tree | None]:
    """B, I or W: the new state, and weight gradients (None after I)."""
    kind = self.program.kinds[stage_pass.stage_kind]
    split_stage = self.split_stages[stage_pass.stage_kind]
    weights, state = self.operands.weights(stage_pass), dict(state)
    late = lambda xs: [branches.depend_on(x, row['iteration']) for x in xs]
    if stage_pass.action_kind == 'W':
      with jax.named_scope('backward_weight'):
        carry = self.carry.take(
          state['carry'], stage_pass.stage_kind, row['b_carry']
        )
        return state, split_stage.backward_weight(weights, late(carry))
    dy = activation_buffers.read_slot(
      state['head' if kind.last else 'grad'], row['b_grad']
    )
    dstats = self._stats_gradient(kind)
    residuals = late(
      self.residuals.take(
        state['residuals'], stage_pass.stage_kind, row['b_residuals']
      )
    )
    grads = None
    if stage_pass.action_kind == 'I':
      with jax.named_scope('backward_input'):
        dx, carry = split_stage.backward_input(weights, residuals, dy, dstats)
      state['carry'] = self.carry.put(
        state['carry'], stage_pass.stage_kind, row['b_carry'], carry
      )
    else:
      with jax.named_scope('backward'):
        dx, grads = split_stage.backward(weights, residuals, dy, dstats)
    state['dx'], dmtp_x = dx
    if kind.last and self.mtp_depth:
      state['dmtp_x'] = jnp.stack(dmtp_x)
    return state, grads

  def _stats_gradient(self, kind: StageKind) -> Tree:
    """Gradients of a stage's statistics; zero for loads."""
    zeros = lambda n: jnp.zeros((n, self.num_experts), jnp.float32)
    return {
      'balance': self.scales['balance'],
      'load': zeros(kind.num_moe),
      'mtp_load': zeros(self.mtp_depth if kind.last else 0),
    }
