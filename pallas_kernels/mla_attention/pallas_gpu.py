"""Causal attention of MLA on Hopper: TMA, wgmma (Mosaic): forward.

A program has 128 queries of a head; its third warpgroup loads, by TMA: the
queries, then blocks of 128 keys and values into two buffers each. The rotary
key has no head: all programs load the same one. Two consumers have 64 queries
each and keep scores, probabilities, largest scores, sums and output in
registers. They alternate at the tensor cores, by a barrier on which both
arrive:

  one     output += probabilities values,  scores = queries keys of the next
  other   softmax: largest scores, powers of two, sums

Keys come until the diagonal, and the last block alone is masked for it. Blocks
before the first that has a segment of the queries' are not loaded. Programs of
a head run beside one another, so that its keys are read from the L2 cache; the
longest begin first.

Budget for 192 / 128: queries 48 KB, two stages of 80 KB: 208 of 227 KB of
shared memory. Of its 240 registers a consumer's thread has 64 of the output, 64
of the scores and 32 of the probabilities. The output leaves through the
queries' memory.

Letters: as in reference.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, registers, softmax
from pallas_kernels.mla_attention import blocks_gpu

plgpu = compat.mosaic_gpu
AttentionPlan = blocks_gpu.AttentionPlan
BLOCK, ROWS, ROTARY = blocks_gpu.BLOCK, blocks_gpu.ROWS, blocks_gpu.ROTARY

STAGES = 2


class Carry(NamedTuple):
  """Of 64 queries: largest scores, sums of probabilities, output."""

  most: jax.Array
  total: jax.Array
  sums: jax.Array


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
  *,
  interpret: bool = False,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `reference.forward`.

  Raises:
    NotImplementedError: not BF16; wider than 128 + 64 and 128; interpreted
      before jax 0.11.
  """
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT)
  plan = blocks_gpu.plan(args, scale, interpret)
  tail = ()
  if plan.segments:
    first_Bi = blocks_gpu.first_keys(segments_BT, BLOCK, BLOCK)
    tail = (blocks_gpu.of_tokens(segments_BT), first_Bi)
  shape = (plan.batch, plan.padded, plan.heads, plan.width)
  lse_shape = (plan.batch, plan.heads, plan.blocks * BLOCK)
  o_BTNh, lse_BNT = blocks_gpu.launch(
    (_load, _consume),
    plan,
    'mla_attention',
    (
      jax.ShapeDtypeStruct(shape, q_BTNX.dtype),
      jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    ),
    _scratch(plan),
    *blocks_gpu.operands(args, plan),
    *tail,
  )
  o_BTNU = o_BTNh[:, : plan.length, :, : v_BSNU.shape[-1]]
  return o_BTNU, lse_BNT[..., : plan.length]


def _scratch(plan: AttentionPlan) -> dict:
  bf16, memory = jnp.bfloat16, blocks_gpu.memory
  keys = {
    'k_nope': ((BLOCK, plan.width), bf16),
    'k_rope': ((BLOCK, ROTARY), bf16),
  }
  if plan.segments:
    keys['segments'] = ((BLOCK,), jnp.int32)
  values = {'v': ((BLOCK, plan.width), bf16)}
  return {
    'q_nope': memory(BLOCK, plan.width),
    'q_rope': memory(BLOCK, ROTARY),
    'q_segments': memory(BLOCK, dtype=jnp.int32),
    **blocks_gpu.ring_scratch(STAGES, keys),
    **blocks_gpu.ring_scratch(STAGES, values),
    'q_full': plgpu.Barrier(num_arrivals=2 + plan.segments),
    'turns': plgpu.Barrier(num_arrivals=blocks_gpu.CONSUMERS),
  }


def _rings(scratch, plan: AttentionPlan):
  """Of keys and of values, which are free at other times."""
  names = ('k_nope', 'k_rope') + ('segments',) * plan.segments
  ring = functools.partial(blocks_gpu.Ring, scratch, STAGES)
  return ring(names), ring(('v',))


def _work(refs, place, plan: AttentionPlan):
  """Block of queries, and the first of keys."""
  block = plan.blocks - 1 - place[2]
  first = refs[5][place[0], block] if plan.segments else jnp.int32(0)
  return block, first


