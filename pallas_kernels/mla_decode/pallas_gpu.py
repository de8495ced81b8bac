"""Decoding over a paged latent cache on Hopper: TMA, wgmma (Mosaic).

A program takes 64 of a row's T * N queries over one part of the row. Its third
warpgroup loads: one page of 64 tokens after the other comes by TMA, found
through the block table, into one of two buffers. A page is key and value at
once: 64 x 576 for the scores, its first 512 columns for the output.

The output, 64 x 512 in f32, would fill the registers of one warpgroup, so that
two consumers have half of its columns each. They take turns at the scores,
which both need. In turn j,

  one     scores of page j (64 x 64 x 576), softmax, probabilities to shared
          memory
  both    output * decay + probabilities * page j (64 x 256 x 64 each)

and page j + 1 is loaded meanwhile. (Scores of page j + 1 beside the softmax of
page j would keep both buffers busy, and the loads waiting for them.)

Largest scores are passed on with the probabilities; each consumer holds the sum
of those that it computed. Places beyond a row's length are overwritten
with zeros before they are multiplied: NaN times zero would be NaN.

Budget for 512 + 64: two pages 147,456 bytes, queries 73,728, probabilities
8,192: 229,376 of 232,448 bytes of shared memory; a third page has no room. Of
its 240 registers a consumer's thread holds 128 of the output and 32 of the
scores, and spills none (ptxas, sm_90a).

Of an FP8 cache two pages are loaded as they are, and a third buffer has the
page of the turn in BF16: each consumer widens half of its columns. That saves
43 % of the bytes and no product. The scales of a page, [4, 64], have one
buffer, reloaded when both have read it; XLA gathers those of the rows and
transposes them before the kernel. Shared memory: 1 KB more than with BF16.

The interpreter has no accumulators with an initial value: there a product is
added to the output, for which a device lacks the registers.

Letters: t = T * N padded to 64, Y = C + R, i parts, S 64 tokens; p pages, s
tokens of a page, b blocks of a row, c tiles of 128 of C; others as in the
alphabet.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, quantized, softmax
from pallas_kernels.fp8_matmul import pallas_gpu as dense
from pallas_kernels.mla_decode import cache as caches
from pallas_kernels.mla_decode import consume_gpu, parts
from pallas_kernels.mla_decode.cache import PAGE

plgpu = compat.mosaic_gpu
DecodePlan, Work = consume_gpu.DecodePlan, consume_gpu.Work
ROWS, CONSUMERS = consume_gpu.ROWS, consume_gpu.CONSUMERS
STAGES, PIECE = consume_gpu.STAGES, consume_gpu.PIECE
TILE = consume_gpu.TILE

PROGRAMS = 132  # multiprocessors of an H100 SXM and an H200
LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # of 512 for the three


def decode(
  q_BTNY: Float[Array, 'B T N Y'],
  cache: caches.LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  scale: float,
  *,
  splits: int | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `api.decode`.

  Args:
    splits: None: `choose_splits`.
  Raises:
    NotImplementedError: queries that are not BF16; other widths than 128 (not
      in FP8), 256 or 512 latent and 64 rotary; interpreted before jax 0.11.
  """
  rows, queries, heads, _ = q_BTNY.shape
  latent, rotary = cache.c_psC.shape[-1], cache.k_rope_psR.shape[-1]
  if reason := unsupported(cache):
    raise NotImplementedError(reason)
  blocks_t = pl.cdiv(queries * heads, ROWS)
  splits = splits or choose_splits(rows * blocks_t, table_Bb.shape[1])
  widths = (heads, queries, latent, rotary, splits)
  plan = DecodePlan(
    *widths, scale * softmax.LOG2_E, cache.is_quantized, interpret
  )
  x = blocks_t * ROWS
  kernel = plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=(
      jax.ShapeDtypeStruct((splits, rows, x, latent), jnp.float32),
      jax.ShapeDtypeStruct((splits, rows, x), jnp.float32),
    ),
    scratch_types={'scratch': _scratch(plan)},
    grid=(rows, splits, blocks_t),
    grid_names=('row', 'part', 'queries'),
    num_threads=CONSUMERS + 1,
    thread_name='warpgroup',
    kernel_name='mla_decode',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      # A row of the wgmma layout is within a warp: reductions need none.
      reduction_scratch_bytes=0,
    ),
    interpret=compat.gpu_interpreter(interpret),
  )
  owned_Bb = parts.owned(table_Bb, lengths_B, cache.pages)
  o_iBtC, lse_iBt = kernel(
    dense.pad(q_BTNY.reshape(rows, queries * heads, -1), ROWS, 1),
    *_inputs(cache, owned_Bb),
    owned_Bb,
    lengths_B,
  )
  shape = (splits, rows, queries, heads)
  cut = slice(0, queries * heads)
  o_iBTNC = o_iBtC[:, :, cut].reshape(*shape, latent)
  lse_iBNT = jnp.swapaxes(lse_iBt[:, :, cut].reshape(shape), -1, -2)
  return parts.combine(o_iBTNC, lse_iBNT, q_BTNY.dtype)


