"""Products of the experts of this device, in the precision of the tokens.

  y_i = sum_k gate_ik * expert_{ids_ik}(x_i)          (TR eq. 12, routed part)

`multiply` chooses among equals: 'blocks' (fastest on CPU), 'ragged'
(`lax.ragged_dot`, for TPU and GPU), 'dense' (every expert on every token: the
plainest form, for checks); 'auto' is 'blocks' on CPU and 'ragged' elsewhere.

'blocks' is a loop with as many iterations as there are blocks in use, each of
which multiplies one block by its expert's weights. Its backward pass is written
out, so that each weight gradient is added in place, and in two loops, so that
the weights' can be deferred (ZB, DualPipe). The gate multiplies the SwiGLU
output before W_down, as the report's kernel does.

Letters: I rows received, J padded rows of all blocks, j blocks; others as in
the alphabet.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import expert_blocks


class Experts(NamedTuple):
  """Weights of the routed experts of one layer, or of those of one device."""

  w_gate_EDF: Float[Array, 'E D F']
  w_up_EDF: Float[Array, 'E D F']
  w_down_EFD: Float[Array, 'E F D']


def multiply(
  x_ID: Float[Array, 'I D'],
  ids_IK: Int[Array, 'I K'],
  gates_IK: Float[Array, 'I K'],
  experts: Experts,
  product: str,
  rows: int,
  most: int = 0,
) -> Float[Array, 'I D']:
  """The experts here, applied to rows in any order.

  Args:
    ids_IK: of experts here, distinct in a row; their number is none of them.
    rows: of a block.
    most: assignments to experts here; 0 is what I rows can have.
  """
  if product == 'auto':
    product = 'blocks' if jax.default_backend() == 'cpu' else 'ragged'
  with jax.named_scope('experts'):
    if product == 'blocks' and len(x_ID) == 1:
      return _one_row(x_ID, ids_IK, gates_IK, _cast(experts, x_ID.dtype))
    if product == 'blocks':
      return _blocks(x_ID, gates_IK, experts, ids_IK, rows, most)
    experts = _cast(experts, x_ID.dtype)
    if product == 'dense':
      return _dense(x_ID, ids_IK, gates_IK, experts)
    return _ragged(x_ID, ids_IK, gates_IK, experts, most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocks(x_MD, gates_MK, experts, ids_MK, rows, most):
  return _blocks_fwd(x_MD, gates_MK, experts, ids_MK, rows, most)[0]


def _blocks_fwd(x_MD, gates_MK, experts, ids_MK, rows, most):
  """One iteration a block: gate, up, SwiGLU, routing gate, down."""
  masters, experts = experts, _cast(experts, x_MD.dtype)
  num_experts, _, width = experts.w_up_EDF.shape
  top_k = ids_MK.shape[1]
  blocks = expert_blocks.make_blocks(ids_MK, num_experts, rows, most)
  x_JD = expert_blocks.permute(x_MD, blocks, top_k)
  gates_J = expert_blocks.rows_of(gates_MK.astype(x_MD.dtype), blocks)

  def body(j, buffers):
    gate_JF, up_JF, y_JD = buffers
    e, at = blocks.expert_j[j], j * rows
    x = _slice(x_JD, at, rows)
    gate = x @ experts.w_gate_EDF[e]
    up = x @ experts.w_up_EDF[e]
    hidden = jax.nn.silu(gate) * up * _slice(gates_J, at, rows)[:, None]
    y = hidden @ experts.w_down_EFD[e]
    return _put(gate_JF, gate, at), _put(up_JF, up, at), _put(y_JD, y, at)

  dim, dtype, total_rows = x_MD.shape[1], x_MD.dtype, blocks.source_J.size
  buffers = (_buffer(total_rows, n, dtype) for n in (width, width, dim))
  buffers = jax.lax.fori_loop(0, blocks.num_blocks, body, tuple(buffers))
  gate_JF, up_JF, y_JD = (_filled(b, dtype) for b in buffers)
  gate_JF = checkpoint_name(gate_JF, 'swiglu_in')
  up_JF = checkpoint_name(up_JF, 'swiglu_in')
  residuals = (x_MD, gates_MK, gate_JF, up_JF, masters, blocks)
  return expert_blocks.unpermute(y_JD, blocks, top_k, num_experts), residuals


def _blocks_bwd(rows, most, residuals, dy_MD):
  """One loop for gradients of inputs, and one for those of weights."""
  del most
  x_MD, gates_MK, gate_JF, up_JF, masters, blocks = residuals
  experts = _cast(masters, x_MD.dtype)
  num_experts, top_k = len(experts.w_up_EDF), gates_MK.shape[1]
  gates_J = expert_blocks.rows_of(gates_MK.astype(x_MD.dtype), blocks)
  dy_JD = expert_blocks.permute(dy_MD, blocks, top_k)
  dx_JD, dgates_J, saved = _input_gradients(
    dy_JD, gates_J, gate_JF, up_JF, experts, blocks, rows
  )
  dgates_MK = expert_blocks.gates_of(dgates_J, blocks).reshape(gates_MK.shape)
  # Permuted again rather than saved: K copies of x would be the largest
  # residual of the layer, and those of dy the largest that a deferred weight
  # gradient holds.
  x_JD, dy_JD = (
    expert_blocks.permute(x_MD, blocks, top_k),
    expert_blocks.permute(dy_MD, blocks, top_k),
  )
  grads = _weight_gradients(x_JD, dy_JD, saved, experts, blocks, rows)
  grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, masters)
  dx_MD = expert_blocks.unpermute(dx_JD, blocks, top_k, num_experts)
  return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _input_gradients(dy_JD, gates_J, gate_JF, up_JF, experts, blocks, rows):
  """Of tokens and routing gates, and what the weights' gradients need."""

  def body(j, buffers):
    dx_JD, dgates_J, (dgate_JF, dup_JF, gated_JF) = buffers
    e, at = blocks.expert_j[j], j * rows
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
    saved = (
      _put(dgate_JF, dgate, at),
      _put(dup_JF, dup, at),
      _put(gated_JF, hidden * gates, at),
    )
    return _put(dx_JD, dx, at), dgates_J, saved

  dtype, total_rows = dy_JD.dtype, blocks.source_J.size
  saved = (_buffer(total_rows, up_JF.shape[1], dtype),) * 3
  dgates_J = jnp.zeros(total_rows, jnp.float32)
  buffers = (_buffer(*dy_JD.shape, dtype), dgates_J, saved)
  buffers = jax.lax.fori_loop(0, blocks.num_blocks, body, buffers)
  dx_JD, dgates_J, saved = buffers
  return _filled(dx_JD, dtype), dgates_J, [_filled(k, dtype) for k in saved]


