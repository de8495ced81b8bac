"""The routed experts' product, dropless: no token is cut at any imbalance.

  y_m = sum_k gate_mk * expert_{ids_mk}(x_m)          (TR eq. 12, routed part)

Assignments (a token and one of its experts) are sorted by expert and each
expert's rows padded to whole blocks; a loop with as many turns as there are
blocks in use multiplies one block by its expert's weights. At most
A / block + E blocks exist, however the tokens fall. The gate multiplies the
SwiGLU output before W_down, as the report's kernel does. The backward pass is
written out, so that each weight gradient is added in place.

`product` chooses among equals: 'blocks' (fastest on CPU), 'ragged'
(`lax.ragged_dot`, for TPU and GPU), 'dense' (every expert on every token: the
plainest form, for checks); 'auto' is 'blocks' on CPU and 'ragged' elsewhere.
Letters: J padded rows of all blocks, j blocks; others as in the alphabet.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped


class Experts(NamedTuple):
  """Weights of all routed experts of one layer."""

  w_gate_EDF: Float[Array, 'E D F']
  w_up_EDF: Float[Array, 'E D F']
  w_down_EFD: Float[Array, 'E F D']


class Layout(NamedTuple):
  """Where each assignment lies among the padded, sorted rows.

  Row i of the layout holds assignment `source_J` (A, out of range, if the row
  is padding); assignment a lies in row `row_A[a]`; block j belongs to expert
  `expert_j`; the first `num_blocks` blocks are in use.
  """

  source_J: Int[Array, 'J']
  row_A: Int[Array, 'A']
  expert_j: Int[Array, 'j']
  num_blocks: Int[Array, '']


def expert_ffn(
  x_MD: Float[Array, 'M D'],
  ids_MK: Int[Array, 'M K'],
  gates_MK: Float[Array, 'M K'],
  experts: Experts,
  product: str,
  block_size: int,
) -> Float[Array, 'M D']:
  """Sum of each token's chosen experts, weighted by its gates (TR eq. 12).

  Args:
    experts: any float dtype; multiplied in that of x.
    product: 'auto', 'blocks', 'ragged' or 'dense'.
    block_size: most rows of a block; few assignments take smaller blocks.
  """
  if product == 'auto':
    product = 'blocks' if jax.default_backend() == 'cpu' else 'ragged'
  with jax.named_scope('experts'):
    if product == 'dense':
      return _dense(x_MD, ids_MK, gates_MK, _cast(experts, x_MD.dtype))
    if product == 'ragged':
      return _ragged(x_MD, ids_MK, gates_MK, _cast(experts, x_MD.dtype))
    rows = _block_rows(ids_MK.size, experts.w_up_EDF.shape[0], block_size)
    return _blocks(x_MD, gates_MK, experts, ids_MK, rows)


def _block_rows(num_assignments: int, num_experts: int, most: int) -> int:
  """The power of two below an expert's mean share, within [4, most].

  A few rows cost what one does: a block's time is that of reading its weights.
  """
  share = max(4, num_assignments // num_experts)
  return min(most, 1 << (share.bit_length() - 1))


def block_layout(
  ids_MK: Int[Array, 'M K'], num_experts: int, rows: int
) -> Layout:
  """Sorts assignments by expert, each expert padded to blocks of `rows`."""
  ids_A = ids_MK.reshape(-1)
  total = ids_A.size
  order_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
  count_E = jnp.sum(ids_A[:, None] == jnp.arange(num_experts), axis=0)
  blocks_E = (count_E + rows - 1) // rows
  ends_E = jnp.cumsum(blocks_E)
  first_row_E = (ends_E - blocks_E) * rows
  rank_A = jnp.arange(total) - (jnp.cumsum(count_E) - count_E)[ids_A[order_A]]
  sorted_row_A = (first_row_E[ids_A[order_A]] + rank_A).astype(jnp.int32)
  most_blocks = total // rows + num_experts
  source_J = jnp.full(most_blocks * rows, total, jnp.int32)
  expert_j = jnp.searchsorted(ends_E, jnp.arange(most_blocks), side='right')
  return Layout(
    source_J=source_J.at[sorted_row_A].set(order_A),
    row_A=jnp.zeros(total, jnp.int32).at[order_A].set(sorted_row_A),
    expert_j=jnp.minimum(expert_j, num_experts - 1),
    num_blocks=ends_E[-1],
  )


def permute(
  x_MD: Shaped[Array, 'M D'], layout: Layout, top_k: int
) -> Shaped[Array, 'J D']:
  """Copies each token to the rows of its assignments; padding rows are 0."""
  token_J = layout.source_J // top_k
  return jnp.take(x_MD, token_J, axis=0, mode='fill', fill_value=0)


def unpermute(
  y_JD: Float[Array, 'J D'], layout: Layout, top_k: int
) -> Float[Array, 'M D']:
  """Sums, for each token, the rows of its assignments."""
  y_MKD = y_JD[layout.row_A].reshape(-1, top_k, y_JD.shape[-1])
  return jnp.sum(y_MKD, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(x_MD, gates_MK, experts, ids_MK, rows):
  return _blocks_fwd(x_MD, gates_MK, experts, ids_MK, rows)[0]


def _blocks_fwd(x_MD, gates_MK, experts, ids_MK, rows):
  """One turn a block: gate, up, SwiGLU, routing gate, down."""
  masters, experts = experts, _cast(experts, x_MD.dtype)
  num_experts, _, width = experts.w_up_EDF.shape
  top_k = ids_MK.shape[1]
  layout = block_layout(ids_MK, num_experts, rows)
  x_JD = permute(x_MD, layout, top_k)
  gates_J = rows_of(gates_MK.astype(x_MD.dtype), layout)

  def body(j, buffers):
    gate_JF, up_JF, y_JD = buffers
    e, at = layout.expert_j[j], j * rows
    x = _slice(x_JD, at, rows)
    gate = x @ experts.w_gate_EDF[e]
    up = x @ experts.w_up_EDF[e]
    hidden = jax.nn.silu(gate) * up * _slice(gates_J, at, rows)[:, None]
    y = hidden @ experts.w_down_EFD[e]
    put = jax.lax.dynamic_update_slice_in_dim
    return put(gate_JF, gate, at, 0), put(up_JF, up, at, 0), put(y_JD, y, at, 0)

  total_rows = layout.source_J.size
  zeros_JF = jnp.zeros((total_rows, width), x_MD.dtype)
  buffers = (zeros_JF, zeros_JF, jnp.zeros_like(x_JD))
  buffers = jax.lax.fori_loop(0, layout.num_blocks, body, buffers)
  gate_JF, up_JF, y_JD = buffers
  gate_JF = checkpoint_name(gate_JF, 'swiglu_in')
  up_JF = checkpoint_name(up_JF, 'swiglu_in')
  residuals = (x_MD, gates_MK, gate_JF, up_JF, masters, layout)
  return unpermute(y_JD, layout, top_k), residuals


def _blocks_bwd(rows, residuals, dy_MD):
  """One turn a block; weight gradients are added to their expert's in place."""
  x_MD, gates_MK, gate_JF, up_JF, masters, layout = residuals
  experts = _cast(masters, x_MD.dtype)
  top_k = gates_MK.shape[1]
  # Copied once more rather than kept: K copies of x would be the largest
  # residual of the layer.
  x_JD, dy_JD = permute(x_MD, layout, top_k), permute(dy_MD, layout, top_k)
  gates_J = rows_of(gates_MK.astype(x_MD.dtype), layout)

  def body(j, sums):
    dx_JD, dgates_J, grads = sums
    e, at = layout.expert_j[j], j * rows
    x, gates = _slice(x_JD, at, rows), _slice(gates_J, at, rows)[:, None]
    gate, up = _slice(gate_JF, at, rows), _slice(up_JF, at, rows)
    dy = _slice(dy_JD, at, rows)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    dgated = dy @ experts.w_down_EFD[e].T
    dhidden = dgated * gates
    dup = dhidden * silu
    dgate = dhidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grads = Experts(
      w_gate_EDF=_add_product(grads.w_gate_EDF, e, x, dgate),
      w_up_EDF=_add_product(grads.w_up_EDF, e, x, dup),
      w_down_EFD=_add_product(grads.w_down_EFD, e, hidden * gates, dy),
    )
    dx = dgate @ experts.w_gate_EDF[e].T + dup @ experts.w_up_EDF[e].T
    put = jax.lax.dynamic_update_slice_in_dim
    dgates = jnp.sum(dgated * hidden, axis=-1).astype(dgates_J.dtype)
    return put(dx_JD, dx, at, 0), put(dgates_J, dgates, at, 0), grads

  grads = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
  sums = (jnp.zeros_like(x_JD), jnp.zeros(gates_J.shape, jnp.float32), grads)
  sums = jax.lax.fori_loop(0, layout.num_blocks, body, sums)
  dx_JD, dgates_J, grads = sums
  dgates_MK = dgates_J[layout.row_A].reshape(gates_MK.shape)
  grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, masters)
  dx_MD = unpermute(dx_JD, layout, top_k)
  return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _cast(experts, dtype):
  return Experts(*(w.astype(dtype) for w in experts))


