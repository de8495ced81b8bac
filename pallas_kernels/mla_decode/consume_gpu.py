"""The two consumers of a program of `pallas_gpu`, turn by turn.

Letters: as there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers, softmax
from pallas_kernels.mla_decode import parts
from pallas_kernels.mla_decode.cache import PAGE

plgpu = compat.mosaic_gpu

ROWS = 64  # queries of a program: of one wgmma
CONSUMERS = 2
STAGES = 2  # pages in shared memory
PIECE = 64  # columns of swizzled memory
TILE = 128  # of FP8 latents that share a scale


class DecodePlan(NamedTuple):
  """Constants of a launch. scale: of scores in powers of two."""

  heads: int
  queries: int
  latent: int
  rotary: int
  splits: int
  scale: float
  fp8: bool
  interpret: bool

  @property
  def half(self) -> int:
    """Columns of the output of one consumer."""
    return self.latent // CONSUMERS


class Work(NamedTuple):
  """Of a program: its place, and its blocks of the row."""

  row: jax.Array
  part: jax.Array
  rows: pl.Slice
  first_query: jax.Array
  length: jax.Array
  bounds: parts.Bounds


def slot_of(turn):
  """The buffer of a turn's page."""
  return lax.rem(turn, jnp.int32(STAGES))


def consume(outputs, work: Work, warpgroup, scratch, plan: DecodePlan):
  """Takes all turns, and stores its columns of the output.

  outputs: o [i, B, t, C] and lse [i, B, t], f32.
  """
  turns = work.bounds.end - work.bounds.first
  plgpu.barrier_wait(scratch['q_full'])
  full = lambda value: registers.row(jnp.full((ROWS,), value, jnp.float32))
  zeros = lambda columns: registers.tile(
    jnp.zeros((ROWS, columns), jnp.float32)
  )
  body = functools.partial(_turn, work, warpgroup, scratch, plan)
  carry = (full(softmax.LEAST), full(0.0), zeros(plan.half))
  most, total, sums = lax.fori_loop(0, turns, body, carry)
  _wait_until_used(turns, scratch)
  of_rows = scratch['of_rows']
  of_rows[1 + warpgroup] = total
  plgpu.barrier_arrive(scratch['summed'])
  plgpu.barrier_wait(scratch['summed'])
  total = registers.row(of_rows[1]) + registers.row(of_rows[2])
  _store(outputs, (most, total, sums), work, warpgroup, plan)


