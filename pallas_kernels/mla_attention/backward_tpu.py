"""Gradients of MLA's attention on TPUs, through Pallas and Mosaic.

Two kernels, both from q, k, v and two numbers a query: its log-sum-exp and
delta (reference.py). Both recompute the scores, so that nothing as large as
T x S is in memory, and sum their gradients in VMEM: no atomics, so that the
result is deterministic.

- keys: a grid over sequences, blocks of keys, heads and blocks of queries. The
  scores stand with keys in sublanes, queries in lanes: products for dk and dv
  need no transposition, and a query's numbers are the rows that they come as.
  Heads are in the sequential part, inside a block of keys: the gradient of the
  rotary key, which all heads share, is summed in f32 in VMEM. Partial sums in
  memory would be [B, N, T, R] in f32, 134 MB for 4,096 tokens and 128 heads.
- queries: the forward kernel's grid, with dq in place of o.

Letters: as in pallas_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax, tpu
from pallas_kernels.mla_attention import pallas_tpu as forwards


def backward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
  lse_BNT: Float[Array, 'B N T'],
  delta_BNT: Float[Array, 'B N T'],
  do_BTNU: Float[Array, 'B T N U'],
  *,
  blocks: forwards.BlockSizes | None = None,
  interpret=False,
) -> tuple[Array, Array, Array, Array]:
  """Gradients of q, k_nope, k_rope and v; see `reference.backward`.

  Args:
    blocks: None: `pallas_tpu.choose_blocks`.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  length = q_BTNX.shape[1]
  blocks = blocks or forwards.choose_blocks(length)
  in_lanes = lambda x_BNT: forwards.pad(x_BNT, 2, blocks)[:, :, None]
  args = (
    *forwards.operands(
      q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT, blocks
    ),
    # Padding: zero queries have zero scores, and their gradient is zero.
    forwards.heads_first(do_BTNU, blocks),
    in_lanes(lse_BNT * softmax.LOG2_E),
    in_lanes(delta_BNT),
  )
  options = {'scale': scale, 'blocks': blocks, 'interpret': interpret}
  dk_nope_BNSH, dk_rope_BSR, dv_BNSU = _of_keys(args, **options)
  dq_BNTX = _of_queries(args, **options)
  return (
    forwards.tokens_first(dq_BNTX, length),
    forwards.tokens_first(dk_nope_BNSH, length),
    dk_rope_BSR[:, :length],
    forwards.tokens_first(dv_BNSU, length),
  )


