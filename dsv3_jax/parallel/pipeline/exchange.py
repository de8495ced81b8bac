"""What goes between the ranks of a pipeline at the end of a tick.

A transfer of the program carries one payload, the newest activation or the
newest input gradient of every rank: by `ppermute` to another rank or, at the
fold of DualPipeV, to itself. All ranks take part in every tick. The table gives
the slot into which a rank writes what arrives. What no stage will read goes to
the last slot.

Buffers: 'in' holds inputs of stages. 'grad' holds gradients of their outputs,
which the next stage computed; 'head' holds those that the head computed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.pipeline import (
  activation_buffers,
  branches,
  instructions,
  stage_params,
)

State = dict[str, Any]


def empty_buffers(
  program: instructions.PipelineProgram,
  shape: tuple[int, ...],
  mtp_depth: int,
  dtype: str,
) -> State:
  """Zeros: what stages give, and where it arrives on other ranks.

  'y' and 'dx' are sent by `exchange`; 'hidden' and 'dmtp_x', of the last stage,
  are read by `vocab_parallel`.

  Args:
    shape: [B, T, D] of an activation.
    mtp_depth: number of MTP modules.
    dtype: of an activation.
  """
  slots = program.slots
  zeros = lambda *shape: jnp.zeros(shape, dtype)
  hidden = (1 + mtp_depth, *shape)
  return {
    'y': zeros(*shape),
    'hidden': zeros(*hidden),
    'dx': zeros(*shape),
    'dmtp_x': zeros(mtp_depth, *shape),
    'in': zeros(slots.get('in', 0) + 1, *shape),
    'grad': zeros(slots.get('grad', 0) + 1, *shape),
    'head': zeros(slots['head'] + 1, *hidden),
  }


def exchange(
  program: instructions.PipelineProgram, state: State, row: dict
) -> State:
  """Sends 'y' and 'dx' along all transfers and stores what arrives."""
  state, ranks = dict(state), program.schedule.ranks
  ordered = branches.after_branches(state)
  with jax.named_scope('pipeline_exchange'):
    for transfer in program.transfers:
      x = jnp.where(ordered, state[transfer.payload], 0)
      if transfer.hop:
        pairs = [(rank, (rank + transfer.hop) % ranks) for rank in range(ranks)]
        x = jax.lax.ppermute(x, stage_params.AXIS, pairs)
      buffer = instructions.BUFFERS[transfer.payload]
      state[buffer] = activation_buffers.write_slot(
        state[buffer], row[transfer], x
      )
  return state
