"""Embedding and head of a pipeline, sharded over the vocabulary on its ranks.

Each of P ranks has V / P rows of the embedding and V / P columns of the head.
In a tick in which a first or last stage runs, every rank works on all of that
stage's tokens with its part of the vocabulary. A psum over ranks then gives
the embeddings (a token's row is on one rank), the softmax, and the gradients
of hidden states.

`embed` runs before the tick's action, `head` and `embed_gradient` run after it
(`executor.TickLoop.tick`). MTP modules, which the last stage runs, read the
embeddings of later tokens: `embed` gives them when the last stage runs.

In shapes k = 1 + MTP depth: the main model, then each MTP module.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives
from dsv3_jax.nn import model
from dsv3_jax.ops import cross_entropy, mtp_loss
from dsv3_jax.parallel.pipeline import (
  activation_buffers,
  branches,
  stage_params,
)
from dsv3_jax.parallel.schedules import actions

State = dict[str, Any]


@runtime_checkable
class Vocab(Protocol):
  """Embedding and head as `executor.TickLoop` calls them.

  `VocabParallel` has a model's. Benchmarks pass others.
  """

  def embed(self, microbatches: dict) -> tuple[jax.Array, list[jax.Array]]:
    """Embeddings for the first stage and for the MTP modules of the last."""

  def embed_gradient(
    self, direction: int, microbatches: dict, state: State
  ) -> State:
    """Adds the embedding's gradients of this tick's first and last stage."""

  def head(self, direction: int, microbatch, row, state: State) -> State:
    """Adds losses and gradients of the last stage's newest output."""


@dataclasses.dataclass(frozen=True)
class VocabParallel:
  """Embedding and head on this rank's part of the vocabulary."""

  cfg: config.Config
  schedule: actions.Schedule
  params: Any
  batch_nBT: model.Batch
  scales: dict[str, jax.Array]

  @property
  def mtp_depth(self) -> int:
    return self.cfg.model.mtp.depth

  @property
  def compute(self) -> str:
    return precision.POLICIES[self.cfg.precision].compute

  @property
  def shape(self) -> tuple[int, ...]:
    _, rows, length = self.batch_nBT.tokens_BT.shape
    own = length // collectives.axis_size('context')
    return (rows, own, self.cfg.model.d_model)

  def embed(self, microbatches: dict) -> tuple[jax.Array, list[jax.Array]]:
    """Embeddings for the first stage and for the MTP modules of the last.

    On every rank, since each rank may hold a part of the rows.
    """
    with jax.named_scope('embed'):
      first = self._lookup(
        microbatches['first_f'], lambda m: [self._tokens(m)], 1
      )
      if not self.mtp_depth:
        return first[0], []
      micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
      mtp_tokens = lambda m: model.tokens_ahead(micro(m), self.mtp_depth)
      last = microbatches['last_f']
      return first[0], self._lookup(last, mtp_tokens, self.mtp_depth)

  def _tokens(self, microbatch) -> jax.Array:
    return collectives.shard_sequence(self.batch_nBT.tokens_BT[microbatch])

  def _lookup(self, microbatch, tokens_of: Callable, count: int):
    """Embeddings of the micro-batch's tokens; zeros if microbatch is -1."""
    w_VD = self.params['embed']['w']

    def lookup(_):
      rows = []
      for tokens_BT in tokens_of(microbatch):
        at, here = self._rows(tokens_BT)
        x_BTD = jnp.where(here, w_VD[at], 0.0).astype(self.compute)
        rows.append(jax.lax.psum(x_BTD, stage_params.AXIS))
      return rows

    none = [jnp.zeros(self.shape, self.compute)] * count
    return branches.when(microbatch >= 0, lookup, none)

  def _rows(self, tokens_BT):
    """Row of each token in this rank's part, and whether the part has it."""
    size = self.params['embed']['w'].shape[0]
    at_BT = tokens_BT - jax.lax.axis_index(stage_params.AXIS) * size
    here_BT = (at_BT >= 0) & (at_BT < size)
    return jnp.clip(at_BT, 0, size - 1), here_BT[..., None]

  def embed_gradient(
    self, direction: int, microbatches: dict, state: State
  ) -> State:
    """Adds the embedding's gradients of this tick's first and last stage."""
    home = self.schedule.homes[direction]
    dw_VD = state['vocab']['embed']['w']
    micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
    first, last = microbatches['first_b'], microbatches['last_b']
    pairs = [(first, home[0], self._tokens(first), state['dx'])]
    mtp_tokens = model.tokens_ahead(micro(last), self.mtp_depth)
    for tokens_BT, dx_BTD in zip(mtp_tokens, state['dmtp_x'], strict=True):
      pairs.append((last, home[-1], tokens_BT, dx_BTD))
    with jax.named_scope('embed_gradient'):
      for microbatch, rank, tokens_BT, dx_BTD in pairs:
        dx_BTD = _broadcast_from(rank, jnp.where(microbatch >= 0, dx_BTD, 0))
        at_BT, here = self._rows(tokens_BT)
        dw_VD = dw_VD.at[at_BT].add(
          jnp.where(here, dx_BTD.astype(jnp.float32), 0.0)
        )
    return state | {'vocab': state['vocab'] | {'embed': {'w': dw_VD}}}

  def head(self, direction: int, microbatch, row, state: State) -> State:
    """Adds losses and gradients of the last stage's newest output."""
    home = self.schedule.homes[direction]
    hidden_kBTD = _broadcast_from(home[-1], state['hidden'])
    batch = jax.tree.map(lambda x: x[microbatch], self.batch_nBT)
    head_DV, isolated = self.params['head']['w'], self.cfg.data.isolate_samples
    state, dhidden, dhead_DV = dict(state), [], state['vocab']['head']['w']
    for k in range(1 + self.mtp_depth):
      targets = model.loss_targets(batch, self.scales, k, isolated)
      factor = mtp_loss.weight_in_total(k, self.scales)
      loss, (dh_BTD, dw_DV) = cross_entropy.head_loss_and_grads(
        hidden_kBTD[k], head_DV, *targets
      )
      state[mtp_loss.part_name(k)] += loss
      dhidden.append((dh_BTD * factor).astype(dh_BTD.dtype))
      dhead_DV += dw_DV * factor
    slot = row[f'head_{direction}']
    state['head'] = activation_buffers.write_slot(
      state['head'], slot, jnp.stack(dhidden)
    )
    return state | {'vocab': state['vocab'] | {'head': {'w': dhead_DV}}}


def _broadcast_from(rank: int, x: jax.Array) -> jax.Array:
  """The array of one rank, on every rank."""
  here = jax.lax.axis_index(stage_params.AXIS) == rank
  return jax.lax.psum(jnp.where(here, x, 0), stage_params.AXIS)
