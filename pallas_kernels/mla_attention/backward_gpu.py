"""Gradients of MLA's attention on Hopper: TMA, wgmma (Mosaic).

Two kernels, both from q, k, v and two numbers a query: its log-sum-exp and
delta (reference.py). Each recomputes the scores: seven products where one
kernel would have five, but no atomics, so that the result is deterministic. As
in the forward kernel one warpgroup loads and two have 64 rows each.

- keys: 128 keys of a head, past which its queries come, 32 at a time. Scores
  stand with keys as rows: probabilities and their gradients are operands in
  registers for the products with do and q. A thread has 160 registers of dv and
  dk, which leaves room for scores and gradients of 32 queries: of 64 it would
  spill 472 bytes, and multiply one after the other (ptxas). Products 32 wide
  read more of shared memory than they multiply: about an eighth of the time.
- queries: 128 queries of a head, past which its keys come, 64 at a time.

Shared memory: 128 tokens 80 KB; three stages of 64 or six of 32 tokens 120 KB;
with the numbers of tokens, 203 of 227 KB.

The rotary key is shared by all heads. Each head's part of its gradient goes to
memory in f32, [B, N, T, R], and XLA adds them in one order: for 4,096 tokens
and 128 heads these are 134 MB, written and read in 0.1 ms by an H100. A loop
over heads in a program would avoid them, but leave 32 programs for 132
multiprocessors.

Letters: as in reference.py and blocks_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, registers, softmax
from pallas_kernels.mla_attention import blocks_gpu

plgpu = compat.mosaic_gpu
AttentionPlan, Ring = blocks_gpu.AttentionPlan, blocks_gpu.Ring
BLOCK, ROWS, ROTARY = blocks_gpu.BLOCK, blocks_gpu.ROWS, blocks_gpu.ROTARY

KEYS, KEY_STAGES = 64, 3  # tokens of a stage, and stages
QUERIES, QUERY_STAGES = 32, 6
LINE = 2 * QUERIES  # swizzled bytes
BF16, F32 = jnp.bfloat16, jnp.float32


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
  interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
  """Gradients of q, k_nope, k_rope and v; see `reference.backward`.

  Raises:
    NotImplementedError: as `pallas_gpu.forward`.
  """
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT)
  plan = blocks_gpu.plan(args, scale, interpret)
  operands = (
    *blocks_gpu.operands(args, plan),
    blocks_gpu.widen(do_BTNU, plan.width),
    # Queries behind the last are zeros, and so are their gradients.
    blocks_gpu.of_tokens(
      jnp.stack([lse_BNT * softmax.LOG2_E, delta_BNT], axis=2)
    ),
  )
  dq_BTNX = _of_queries(operands, segments_BT, plan)
  dk_nope_BSNh, dk_rope_BNSR, dv_BSNh = _of_keys(operands, segments_BT, plan)
  nope, rope = k_nope_BSNH.shape[-1], k_rope_BSR.shape[-1]
  if nope < plan.width or rope < ROTARY:
    dq_nope, dq_rope = jnp.split(dq_BTNX, [plan.width], axis=-1)
    parts = dq_nope[..., :nope], dq_rope[..., :rope]
    dq_BTNX = jnp.concatenate(parts, axis=-1)
  dk_rope_BSR = jnp.sum(dk_rope_BNSR, axis=1).astype(k_rope_BSR.dtype)
  grads = (
    dq_BTNX,
    dk_nope_BSNh[..., :nope],
    dk_rope_BSR[..., :rope],
    dv_BSNh[..., : v_BSNU.shape[-1]],
  )
  return tuple(x[:, : plan.length] for x in grads)


def _segments(segments_BT, plan: AttentionPlan, bounds) -> tuple:
  """Operands for them, if there are any."""
  if not plan.segments:
    return ()
  return blocks_gpu.of_tokens(segments_BT), bounds(segments_BT)


def _of_queries(operands, segments_BT, plan: AttentionPlan):
  """dq, with padded widths."""
  memory = blocks_gpu.memory
  step = {
    'k_nope': ((KEYS, plan.width), BF16),
    'k_rope': ((KEYS, ROTARY), BF16),
    'v': ((KEYS, plan.width), BF16),
  }
  if plan.segments:
    step['segments'] = ((KEYS,), jnp.int32)
  scratch = {
    'q_nope': memory(BLOCK, plan.width),
    'q_rope': memory(BLOCK, ROTARY),
    'do': memory(BLOCK, plan.width),
    'numbers': memory(2, BLOCK, dtype=F32),
    'q_segments': memory(BLOCK, dtype=jnp.int32),
    **blocks_gpu.ring_scratch(KEY_STAGES, step),
    'q_full': plgpu.Barrier(num_arrivals=4 + plan.segments),
  }
  return blocks_gpu.launch(
    (_load_keys, _consume_keys),
    plan,
    'mla_attention_dq',
    jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
    scratch,
    *operands,
    *_segments(
      segments_BT, plan, lambda x: blocks_gpu.first_keys(x, BLOCK, KEYS)
    ),
  )


def _ring_of_keys(scratch, plan: AttentionPlan) -> Ring:
  names = ('k_nope', 'k_rope', 'v') + ('segments',) * plan.segments
  return Ring(scratch, KEY_STAGES, names)


def _work_of_queries(refs, place, plan: AttentionPlan):
  """Block of queries; first step of keys and the end."""
  block = plan.blocks - 1 - place[2]  # the longest begin first
  first = refs[7][place[0], block] if plan.segments else jnp.int32(0)
  most = pl.cdiv(plan.length, KEYS)
  return block, first, lax.min((block + 1) * (BLOCK // KEYS), jnp.int32(most))


def _load_keys(refs, place, scratch, plan: AttentionPlan):
  """Brings the queries, then keys and values as buffers become free."""
  q_BTNX, k_nope, k_rope, v, do, numbers, *rest = refs
  b, n, _ = place
  block, first, end = _work_of_queries(refs, place, plan)
  queries = pl.ds(block * BLOCK, BLOCK)
  sources = _of_q(q_BTNX.at[b, queries, n], plan) | {
    'do': do.at[b, queries, n],
    'numbers': numbers.at[b, n, :, queries],
  }
  if plan.segments:
    sources['q_segments'] = rest[0].at[b, queries]
  blocks_gpu.load(sources, scratch, 'q_full')
  ring = _ring_of_keys(scratch, plan)

  @pl.loop(first, end)
  def _(j):
    keys = pl.ds(j * KEYS, KEYS)
    of_step = [k_nope.at[b, keys, n], k_rope.at[b, keys], v.at[b, keys, n]]
    if plan.segments:
      of_step.append(rest[0].at[b, keys])
    ring.fill(j - first, of_step)

  ring.drain(end - first)


def _of_q(q_TX, plan: AttentionPlan) -> dict:
  """Both parts of queries in memory."""
  return {
    'q_nope': q_TX.at[:, pl.ds(0, plan.width)],
    'q_rope': q_TX.at[:, pl.ds(plan.width, ROTARY)],
  }


def _consume_keys(refs, place, index, scratch, plan: AttentionPlan):
  """dq of 64 queries."""
  dq_BTNX = refs[-1]
  b, n, _ = place
  block, first, end = _work_of_queries(refs, place, plan)
  mine = pl.ds(index * ROWS, ROWS)
  start = block * BLOCK + index * ROWS
  q_nope, q_rope = (scratch[name].at[mine] for name in ('q_nope', 'q_rope'))
  plgpu.barrier_wait(scratch['q_full'])
  body = functools.partial(_step_of_keys, scratch, plan, mine, first)
  apart = lambda j: start - j * KEYS
  sums = tuple(registers.zeros((ROWS, x)) for x in (plan.width, ROTARY))
  diagonal = block * (BLOCK // KEYS)
  sums = lax.fori_loop(first, diagonal, functools.partial(body, None), sums)
  sums = lax.fori_loop(diagonal, end, functools.partial(body, apart), sums)
  outputs = _of_q(dq_BTNX.at[b, pl.ds(start, ROWS), n], plan)
  for x, memory, out in zip(
    sums, (q_nope, q_rope), outputs.values(), strict=True
  ):
    _store(x, memory, out)
  plgpu.wait_smem_to_gmem(0)


def _step_of_keys(scratch, plan: AttentionPlan, mine, first, apart, j, sums):
  """Adds what 64 keys give to dq. apart: see `blocks_gpu.hide`, of j."""
  shape, turn = (ROWS, KEYS), j - first
  ring = _ring_of_keys(scratch, plan)
  k_nope, k_rope, v, *rest = ring.take(turn)
  q_nope, q_rope, do = (
    scratch[name].at[mine] for name in ('q_nope', 'q_rope', 'do')
  )
  scores, dp = registers.products(
    shape,
    [
      (q_nope, k_nope.transpose((1, 0))),
      (q_rope, k_rope.transpose((1, 0))),
    ],
    [(do, v.transpose((1, 0)))],
  )
  segments = None
  if plan.segments:
    of_queries = registers.row(scratch['q_segments'][mine])
    segments = of_queries, registers.column(rest[0][...])
    plgpu.commit_smem()  # TMA, another proxy, may overwrite them only now
  lse, delta = (
    registers.from_rows(registers.row(scratch['numbers'][at, mine]), shape)
    for at in range(2)
  )
  p = jnp.exp2(scores * plan.base2 - lse)
  p = blocks_gpu.hide(p, 0.0, plan, apart and apart(j), segments)
  ds = registers.tile((p * (dp - delta) * plan.scale).astype(BF16))
  pairs = ((ds, k_nope), (ds, k_rope))
  sums = registers.add(sums, pairs, scratch['staging'])
  ring.release(turn)
  return sums


def _store(x, memory, out):
  """Stores BF16 through memory that no warpgroup reads any more."""
  memory[...] = registers.tile(x.astype(BF16))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(memory, out)


def _of_keys(operands, segments_BT, plan: AttentionPlan):
  """dk_nope, each head's dk_rope, and dv, with padded widths."""
  memory = functools.partial(blocks_gpu.memory, line=LINE)
  step = {
    'q_nope': ((QUERIES, plan.width), BF16),
    'q_rope': ((QUERIES, ROTARY), BF16),
    'do': ((QUERIES, plan.width), BF16),
    'numbers': ((2, QUERIES), F32),
  }
  if plan.segments:
    step['segments'] = ((QUERIES,), jnp.int32)
  scratch = {
    'k_nope': memory(BLOCK, plan.width),
    'k_rope': memory(BLOCK, ROTARY),
    'v': memory(BLOCK, plan.width),
    'k_segments': memory(BLOCK, dtype=jnp.int32),
    **blocks_gpu.ring_scratch(QUERY_STAGES, step, LINE),
    'k_full': plgpu.Barrier(num_arrivals=3 + plan.segments),
  }
  of_rope = (plan.batch, plan.heads, plan.blocks * BLOCK, ROTARY)
  return blocks_gpu.launch(
    (_load_queries, _consume_queries),
    plan,
    'mla_attention_dkv',
    (
      jax.ShapeDtypeStruct(operands[1].shape, BF16),
      jax.ShapeDtypeStruct(of_rope, F32),
      jax.ShapeDtypeStruct(operands[3].shape, BF16),
    ),
    scratch,
    *operands,
    *_segments(
      segments_BT, plan, lambda x: blocks_gpu.end_queries(x, QUERIES, BLOCK)
    ),
  )


