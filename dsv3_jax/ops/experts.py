"""The routed experts' product, dropless: no token is cut at any imbalance.

  y_m = sum_k gate_mk * expert_{ids_mk}(x_m)          (TR eq. 12, routed part)

Assignments (a token and one of its experts) are sorted by expert and each
expert's rows padded to whole blocks; a loop with as many turns as there are
blocks in use multiplies one block by its expert's weights. At most
A / block + E blocks exist, however the tokens fall. The gate multiplies the
SwiGLU output before W_down, as the report's kernel does. The backward pass is
written out, so that each weight gradient is added in place, and in two loops,
so that the weights' can wait for its turn (ZB, DualPipe).

Inside a shard_map body each device can hold a part of the experts: `axes` are
the mesh axes that they are spread over, and `exchange` brings tokens to their
experts and back. The product itself knows of it only as ids of no expert here.

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

from dsv3_jax.ops import all_to_all


class Experts(NamedTuple):
  """Weights of the routed experts of one layer, or of those of one device."""

  w_gate_EDF: Float[Array, 'E D F']
  w_up_EDF: Float[Array, 'E D F']
  w_down_EFD: Float[Array, 'E F D']


class Layout(NamedTuple):
  """Where each assignment lies among the padded, sorted rows.

  Row i of the layout holds assignment `source_J` (A, out of range, if the row
  is padding); assignment a lies in row `row_A[a]` (J or more, if to no expert
  here); block j belongs to expert `expert_j`; the first `num_blocks` blocks are
  in use.
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
  axes: all_to_all.Axes = (),
  transport: str = 'auto',
) -> Float[Array, 'M D']:
  """Sum of each token's chosen experts, weighted by its gates (TR eq. 12).

  Args:
    ids_MK: distinct in a row; of all experts, also where some are elsewhere.
    experts: any float dtype; multiplied in that of x. This device's part, if
      they are spread over `axes`; so are their gradients.
    product: 'auto', 'blocks', 'ragged' or 'dense'.
    block_size: most rows of a block; few assignments take smaller blocks.
    axes, transport: as in `exchange`; for the body of a shard_map.
  """
  num_local = experts.w_up_EDF.shape[0]
  # Of an even load, which the exchange does not change.
  rows = block_rows(ids_MK.size, num_local, block_size)
  plan = all_to_all.make_plan(ids_MK, num_local, axes, transport)
  x_ID, gates_IK = all_to_all.dispatch((x_MD, gates_MK), plan)
  y_ID = multiply(x_ID, plan.ids_IK, gates_IK, experts, product, rows)
  return all_to_all.combine(y_ID, plan)


def multiply(
  x_ID: Float[Array, 'I D'],
  ids_IK: Int[Array, 'I K'],
  gates_IK: Float[Array, 'I K'],
  experts: Experts,
  product: str,
  rows: int,
) -> Float[Array, 'I D']:
  """What the experts here make of rows that may lie anyhow.

  Args:
    ids_IK: of experts here, distinct in a row; their number is none of them.
    rows: of a block.
  """
  if product == 'auto':
    product = 'blocks' if jax.default_backend() == 'cpu' else 'ragged'
  with jax.named_scope('experts'):
    if product == 'blocks' and len(x_ID) == 1:
      return _one_row(x_ID, ids_IK, gates_IK, _cast(experts, x_ID.dtype))
    if product == 'blocks':
      return _blocks(x_ID, gates_IK, experts, ids_IK, rows)
    other = {'dense': _dense, 'ragged': _ragged}[product]
    return other(x_ID, ids_IK, gates_IK, _cast(experts, x_ID.dtype))