def _of_queries(args, *, scale, blocks, interpret):
  """dq, heads first."""
  batch, heads, padded, width = args[0].shape
  query = lambda b, n, i, j: (b, n, i)
  key = lambda b, n, i, j: (b, n, jnp.minimum(j, blocks.last_key(i)))
  column = functools.partial(pltpu.VMEM, (blocks.queries, 1))
  return pl.pallas_call(
    functools.partial(_kernel_of_queries, scale=scale, blocks=blocks),
    out_shape=jax.ShapeDtypeStruct(args[0].shape, args[0].dtype),
    grid=(batch, heads, padded // blocks.queries, padded // blocks.keys),
    in_specs=_specs(args, blocks, query, key),
    out_specs=forwards.of_head(blocks.queries, width, query),
    scratch_shapes=[
      column(jnp.int32),
      column(jnp.float32),
      column(jnp.float32),
      pltpu.VMEM((blocks.queries, width), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=forwards.cost(args[:6], products=2, of_values=1),
    interpret=interpret,
    name='mla_attention_dq',
  )(*args)


def _kernel_of_queries(
  q_TX,
  k_nope_SH,
  k_rope_SR,
  v_SU,
  segments_1T,
  segments_1S,
  do_TU,
  lse_1T,
  delta_1T,
  dq_TX,
  segments_T1,
  lse_T1,
  delta_T1,
  sum_TX,
  *,
  scale,
  blocks,
):
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    segments_T1[...] = forwards.column(segments_1T[...])
    lse_T1[...] = forwards.column(lse_1T[...])
    delta_T1[...] = forwards.column(delta_1T[...])
    sum_TX[...] = jnp.zeros_like(sum_TX)

  @pl.when(j <= blocks.last_key(i))
  def _():
    width = k_nope_SH.shape[-1]
    scores_TS = forwards.dot(q_TX[:, :width], k_nope_SH[...], tpu.NT)
    scores_TS += forwards.dot(q_TX[:, width:], k_rope_SR[...], tpu.NT)
    ahead_TS = forwards.iota(scores_TS, 1) - forwards.iota(scores_TS, 0)
    seen_TS = ahead_TS <= i * blocks.queries - j * blocks.keys
    seen_TS &= segments_T1[...] == segments_1S[...]
    p_TS = jnp.exp2(scores_TS * (scale * softmax.LOG2_E) - lse_T1[...])
    p_TS = jnp.where(seen_TS, p_TS, 0.0)
    dp_TS = forwards.dot(do_TU[...], v_SU[...], tpu.NT)
    ds_TS = (p_TS * (dp_TS - delta_T1[...]) * scale).astype(q_TX.dtype)
    sum_TX[:, :width] += forwards.dot(ds_TS, k_nope_SH[...], tpu.NN)
    sum_TX[:, width:] += forwards.dot(ds_TS, k_rope_SR[...], tpu.NN)

  @pl.when(j == blocks.last_key(i))
  def _():
    dq_TX[...] = sum_TX[...].astype(dq_TX.dtype)


def _of_keys(args, *, scale, blocks, interpret):
  """dk_nope, dk_rope and dv, heads first."""
  q_BNTX, k_nope_BNSH, k_rope_BSR, v_BNSU, *_ = args
  batch, heads, padded, _ = q_BNTX.shape
  query = lambda b, j, n, i: (b, n, jnp.maximum(i, blocks.first_query(j)))
  key = lambda b, j, n, i: (b, n, j)
  sums = [(blocks.keys, x.shape[-1]) for x in (k_nope_BNSH, k_rope_BSR, v_BNSU)]
  return pl.pallas_call(
    functools.partial(_kernel_of_keys, scale=scale, blocks=blocks),
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype)
      for x in (k_nope_BNSH, k_rope_BSR, v_BNSU)
    ],
    grid=(batch, padded // blocks.keys, heads, padded // blocks.queries),
    in_specs=_specs(args, blocks, query, key),
    out_specs=_specs(args, blocks, query, key)[1:4],
    scratch_shapes=[
      pltpu.VMEM((blocks.keys, 1), jnp.int32),
      *(pltpu.VMEM(shape, jnp.float32) for shape in sums),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=forwards.cost(args[:6], products=2, of_values=2),
    interpret=interpret,
    name='mla_attention_dkv',
  )(*args)


def _kernel_of_keys(
  q_TX,
  k_nope_SH,
  k_rope_SR,
  v_SU,
  segments_1T,
  segments_1S,
  do_TU,
  lse_1T,
  delta_1T,
  dk_nope_SH,
  dk_rope_SR,
  dv_SU,
  segments_S1,
  sum_SH,
  sum_SR,
  sum_SU,
  *,
  scale,
  blocks,
):
  j, head, i = (pl.program_id(axis) for axis in (1, 2, 3))
  is_last = i == pl.num_programs(3) - 1

  @pl.when(i == 0)
  def _():
    sum_SH[...] = jnp.zeros_like(sum_SH)
    sum_SU[...] = jnp.zeros_like(sum_SU)

  @pl.when((i == 0) & (head == 0))
  def _():
    segments_S1[...] = forwards.column(segments_1S[...])
    sum_SR[...] = jnp.zeros_like(sum_SR)

  @pl.when(i >= blocks.first_query(j))
  def _():
    width = k_nope_SH.shape[-1]
    scores_ST = forwards.dot(k_nope_SH[...], q_TX[:, :width], tpu.NT)
    scores_ST += forwards.dot(k_rope_SR[...], q_TX[:, width:], tpu.NT)
    ahead_ST = forwards.iota(scores_ST, 0) - forwards.iota(scores_ST, 1)
    seen_ST = ahead_ST <= i * blocks.queries - j * blocks.keys
    seen_ST &= segments_S1[...] == segments_1T[...]
    p_ST = jnp.exp2(scores_ST * (scale * softmax.LOG2_E) - lse_1T[...])
    p_ST = jnp.where(seen_ST, p_ST, 0.0)
    sum_SU[...] += forwards.dot(p_ST.astype(do_TU.dtype), do_TU[...], tpu.NN)
    dp_ST = forwards.dot(v_SU[...], do_TU[...], tpu.NT)
    ds_ST = (p_ST * (dp_ST - delta_1T[...]) * scale).astype(q_TX.dtype)
    sum_SH[...] += forwards.dot(ds_ST, q_TX[:, :width], tpu.NN)
    sum_SR[...] += forwards.dot(ds_ST, q_TX[:, width:], tpu.NN)

  @pl.when(is_last)
  def _():
    dk_nope_SH[...] = sum_SH[...].astype(dk_nope_SH.dtype)
    dv_SU[...] = sum_SU[...].astype(dv_SU.dtype)

  @pl.when(is_last & (head == pl.num_programs(2) - 1))
  def _():
    dk_rope_SR[...] = sum_SR[...].astype(dk_rope_SR.dtype)


def _specs(args, blocks: forwards.BlockSizes, query, key) -> list[pl.BlockSpec]:
  """Of the operands, then do, log-sum-exp and delta."""
  return [
    *forwards.operand_specs(args[:6], blocks, query, key),
    forwards.of_head(blocks.queries, args[6].shape[-1], query),
    forwards.row_of_head(blocks.queries, query),
    forwards.row_of_head(blocks.queries, query),
  ]