def _ring_of_queries(scratch, plan: AttentionPlan) -> Ring:
  names = ('q_nope', 'q_rope', 'do', 'numbers')
  return Ring(scratch, QUERY_STAGES, names + ('segments',) * plan.segments)


def _work_of_keys(refs, place, plan: AttentionPlan):
  """Block of keys; first step of queries and the end."""
  block = place[2]
  end = jnp.int32(pl.cdiv(plan.length, QUERIES))
  if plan.segments:
    end = refs[7][place[0], block]
  return block, block * (BLOCK // QUERIES), end


def _load_queries(refs, place, scratch, plan: AttentionPlan):
  """Brings the keys and values, then queries as buffers become free."""
  q_BTNX, k_nope, k_rope, v, do, numbers, *rest = refs
  b, n, _ = place
  block, first, end = _work_of_keys(refs, place, plan)
  keys = pl.ds(block * BLOCK, BLOCK)
  sources = {
    'k_nope': k_nope.at[b, keys, n],
    'k_rope': k_rope.at[b, keys],
    'v': v.at[b, keys, n],
  }
  if plan.segments:
    sources['k_segments'] = rest[0].at[b, keys]
  blocks_gpu.load(sources, scratch, 'k_full')
  ring = _ring_of_queries(scratch, plan)

  @pl.loop(first, end)
  def _(i):
    queries = pl.ds(i * QUERIES, QUERIES)
    of_step = [
      *_of_q(q_BTNX.at[b, queries, n], plan).values(),
      do.at[b, queries, n],
      numbers.at[b, n, :, queries],
    ]
    if plan.segments:
      of_step.append(rest[0].at[b, queries])
    ring.fill(i - first, of_step)

  ring.drain(end - first)


def _consume_queries(refs, place, index, scratch, plan: AttentionPlan):
  """dk and dv of 64 keys."""
  *_, dk_nope_BSNh, dk_rope_BNSR, dv_BSNh = refs
  b, n, _ = place
  block, first, end = _work_of_keys(refs, place, plan)
  mine = pl.ds(index * ROWS, ROWS)
  start = block * BLOCK + index * ROWS
  plgpu.barrier_wait(scratch['k_full'])
  body = functools.partial(_step_of_queries, scratch, plan, mine, first)
  apart = lambda i: i * QUERIES - start
  widths = (plan.width, plan.width, ROTARY)
  sums = tuple(registers.zeros((ROWS, width)) for width in widths)
  below = lax.min(first + BLOCK // QUERIES, end)
  sums = lax.fori_loop(first, below, functools.partial(body, apart), sums)
  sums = lax.fori_loop(below, end, functools.partial(body, None), sums)
  dv, dk_nope, dk_rope = sums
  keys = pl.ds(start, ROWS)
  _store(dv, scratch['v'].at[mine], dv_BSNh.at[b, keys, n])
  _store(dk_nope, scratch['k_nope'].at[mine], dk_nope_BSNh.at[b, keys, n])
  dk_rope_BNSR[b, n, keys] = dk_rope
  plgpu.wait_smem_to_gmem(0)


def _step_of_queries(scratch, plan: AttentionPlan, mine, first, apart, i, sums):
  """Adds what 32 queries give to dv and dk. apart: as of `_step_of_keys`."""
  shape, turn = (ROWS, QUERIES), i - first
  ring = _ring_of_queries(scratch, plan)
  q_nope, q_rope, do, numbers, *rest = ring.take(turn)
  k_nope, k_rope, v = (
    scratch[name].at[mine] for name in ('k_nope', 'k_rope', 'v')
  )
  scores, dp = registers.products(
    shape,
    [
      (k_nope, q_nope.transpose((1, 0))),
      (k_rope, q_rope.transpose((1, 0))),
    ],
    [(v, do.transpose((1, 0)))],
  )
  segments = None
  if plan.segments:
    of_keys = registers.row(scratch['k_segments'][mine])
    segments = of_keys, registers.column(rest[0][...])
  lse, delta = (
    registers.from_columns(registers.column(numbers[at]), shape)
    for at in range(2)
  )
  plgpu.commit_smem()  # TMA, another proxy, may overwrite them only now
  p = jnp.exp2(scores * plan.base2 - lse)
  p = blocks_gpu.hide(p, 0.0, plan, apart and apart(i), segments, keys=0)
  ds = registers.tile((p * (dp - delta) * plan.scale).astype(BF16))
  p = registers.tile(p.astype(BF16))
  pairs = ((p, do), (ds, q_nope), (ds, q_rope))
  sums = registers.add(sums, pairs, scratch['staging'])
  ring.release(turn)
  return sums