def rows_of(values_MK, layout):
  """One value per assignment -> one per row; 0 on padding rows."""
  return jnp.take(
    values_MK.reshape(-1), layout.source_J, mode='fill', fill_value=0
  )


def _slice(x, start, size):
  return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _add_product(sum_EDF, e, a_JD, b_JF):
  """sum[e] += a^T b, in f32 (for W_down, D and F change places)."""
  product = jnp.einsum(
    'jd,jf->df', a_JD, b_JF, preferred_element_type=jnp.float32
  )
  return sum_EDF.at[e].add(product)


def _dense(x_MD, ids_MK, gates_MK, experts):
  """Every expert on every token, weighted by a gate that is mostly 0."""
  num_experts = experts.w_up_EDF.shape[0]
  hot_MKE = jax.nn.one_hot(ids_MK, num_experts, dtype=gates_MK.dtype)
  gates_ME = jnp.einsum('mke,mk->me', hot_MKE, gates_MK).astype(x_MD.dtype)
  gate_EMF = jnp.einsum('md,edf->emf', x_MD, experts.w_gate_EDF)
  up_EMF = jnp.einsum('md,edf->emf', x_MD, experts.w_up_EDF)
  hidden_EMF = jax.nn.silu(gate_EMF) * up_EMF * gates_ME.T[..., None]
  return jnp.einsum('emf,efd->md', hidden_EMF, experts.w_down_EFD)


def _ragged(x_MD, ids_MK, gates_MK, experts):
  """Grouped products over the sorted assignments, without padding."""
  num_experts, top_k = experts.w_up_EDF.shape[0], ids_MK.shape[1]
  layout = block_layout(ids_MK, num_experts, 1)
  order_A = layout.source_J[: ids_MK.size]
  sizes_E = jnp.bincount(ids_MK.reshape(-1), length=num_experts)
  sizes_E = sizes_E.astype(jnp.int32)
  x_AD = x_MD[order_A // top_k]
  gates_A = gates_MK.reshape(-1)[order_A].astype(x_MD.dtype)
  gate_AF = jax.lax.ragged_dot(x_AD, experts.w_gate_EDF, sizes_E)
  up_AF = jax.lax.ragged_dot(x_AD, experts.w_up_EDF, sizes_E)
  gate_AF = checkpoint_name(gate_AF, 'swiglu_in')
  up_AF = checkpoint_name(up_AF, 'swiglu_in')
  hidden_AF = jax.nn.silu(gate_AF) * up_AF * gates_A[:, None]
  y_AD = jax.lax.ragged_dot(hidden_AF, experts.w_down_EFD, sizes_E)
  return unpermute(y_AD, layout, top_k)