def block_rows(num_assignments: int, num_experts: int, most: int) -> int:
  """The power of two below an expert's mean share, within [4, most].

  A few rows cost what one does: a block's time is that of reading its weights.
  """
  share = max(4, num_assignments // num_experts)
  return min(most, 1 << (share.bit_length() - 1))


def block_layout(
  ids_MK: Int[Array, 'M K'], num_experts: int, rows: int
) -> Layout:
  """Sorts assignments by expert, each expert padded to blocks of `rows`.

  Args:
    ids_MK: distinct in a row, but for `num_experts`, which is none of the
      experts here: such an assignment takes part in nothing.
  """
  ids_A = ids_MK.reshape(-1)
  total, most = ids_A.size, len(ids_MK) * _most(ids_MK.shape[1], num_experts)
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
  return Layout(
    source_J=source_J.at[sorted_row_A].set(order_A, mode='drop'),
    row_A=jnp.zeros(total, jnp.int32).at[order_A].set(sorted_row_A),
    expert_j=jnp.minimum(expert_j, num_experts - 1),
    num_blocks=ends_E[-1],
  )


def _most(top_k: int, num_experts: int) -> int:
  """Assignments of one token to experts here."""
  return min(top_k, num_experts)


def permute(
  x_MD: Shaped[Array, 'M D'], layout: Layout, top_k: int
) -> Shaped[Array, 'J D']:
  """Copies each token to the rows of its assignments; padding rows are 0."""
  token_J = layout.source_J // top_k
  return jnp.take(x_MD, token_J, axis=0, mode='fill', fill_value=0)


def unpermute(
  y_JD: Float[Array, 'J D'], layout: Layout, top_k: int, num_experts: int
) -> Float[Array, 'M D']:
  """Sums, for each token, the rows of its assignments to experts here."""
  row_MK = layout.row_A.reshape(-1, top_k)
  if num_experts < top_k:  # at most as many rows of a token are in use
    row_MK = jnp.sort(row_MK, axis=1)[:, :num_experts]
  y_MKD = jnp.take(y_JD, row_MK, axis=0, mode='fill', fill_value=0)
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
    return _put(gate_JF, gate, at), _put(up_JF, up, at), _put(y_JD, y, at)

  dim, dtype, total_rows = x_MD.shape[1], x_MD.dtype, layout.source_J.size
  buffers = (_buffer(total_rows, n, dtype) for n in (width, width, dim))
  buffers = jax.lax.fori_loop(0, layout.num_blocks, body, tuple(buffers))
  gate_JF, up_JF, y_JD = (_filled(b, dtype) for b in buffers)
  gate_JF = checkpoint_name(gate_JF, 'swiglu_in')
  up_JF = checkpoint_name(up_JF, 'swiglu_in')
  residuals = (x_MD, gates_MK, gate_JF, up_JF, masters, layout)
  return unpermute(y_JD, layout, top_k, num_experts), residuals


def _blocks_bwd(rows, residuals, dy_MD):
  """One loop for gradients of inputs, and one for those of weights."""
  x_MD, gates_MK, gate_JF, up_JF, masters, layout = residuals
  experts = _cast(masters, x_MD.dtype)
  num_experts, top_k = len(experts.w_up_EDF), gates_MK.shape[1]
  gates_J = rows_of(gates_MK.astype(x_MD.dtype), layout)
  dy_JD = permute(dy_MD, layout, top_k)
  dx_JD, dgates_J, kept = _input_gradients(
    dy_JD, gates_J, gate_JF, up_JF, experts, layout, rows
  )
  dgates_MK = gates_of(dgates_J, layout).reshape(gates_MK.shape)
  # Copied once more rather than kept: K copies of x would be the largest
  # residual of the layer, and of dy the most that its other half waits with.
  x_JD, dy_JD = permute(x_MD, layout, top_k), permute(dy_MD, layout, top_k)
  grads = _weight_gradients(x_JD, dy_JD, kept, experts, layout, rows)
  grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, masters)
  dx_MD = unpermute(dx_JD, layout, top_k, num_experts)
  return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _input_gradients(dy_JD, gates_J, gate_JF, up_JF, experts, layout, rows):
  """Of tokens and routing gates, and what the weights' gradients need."""

  def body(j, buffers):
    dx_JD, dgates_J, (dgate_JF, dup_JF, gated_JF) = buffers
    e, at = layout.expert_j[j], j * rows
    dy, gates = _slice(dy_JD, at, rows), _slice(gates_J, at, rows)[:, None]
    gate, up = _slice(gate_JF, at, rows), _slice(up_JF, at, rows)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    dgated = dy @ experts.w_down_EFD[e].T
    dhidden = dgated * gates
    dup = dhidden * silu
    dgate = dhidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dx = dgate @ experts.w_gate_EDF[e].T + dup @ experts.w_up_EDF[e].T
    dgates = jnp.sum(dgated * hidden, axis=-1).astype(dgates_J.dtype)
    dgates_J = jax.lax.dynamic_update_slice_in_dim(dgates_J, dgates, at, 0)
    kept = (
      _put(dgate_JF, dgate, at),
      _put(dup_JF, dup, at),
      _put(gated_JF, hidden * gates, at),
    )
    return _put(dx_JD, dx, at), dgates_J, kept

  dtype, total_rows = dy_JD.dtype, layout.source_J.size
  kept = (_buffer(total_rows, up_JF.shape[1], dtype),) * 3
  dgates_J = jnp.zeros(total_rows, jnp.float32)
  buffers = (_buffer(*dy_JD.shape, dtype), dgates_J, kept)
  buffers = jax.lax.fori_loop(0, layout.num_blocks, body, buffers)
  dx_JD, dgates_J, kept = buffers
  return _filled(dx_JD, dtype), dgates_J, [_filled(k, dtype) for k in kept]