def unsupported(cache: caches.LatentPages) -> str | None:
  """Why there is no kernel for such a cache, if there is none."""
  dtype = cache.k_rope_psR.dtype
  if dtype != jnp.bfloat16:
    return f'the cache is {dtype}, not bfloat16'
  latent, rotary = cache.c_psC.shape[-1], cache.k_rope_psR.shape[-1]
  widths = (256, 512) if cache.is_quantized else (128, 256, 512)
  if latent not in widths or rotary != PIECE:
    return f'widths {latent} + {rotary} must be one of {widths} + {PIECE}'
  return None


def _inputs(cache: caches.LatentPages, owned_Bb) -> tuple:
  """Latents, scales of the rows' pages or None, rotary keys."""
  if not cache.is_quantized:
    return cache.c_psC, None, cache.k_rope_psR
  scale_Bbcs = parts.scales(cache.c_psC, owned_Bb)
  return cache.c_psC.values, scale_Bbcs, cache.k_rope_psR


def choose_splits(programs: int, table_blocks: int) -> int:
  """As many parts as run at once, each with at least one block."""
  return max(1, min(PROGRAMS // programs, table_blocks))


def _scratch(plan: DecodePlan) -> dict:
  bf16 = functools.partial(dense.swizzled, dtype=jnp.bfloat16)
  pages = (STAGES, PAGE, plan.latent)
  if plan.fp8:
    latents = {
      'loaded': dense.swizzled(pages, quantized.E4M3),
      'c': bf16((PAGE, plan.latent)),
      'scales': plgpu.SMEM((plan.latent // TILE, PAGE), jnp.float32),
      'widened': plgpu.Barrier(num_arrivals=CONSUMERS),
    }
  else:
    latents = {'c': bf16(pages)}
  return latents | {
    'q_c': bf16((ROWS, plan.latent)),
    'q_r': bf16((ROWS, plan.rotary)),
    'k_rope': bf16((STAGES, PAGE, plan.rotary)),
    'p': bf16((ROWS, PAGE)),
    # Largest scores, and the sums of each consumer: all begin at multiples of
    # 1,024 bytes, so that they are in one.
    'of_rows': plgpu.SMEM((1 + CONSUMERS, ROWS), jnp.float32),
    'q_full': plgpu.Barrier(num_arrivals=2),
    'full': plgpu.Barrier(num_arrivals=2 + plan.fp8, num_barriers=STAGES),
    'empty': plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    'ready': plgpu.Barrier(),  # probabilities and largest scores are there
    'used': plgpu.Barrier(num_arrivals=CONSUMERS),  # and were read by both
    'summed': plgpu.Barrier(num_arrivals=CONSUMERS),
  }


def _kernel(q_BtY, c_psC, *rest, plan, scratch):
  """Of every warpgroup. rest: scales if there are any, and all others."""
  *scale_Bbcs, k_rope_psR, table_Bb, lengths_B, o, lse = rest
  row, part = lax.axis_index('row'), lax.axis_index('part')
  warpgroup = lax.axis_index('warpgroup')
  first_query = lax.axis_index('queries') * ROWS
  length = lengths_B[row]
  bounds = parts.bounds(length, part, plan.splits)
  at_rows = pl.ds(first_query, ROWS)
  work = Work(row, part, at_rows, first_query, length, bounds)

  def load():
    plgpu.set_max_registers(LOADER_REGISTERS, action='decrease')
    sources = (q_BtY, c_psC, scale_Bbcs, k_rope_psR, table_Bb)
    _load(sources, work, scratch, plan)

  def consume():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')
    consume_gpu.consume((o, lse), work, warpgroup, scratch, plan)

  lax.cond(warpgroup == CONSUMERS, load, consume)


def _load(sources, work: Work, scratch, plan: DecodePlan):
  """Brings the queries, then page after page as buffers become free."""
  q_BtY, c_psC, scale_Bbcs, k_rope_psR, table_Bb = sources
  first, end = work.bounds
  for name, start, width in (
    ('q_c', 0, plan.latent),
    ('q_r', plan.latent, plan.rotary),
  ):
    part = q_BtY.at[work.row, work.rows, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(part, scratch[name], scratch['q_full'])

  @pl.loop(0, end - first)
  def _(turn):
    slot = consume_gpu.slot_of(turn)

    @pl.when(turn >= STAGES)
    def _():
      plgpu.barrier_wait(scratch['empty'].at[slot])

    block, full = first + turn, scratch['full'].at[slot]
    page = table_Bb[work.row, block]
    latents = scratch['loaded' if plan.fp8 else 'c'].at[slot]
    plgpu.copy_gmem_to_smem(c_psC.at[page], latents, full)
    plgpu.copy_gmem_to_smem(
      k_rope_psR.at[page], scratch['k_rope'].at[slot], full
    )
    if plan.fp8:
      _wait_until_widened(turn, scratch)
      plgpu.copy_gmem_to_smem(
        scale_Bbcs[0].at[work.row, block], scratch['scales'], full
      )

  if plan.fp8:
    _wait_until_widened(end - first, scratch)

  # Waits for the last use of every buffer: barriers must end in phase.
  @pl.loop(lax.max(end - first - STAGES, 0), end - first)
  def _(turn):
    plgpu.barrier_wait(scratch['empty'].at[consume_gpu.slot_of(turn)])


def _wait_until_widened(turn, scratch):
  """Until both have read the scales of the turn before."""

  @pl.when(turn > 0)
  def _():
    plgpu.barrier_wait(scratch['widened'])