def _load(refs, place, scratch, plan: AttentionPlan):
  """Brings the queries, then keys and values as buffers become free."""
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, *rest = refs
  b, n, _ = place
  block, first = _work(refs, place, plan)
  queries = pl.ds(block * BLOCK, BLOCK)
  q_TX = q_BTNX.at[b, queries, n]
  sources = {
    'q_nope': q_TX.at[:, pl.ds(0, plan.width)],
    'q_rope': q_TX.at[:, pl.ds(plan.width, ROTARY)],
  }
  if plan.segments:
    sources['q_segments'] = rest[0].at[b, queries]
  blocks_gpu.load(sources, scratch, 'q_full')
  of_keys, of_values = _rings(scratch, plan)

  @pl.loop(first, block + 1)
  def _(j):
    keys = pl.ds(j * BLOCK, BLOCK)
    sources = [k_nope_BSNH.at[b, keys, n], k_rope_BSR.at[b, keys]]
    if plan.segments:
      sources.append(rest[0].at[b, keys])
    of_keys.fill(j - first, sources)
    of_values.fill(j - first, [v_BSNU.at[b, keys, n]])

  of_keys.drain(block + 1 - first)
  of_values.drain(block + 1 - first)


def _consume(refs, place, index, scratch, plan: AttentionPlan):
  """64 queries: all blocks of keys, then the output."""
  *_, o_BTNh, lse_BNT = refs
  b, n, _ = place
  block, first = _work(refs, place, plan)
  mine = pl.ds(index * ROWS, ROWS)
  queries = pl.ds(block * BLOCK + index * ROWS, ROWS)
  switch = functools.partial(_arrive_and_wait, scratch['turns'])
  plgpu.barrier_wait(scratch['q_full'])
  of_rows = registers.row(scratch['q_segments'][mine])
  full = lambda x: registers.row(jnp.full((ROWS,), x, jnp.float32))
  sums = registers.zeros((ROWS, plan.width))
  carry = Carry(full(softmax.LEAST), full(0.0), sums)
  body = functools.partial(_turn, scratch, plan, first, index, of_rows)
  pl.when(index == 1)(switch)  # half a turn behind the other
  carry = lax.fori_loop(first, block, functools.partial(body, None), carry)
  carry = body(index * ROWS, block, carry)
  pl.when(index == 0)(switch)
  most, total, sums = carry
  inverse = registers.from_rows(registers.row(1.0 / total), sums.shape)
  out = scratch['q_nope'].at[mine]  # which no warpgroup reads any more
  out[...] = registers.tile((sums * inverse).astype(o_BTNh.dtype))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out, o_BTNh.at[b, queries, n])
  lse_BNT[b, n, queries] = registers.row(most / softmax.LOG2_E + jnp.log(total))
  plgpu.wait_smem_to_gmem(0)


def _arrive_and_wait(barrier):
  """Both consumers are here: one begins to multiply, one has ended."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def _turn(scratch, plan, first, index, of_rows, ahead, j, carry: Carry):
  """A block of keys. ahead: see `blocks_gpu.hide`."""
  of_keys, of_values = _rings(scratch, plan)
  turn, shape = j - first, (ROWS, BLOCK)
  mine = pl.ds(index * ROWS, ROWS)
  switch = functools.partial(_arrive_and_wait, scratch['turns'])
  k_nope, k_rope, *of_columns = of_keys.take(turn)
  pairs = [
    (scratch['q_nope'].at[mine], k_nope.transpose((1, 0))),
    (scratch['q_rope'].at[mine], k_rope.transpose((1, 0))),
  ]
  (scores,) = registers.products(shape, pairs, then=switch)
  segments = None
  if plan.segments:
    segments = of_rows, registers.column(of_columns[0][...])
    plgpu.commit_smem()  # TMA, another proxy, may overwrite them only now
  of_keys.release(turn)
  scores = registers.tile(scores * plan.base2)
  scores = blocks_gpu.hide(scores, softmax.HIDDEN, plan, ahead, segments)
  most = registers.row(jnp.maximum(carry.most, jnp.max(scores, axis=1)))
  p = registers.tile(jnp.exp2(scores - registers.from_rows(most, shape)))
  decay = registers.row(jnp.exp2(carry.most - most))
  total = registers.row(carry.total * decay + jnp.sum(p, axis=1))
  sums = carry.sums
  sums = registers.tile(sums * registers.from_rows(decay, sums.shape))
  p = registers.tile(p.astype(jnp.bfloat16))
  (v,) = of_values.take(turn)
  switch()
  (sums,) = registers.add((sums,), ((p, v),), scratch['staging'])
  of_values.release(turn)
  return Carry(most, total, sums)