def _weight_gradients(x_JD, dy_JD, kept, experts, layout, rows):
  """Each block's product is added to its expert's gradient in place, in f32."""

  def body(j, grads):
    e, at = layout.expert_j[j], j * rows
    x, dy = _slice(x_JD, at, rows), _slice(dy_JD, at, rows)
    dgate, dup, gated = (_slice(k, at, rows) for k in kept)
    return Experts(
      w_gate_EDF=_add_product(grads.w_gate_EDF, e, x, dgate),
      w_up_EDF=_add_product(grads.w_up_EDF, e, x, dup),
      w_down_EFD=_add_product(grads.w_down_EFD, e, gated, dy),
    )

  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
  return jax.lax.fori_loop(0, layout.num_blocks, body, zeros)


def _cast(experts, dtype):
  return Experts(*(w.astype(dtype) for w in experts))


def rows_of(values_MK, layout):
  """One value per assignment -> one per row; 0 on padding rows."""
  return jnp.take(
    values_MK.reshape(-1), layout.source_J, mode='fill', fill_value=0
  )


def gates_of(values_J, layout):
  """The reverse: one value per assignment; 0 for those to no expert here."""
  return jnp.take(values_J, layout.row_A, mode='fill', fill_value=0)


def _buffer(rows, columns, dtype):
  """Zeros for `_put`: BF16 as words, which XLA leaves alone.

  On CPU it makes f32 of a BF16 buffer and back, all of it every turn.
  """
  dtype = jnp.uint16 if dtype == jnp.bfloat16 else dtype
  return jnp.zeros((rows, columns), dtype)


def _put(buffer, block, start):
  """Writes rows of a `_buffer`."""
  if buffer.dtype == jnp.uint16:
    block = jax.lax.bitcast_convert_type(block, jnp.uint16)
  return jax.lax.dynamic_update_slice_in_dim(buffer, block, start, 0)


def _filled(buffer, dtype):
  """What was put into a `_buffer`."""
  if buffer.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(buffer, dtype)
  return buffer


def _slice(x, start, size):
  return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _add_product(sum_EDF, e, a_JD, b_JF):
  """sum[e] += a^T b, in f32 (for W_down, D and F change places)."""
  product = jnp.einsum(
    'jd,jf->df', a_JD, b_JF, preferred_element_type=jnp.float32
  )
  return sum_EDF.at[e].add(product)


def _one_row(x_1D, ids_1K, gates_1K, experts):
  """A single token: nothing to sort, and a product with a vector each."""
  here_K = ids_1K[0] < len(experts.w_up_EDF)
  gates_K = jnp.where(here_K, gates_1K[0], 0).astype(x_1D.dtype)

  def body(k, y_1D):
    e = ids_1K[0, k]  # that of none reads the last, and adds zeros
    gate_1F = x_1D @ experts.w_gate_EDF[e]
    hidden_1F = jax.nn.silu(gate_1F) * (x_1D @ experts.w_up_EDF[e])
    return y_1D + (hidden_1F * gates_K[k]) @ experts.w_down_EFD[e]

  zeros_1D = jnp.zeros(x_1D.shape, jnp.float32)
  y_1D = jax.lax.fori_loop(0, len(gates_K), body, zeros_1D)
  return y_1D.astype(x_1D.dtype)


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
  used = len(ids_MK) * _most(top_k, num_experts)  # blocks of 1 have no padding
  layout = layout._replace(source_J=layout.source_J[:used])
  sizes_E = jnp.bincount(ids_MK.reshape(-1), length=num_experts)
  sizes_E = sizes_E.astype(jnp.int32)
  x_AD = permute(x_MD, layout, top_k)
  gates_A = rows_of(gates_MK, layout).astype(x_MD.dtype)
  gate_AF = jax.lax.ragged_dot(x_AD, experts.w_gate_EDF, sizes_E)
  up_AF = jax.lax.ragged_dot(x_AD, experts.w_up_EDF, sizes_E)
  gate_AF = checkpoint_name(gate_AF, 'swiglu_in')
  up_AF = checkpoint_name(up_AF, 'swiglu_in')
  hidden_AF = jax.nn.silu(gate_AF) * up_AF * gates_A[:, None]
  y_AD = jax.lax.ragged_dot(hidden_AF, experts.w_down_EFD, sizes_E)
  return unpermute(y_AD, layout, top_k, num_experts)