def _widen(page, slot, warpgroup, scratch, plan: DecodePlan):
  """An FP8 page in BF16, half of its columns by each; then both have all."""
  for tile in range(plan.half // TILE):
    k = warpgroup * (plan.half // TILE) + tile
    columns = pl.ds(k * TILE, TILE)
    x_sC = registers.tile(scratch['loaded'][slot, :, columns])
    scale_s = registers.row(scratch['scales'][k])
    x_sC = registers.tile(
      x_sC.astype(jnp.float32) * registers.from_rows(scale_s, x_sC.shape)
    )
    page[:, columns] = registers.tile(x_sC.astype(jnp.bfloat16))
  plgpu.commit_smem()
  plgpu.barrier_arrive(scratch['widened'])
  plgpu.barrier_wait(scratch['widened'])


def _score(page, k_rope, scratch):
  """q k^T of a page, f32 [64, 64]."""

  def product(acc):
    for q, k in (('q_c', page), ('q_r', k_rope)):
      plgpu.wgmma(acc, scratch[q], k.transpose((1, 0)))
    return acc[...]

  return registers.tile(
    pl.run_scoped(product, plgpu.ACC((ROWS, PAGE), jnp.float32))
  )


def _turn(work: Work, warpgroup, scratch, plan: DecodePlan, turn, carry):
  """Scores of a page, by one of the two, and its part of the output."""
  most, total, sums = carry
  slot = slot_of(turn)
  plgpu.barrier_wait(scratch['full'].at[slot])
  page = scratch['c'] if plan.fp8 else scratch['c'].at[slot]
  columns = pl.ds(warpgroup * plan.half, plan.half)
  if plan.fp8:
    _widen(page, slot, warpgroup, scratch, plan)

  def soften():
    scores = _score(page, scratch['k_rope'].at[slot], scratch)
    p_sum = _soften(scores, most, work, turn, scratch, plan)
    plgpu.barrier_arrive(scratch['ready'])
    return p_sum

  def wait():
    # Every barrier is waited for once a turn by both.
    _wait_until_used(turn, scratch)
    return registers.row(jnp.zeros_like(most))

  mine = lax.rem(turn, jnp.int32(CONSUMERS)) == warpgroup
  p_sum = lax.cond(mine, soften, wait)
  plgpu.barrier_wait(scratch['ready'])
  before, most = most, registers.row(scratch['of_rows'][0])
  decay = registers.row(jnp.exp2(before - most))
  total = registers.row(total * decay + p_sum)
  page_SC = page.at[:, columns]
  block = work.bounds.first + turn

  @pl.when((block + 1) * PAGE > work.length)
  def _():
    _clear(page_SC, work.length - block * PAGE, plan)

  sums = registers.tile(sums * registers.from_rows(decay, sums.shape))
  sums = _add(sums, scratch['p'], page_SC, plan)
  plgpu.barrier_arrive(scratch['used'])
  plgpu.barrier_arrive(scratch['empty'].at[slot])
  return most, total, sums


def _wait_until_used(turn, scratch):
  """Until both have read the probabilities of the turn before."""

  @pl.when(turn > 0)
  def _():
    plgpu.barrier_wait(scratch['used'])


def _soften(scores, most, work: Work, turn, scratch, plan: DecodePlan):
  """Probabilities and largest scores to shared memory; sums of the former."""
  seen_tS = _seen(work, turn, plan)
  scores = registers.tile(
    jnp.where(seen_tS, scores * plan.scale, softmax.HIDDEN)
  )
  most = registers.row(jnp.maximum(most, jnp.max(scores, axis=1)))
  p_tS = registers.tile(
    jnp.exp2(scores - registers.from_rows(most, scores.shape))
  )
  _wait_until_used(turn, scratch)
  scratch['p'][...] = registers.tile(p_tS.astype(jnp.bfloat16))
  scratch['of_rows'][0] = most
  plgpu.commit_smem()
  return registers.row(jnp.sum(p_tS, axis=1))


def _seen(work: Work, turn, plan: DecodePlan):
  """Which tokens of a page each query sees; padded queries see the last's."""
  iota = lambda dim: plgpu.broadcasted_iota(
    jnp.int32, (ROWS, PAGE), dim, layout=plgpu.Layout.WGMMA
  )
  # Of the first query; each of the others sees one more.
  until = work.length - (work.bounds.first + turn) * PAGE - plan.queries + 1
  if plan.queries == 1:
    return iota(1) < until
  later_tS = sum(
    (work.first_query + iota(0) >= t * plan.heads).astype(jnp.int32)
    for t in range(1, plan.queries)
  )
  return iota(1) - later_tS < until


def _clear(page_SC, tokens, plan: DecodePlan):
  """Zeros from the place `tokens` on."""
  layout = plgpu.Layout.WGMMA
  s_SC = plgpu.broadcasted_iota(jnp.int32, (PAGE, PIECE), 0, layout=layout)
  for start in range(0, plan.half, PIECE):
    piece = page_SC.at[:, pl.ds(start, PIECE)]
    x_SC = registers.tile(piece[...])
    piece[...] = registers.tile(
      jnp.where(s_SC < tokens, x_SC, jnp.zeros_like(x_SC))
    )
  plgpu.commit_smem()


def _add(sums, p_tS, page_SC, plan: DecodePlan):
  """sums + p page."""
  if plan.interpret:

    def product(acc):
      plgpu.wgmma(acc, p_tS, page_SC)
      return acc[...]

    return sums + pl.run_scoped(product, plgpu.ACC(sums.shape, jnp.float32))
  add = lambda acc: plgpu.wgmma(acc, p_tS, page_SC)
  return registers.tile(pl.run_state(add)(plgpu.ACC.init(sums)))


def _store(outputs, carry, work: Work, warpgroup, plan: DecodePlan):
  """Output and log-sum-exp of a part, from registers."""
  o_iBtC, lse_iBt = outputs
  most, total, sums = carry
  none = total == 0
  total = registers.row(jnp.where(none, 1.0, total))
  sums = registers.tile(
    sums * registers.from_rows(registers.row(1.0 / total), sums.shape)
  )
  columns = pl.ds(warpgroup * plan.half, plan.half)
  o_iBtC[work.part, work.row, work.rows, columns] = sums
  lse = registers.row(
    jnp.where(none, -jnp.inf, most / softmax.LOG2_E + jnp.log(total))
  )

  @pl.when(warpgroup == 0)
  def _():
    lse_iBt[work.part, work.row, work.rows] = lse
