"""Assignments sorted by expert, in padded blocks of rows.

An assignment is a token and one of its experts. Assignments are sorted by
expert and each expert's rows padded to whole blocks, so that a block has one
expert. At most A / rows + E blocks exist, however the tokens fall.

Letters: J padded rows of all blocks, j blocks; others as in CONTRIBUTING.md.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


class ExpertBlocks(NamedTuple):
  """Where each assignment lies among the padded, sorted rows.

  Row i holds assignment `source_J` (A, out of range, if the row
  is padding); assignment a lies in row `row_A[a]` (J or more, if to no expert
  here); block j belongs to expert `expert_j`; the first `num_blocks` blocks are
  in use.
  """

  source_J: Int[Array, 'J']
  row_A: Int[Array, 'A']
  expert_j: Int[Array, 'j']
  num_blocks: Int[Array, '']


def block_rows(num_assignments: int, num_experts: int, most: int) -> int:
  """The power of two below an expert's mean share, within [4, most].

  A few rows cost what one does: a block's time is that of reading its weights.
  """
  share = max(4, num_assignments // num_experts)
  return min(most, 1 << (share.bit_length() - 1))


def make_blocks(
  ids_MK: Int[Array, 'M K'], num_experts: int, rows: int, most: int = 0
) -> ExpertBlocks:
  """Sorts assignments by expert, each expert padded to blocks of `rows`.

  Args:
    ids_MK: distinct in a row, but for `num_experts`, which is none of the
      experts here: such an assignment takes part in nothing.
    most: assignments to experts here; 0 is what M rows can have.
  """
  ids_A = ids_MK.reshape(-1)
  total, top_k = ids_A.size, ids_MK.shape[1]
  most = most or len(ids_MK) * most_here(top_k, num_experts)
  most_blocks = most // rows + num_experts
  order_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
  count_E = jnp.sum(ids_A[:, None] == jnp.arange(num_experts), axis=0)
  blocks_E = (count_E + rows - 1) // rows
  ends_E = jnp.cumsum(blocks_E)
  first_row_E = (ends_E - blocks_E) * rows
  shift_E = first_row_E - (jnp.cumsum(count_E) - count_E)
  # Past the last row for those to no expert: writes there are dropped.
  shift_A = jnp.take(
    shift_E, ids_A[order_A], mode='fill', fill_value=most_blocks * rows
  )
  sorted_row_A = (shift_A + jnp.arange(total)).astype(jnp.int32)
  source_J = jnp.full(most_blocks * rows, total, jnp.int32)
  expert_j = jnp.searchsorted(ends_E, jnp.arange(most_blocks), side='right')
  return ExpertBlocks(
    source_J=source_J.at[sorted_row_A].set(order_A, mode='drop'),
    row_A=jnp.zeros(total, jnp.int32).at[order_A].set(sorted_row_A),
    expert_j=jnp.minimum(expert_j, num_experts - 1),
    num_blocks=ends_E[-1],
  )


def most_here(top_k: int, num_experts: int) -> int:
  """Assignments of one token to experts here."""
  return min(top_k, num_experts)


def permute(
  x_MD: Shaped[Array, 'M D'], blocks: ExpertBlocks, top_k: int
) -> Shaped[Array, 'J D']:
  """Copies each token to the rows of its assignments; padding rows are 0."""
  token_J = blocks.source_J // top_k
  return jnp.take(x_MD, token_J, axis=0, mode='fill', fill_value=0)


def unpermute(
  y_JD: Float[Array, 'J D'], blocks: ExpertBlocks, top_k: int, num_experts: int
) -> Float[Array, 'M D']:
  """Sums, for each token, the rows of its assignments to experts here."""
  row_MK = blocks.row_A.reshape(-1, top_k)
  if num_experts < top_k:  # at most as many rows of a token are in use
    row_MK = jnp.sort(row_MK, axis=1)[:, :num_experts]
  y_MKD = jnp.take(y_JD, row_MK, axis=0, mode='fill', fill_value=0)
  return jnp.sum(y_MKD, axis=1)


def rows_of(values_MK, blocks):
  """One value per assignment -> one per row; 0 on padding rows."""
  return jnp.take(
    values_MK.reshape(-1), blocks.source_J, mode='fill', fill_value=0
  )


def gates_of(values_J, blocks):
  """The reverse: one value per assignment; 0 for those to no expert here."""
  return jnp.take(values_J, blocks.row_A, mode='fill', fill_value=0)