def _weight_gradients(x_JD, dy_JD, saved, experts, blocks, rows):
  """Each block's product is added to its expert's gradient in place, in f32."""

  def body(j, grads):
    e, at = blocks.expert_j[j], j * rows
    x, dy = _slice(x_JD, at, rows), _slice(dy_JD, at, rows)
    dgate, dup, gated = (_slice(k, at, rows) for k in saved)
    return Experts(
      w_gate_EDF=_add_product(grads.w_gate_EDF, e, x, dgate),
      w_up_EDF=_add_product(grads.w_up_EDF, e, x, dup),
      w_down_EFD=_add_product(grads.w_down_EFD, e, gated, dy),
    )

  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
  return jax.lax.fori_loop(0, blocks.num_blocks, body, zeros)


def _cast(experts, dtype):
  return Experts(*(w.astype(dtype) for w in experts))


def _buffer(rows, columns, dtype):
  """Zeros for `_put`: BF16 as words, which XLA leaves alone.

  On CPU it makes f32 of a BF16 buffer and back, all of it in every iteration.
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


def _ragged(x_MD, ids_MK, gates_MK, experts, most):
  """Grouped products over the sorted assignments, without padding."""
  num_experts, top_k = experts.w_up_EDF.shape[0], ids_MK.shape[1]
  blocks = expert_blocks.make_blocks(ids_MK, num_experts, 1, most)
  # Blocks of one row have no padding.
  used = len(blocks.source_J) - num_experts
  blocks = blocks._replace(source_J=blocks.source_J[:used])
  sizes_E = jnp.bincount(ids_MK.reshape(-1), length=num_experts)
  sizes_E = sizes_E.astype(jnp.int32)
  x_AD = expert_blocks.permute(x_MD, blocks, top_k)
  gates_A = expert_blocks.rows_of(gates_MK, blocks).astype(x_MD.dtype)
  gate_AF = jax.lax.ragged_dot(x_AD, experts.w_gate_EDF, sizes_E)
  up_AF = jax.lax.ragged_dot(x_AD, experts.w_up_EDF, sizes_E)
  gate_AF = checkpoint_name(gate_AF, 'swiglu_in')
  up_AF = checkpoint_name(up_AF, 'swiglu_in')
  hidden_AF = jax.nn.silu(gate_AF) * up_AF * gates_A[:, None]
  y_AD = jax.lax.ragged_dot(hidden_AF, experts.w_down_EFD, sizes_E)
  return expert_blocks.unpermute(y_AD, blocks, top_k, num_experts)
