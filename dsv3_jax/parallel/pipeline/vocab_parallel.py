"""Embedding and head of a pipeline, cut over the vocabulary on its ranks.

Every rank has V / R rows of the table and columns of the head, and works on all
tokens with them in the tick in which a first or last stage runs. What a rank
needs of the others is a sum over ranks: of rows, since a token's row is on one
of them; of the softmax's parts; of gradients of hidden states.

Letters: d directions, k the main model and its MTP depths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives
from dsv3_jax.nn import model
from dsv3_jax.ops import cross_entropy
from dsv3_jax.parallel.pipeline import stage_params
from dsv3_jax.parallel.schedules import actions

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ends:
  """The work of both ends, on this rank's part of the vocabulary."""

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

  def embed(self, told) -> tuple[jax.Array, list[jax.Array]]:
    """Inputs of the first stage and, for MTP, of the last, on every rank."""
    with jax.named_scope('embed'):
      first = self._lookup(told['first_f'], lambda m: [self._tokens(m)], 1)
      if not self.depth:
        return first[0], []
      micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
      ahead = lambda m: model.tokens_ahead(micro(m), self.depth)
      return first[0], self._lookup(told['last_f'], ahead, self.depth)

  def _tokens(self, microbatch) -> jax.Array:
    return collectives.shard_sequence(self.batch_nBT.tokens_BT[microbatch])

  def _lookup(self, microbatch, tokens_of: Callable, count: int):
    """Rows of the table for some tokens, if there is such a micro-batch."""
    w_VD = self.params['embed']['w']

    def look(_):
      rows = []
      for tokens_BT in tokens_of(microbatch):
        at, here = self._rows(tokens_BT)
        x_BTD = jnp.where(here, w_VD[at], 0.0).astype(self.compute)
        rows.append(jax.lax.psum(x_BTD, stage_params.AXIS))
      return rows

    none = [jnp.zeros(self.shape, self.compute)] * count
    return when(microbatch >= 0, look, none)

  def _rows(self, tokens_BT):
    """Rows of this rank's part of the table, and which tokens are in it."""
    size = self.params['embed']['w'].shape[0]
    at_BT = tokens_BT - jax.lax.axis_index(stage_params.AXIS) * size
    here_BT = (at_BT >= 0) & (at_BT < size)
    return jnp.clip(at_BT, 0, size - 1), here_BT[..., None]

  def embed_gradient(self, way: int, told, state: State) -> State:
    """Adds the gradients that reached the embedding in this tick."""
    home = self.schedule.homes[way]
    dw_VD = state['ends']['embed']['w']
    micro = lambda m: jax.tree.map(lambda x: x[m], self.batch_nBT)
    first, last = told['first_b'], told['last_b']
    pairs = [(first, home[0], self._tokens(first), state['dx'])]
    ahead = model.tokens_ahead(micro(last), self.depth)
    for tokens_BT, dx_BTD in zip(ahead, state['dahead'], strict=True):
      pairs.append((last, home[-1], tokens_BT, dx_BTD))
    with jax.named_scope('embed_gradient'):
      for microbatch, rank, tokens_BT, dx_BTD in pairs:
        dx_BTD = _from(rank, jnp.where(microbatch >= 0, dx_BTD, 0))
        at_BT, here = self._rows(tokens_BT)
        dw_VD = dw_VD.at[at_BT].add(
          jnp.where(here, dx_BTD.astype(jnp.float32), 0.0)
        )
    return state | {'ends': state['ends'] | {'embed': {'w': dw_VD}}}

  def head(self, way: int, microbatch, row, state: State) -> State:
    """Loss and gradients of what the last stage has just made."""
    home = self.schedule.homes[way]
    hidden_kBTD = _from(home[-1], state['hidden'])
    batch = jax.tree.map(lambda x: x[microbatch], self.batch_nBT)
    head_DV, isolated = self.params['head']['w'], self.cfg.data.isolate_samples
    state, dhidden, dhead_DV = dict(state), [], state['ends']['head']['w']
    for k in range(1 + self.depth):
      if k:
        targets = model.mtp_targets(batch, self.scales, k, isolated)
        factor, name = self.scales['mtp_weight'], 'mtp_loss'
      else:
        targets = model.main_targets(batch, self.scales)
        factor, name = 1.0, 'loss'
      loss, (dh_BTD, dw_DV) = cross_entropy.head_loss_and_grads(
        hidden_kBTD[k], head_DV, *targets
      )
      state[name] += loss
      dhidden.append((dh_BTD * factor).astype(dh_BTD.dtype))
      dhead_DV += dw_DV * factor
    slot = row[f'head_{way}']
    state['head'] = put(state['head'], slot, jnp.stack(dhidden))
    return state | {'ends': state['ends'] | {'head': {'w': dhead_DV}}}


def when(condition, act: Callable[[Any], Any], state: Any) -> Any:
  """`act(state)` if the condition holds, in place; else the state."""
  turns = condition.astype(jnp.int32)
  return jax.lax.fori_loop(0, turns, lambda _, state: act(state), state)


def _from(rank: int, x: jax.Array) -> jax.Array:
  """What a rank has, on every rank."""
  here = jax.lax.axis_index(stage_params.AXIS) == rank
  return jax.lax.psum(jnp.where(here, x, 0), stage_params.AXIS)


def take(buffer: jax.Array, slot: jax.Array) -> jax.Array:
  """What is in a slot; slots count from the front, so nothing need wrap."""
  return jax.lax.dynamic_index_in_dim(
    buffer, slot, keepdims=False, allow_negative_indices=False
  )


def put(buffer: jax.Array, slot: jax.Array, x: jax.Array) -> jax.Array:
  """The buffer with x in a slot."""
  return jax.lax.dynamic_update_index_in_dim(
    buffer, x, slot, 0, allow_negative_indices=False
  )
