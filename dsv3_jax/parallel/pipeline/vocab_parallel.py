"""Embedding and head of a pipeline, sharded over the vocabulary on its ranks.

Each of P ranks has V / P rows of the embedding and columns of the head. In a
tick in which a first or last stage runs, every rank multiplies all its tokens
by them. Ranks exchange sums only: of rows, since a token's row is on one of
them; of the parts of the softmax; of gradients of hidden states.

k counts the main model and its MTP depths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class VocabParallel:
  """Embedding and head, on this rank's part of the vocabulary."""

  cfg: config.Config
  schedule: actions.Schedule
  params: Any
  batch_nBT: model.Batch
  scales: dict[str, jax.Array]

  @property
  def depth(self) -> int:
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
    """Inputs of the first stage and, for MTP, of the last, on every rank."""
    with jax.named_scope('embed'):
      first = self._lookup(
        microbatches['first_f'], lambda m: [self._tokens(m)], 1
      )
      if not self.depth:
        return first[0], []
      micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
      ahead = lambda m: model.tokens_ahead(micro(m), self.depth)
      return first[0], self._lookup(microbatches['last_f'], ahead, self.depth)

  def _tokens(self, microbatch) -> jax.Array:
    return collectives.shard_sequence(self.batch_nBT.tokens_BT[microbatch])

  def _lookup(self, microbatch, tokens_of: Callable, count: int):
    """Embeddings of some tokens; zeros if there is no such micro-batch."""
    w_VD = self.params['embed']['w']

    def look(_):
      rows = []
      for tokens_BT in tokens_of(microbatch):
        at, here = self._rows(tokens_BT)
        x_BTD = jnp.where(here, w_VD[at], 0.0).astype(self.compute)
        rows.append(jax.lax.psum(x_BTD, stage_params.AXIS))
      return rows

    none = [jnp.zeros(self.shape, self.compute)] * count
    return branches.when(microbatch >= 0, look, none)

  def _rows(self, tokens_BT):
    """Rows in this rank's part of the embedding, and which tokens have one."""
    size = self.params['embed']['w'].shape[0]
    at_BT = tokens_BT - jax.lax.axis_index(stage_params.AXIS) * size
    here_BT = (at_BT >= 0) & (at_BT < size)
    return jnp.clip(at_BT, 0, size - 1), here_BT[..., None]

  def embed_gradient(
    self, direction: int, microbatches: dict, state: State
  ) -> State:
    """Adds the gradients that reached the embedding in this tick."""
    home = self.schedule.homes[direction]
    dw_VD = state['vocab']['embed']['w']
    micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
    first, last = microbatches['first_b'], microbatches['last_b']
    pairs = [(first, home[0], self._tokens(first), state['dx'])]
    ahead = model.tokens_ahead(micro(last), self.depth)
    for tokens_BT, dx_BTD in zip(ahead, state['dahead'], strict=True):
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
    """Losses and gradients of the newest output of the last stage."""
    home = self.schedule.homes[direction]
    hidden_kBTD = _broadcast_from(home[-1], state['hidden'])
    batch = jax.tree.map(lambda x: x[microbatch], self.batch_nBT)
    head_DV, isolated = self.params['head']['w'], self.cfg.data.isolate_samples
    state, dhidden, dhead_DV = dict(state), [], state['vocab']['head']['w']
    for k in range(1 + self.depth):
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
  """A rank's array, on every rank."""
  here = jax.lax.axis_index(stage_params.AXIS) == rank
  return jax.lax.psum(jnp.where(here, x, 0), stage_params.AXIS)
