"""Decoding over a paged latent cache on TPUs, through Pallas and Mosaic.

A grid over rows, parts of a row and steps of `pages` pages. The block table is
a prefetched scalar. A step takes the array of pages as several operands, each
with another page, so that the pipeline copies them in parallel during the step
before. All queries and heads of a row share what is loaded. The softmax is
online: largest score, sum and output stay in VMEM, in f32; exponentials are
powers of two.

A step beyond a part's end does nothing, and names the pages of the last step
within, so that none is copied again. Places beyond a row's length are zeros
before they are multiplied: NaN times a zero probability would be NaN.

An FP8 page is dequantised to BF16 in VMEM. Scales come as [4, 64], long in the
lanes: [64, 4] padded to 128 lanes would be as large as the values; XLA
transposes them before the kernel.

Letters: t = T * N, S tokens of a step, i parts; p pages, s tokens of a page, b
blocks of a row, c tiles of 128 of C; others as in CONTRIBUTING.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax, tpu
from pallas_kernels.mla_decode import cache as caches
from pallas_kernels.mla_decode import parts
from pallas_kernels.mla_decode.cache import PAGE


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """pages: of 64 tokens, that a step holds; each is a copy of its own."""

  pages: int = 8

  def __post_init__(self):
    if self.pages < 1:
      raise ValueError(f'blocks.pages={self.pages} must be at least 1')


def choose_blocks(table_blocks: int, queries: int) -> BlockSizes:
  """512 tokens are 0.6 MB, 0.2 us of v5p's memory: as long as a step's start.

  With many queries scores and probabilities want the VMEM.
  """
  most = 8 if queries <= 256 else 4
  return BlockSizes(min(most, table_blocks))


def decode(
  q_BTNY: Float[Array, 'B T N Y'],
  cache: caches.LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  scale: float,
  *,
  splits: int | None = None,
  blocks: BlockSizes | None = None,
  interpret=False,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `api.decode`.

  Args:
    splits: None: 1; a TPU has one or two cores, which rows fill.
    blocks: None: `choose_blocks`.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  rows, queries, heads, _ = q_BTNY.shape
  splits = splits or 1
  blocks = blocks or choose_blocks(table_Bb.shape[1], queries * heads)
  latent_dim = cache.c_psC.shape[-1]
  q_BtC, q_BtR = jnp.split(
    q_BTNY.reshape(rows, queries * heads, -1), [latent_dim], axis=-1
  )
  owned_Bb = parts.owned(table_Bb, lengths_B, cache.pages)
  inputs = _inputs(cache, owned_Bb)
  out = pl.pallas_call(
    functools.partial(
      _kernel,
      heads=heads,
      queries=queries,
      splits=splits,
      pages=blocks.pages,
      scale=scale * softmax.LOG2_E,
    ),
    out_shape=(
      jax.ShapeDtypeStruct((rows, splits, *q_BtC.shape[1:]), jnp.float32),
      jax.ShapeDtypeStruct((rows, splits, q_BtC.shape[1], 1), jnp.float32),
    ),
    grid_spec=_grid(q_BtC, q_BtR, inputs, table_Bb, splits, blocks.pages),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=_cost(q_BTNY, cache, table_Bb),
    interpret=interpret,
    name='mla_decode',
  )(
    owned_Bb,
    lengths_B,
    q_BtC,
    q_BtR,
    *(x for x in inputs for _ in range(blocks.pages)),
  )
  o_iBtC, lse_iBt1 = (jnp.swapaxes(x, 0, 1) for x in out)
  shape = (splits, rows, queries, heads)
  lse_iBNT = jnp.swapaxes(lse_iBt1.reshape(shape), -1, -2)
  o_iBTNC = o_iBtC.reshape(*shape, latent_dim)
  return parts.combine(o_iBTNC, lse_iBNT, q_BTNY.dtype)


def _inputs(cache: caches.LatentPages, owned_Bb) -> tuple:
  """What is copied of a page: latents, rotary keys and, of FP8, scales."""
  if not cache.is_quantized:
    return cache.c_psC, cache.k_rope_psR
  scale_Bbcs = parts.scales(cache.c_psC, owned_Bb)
  return cache.c_psC.values, cache.k_rope_psR, scale_Bbcs


def _grid(q_BtC, q_BtR, inputs, table_Bb, splits: int, pages: int):
  """Rows, parts and steps, and which pages each step holds."""
  rows, queries, latent_dim = q_BtC.shape
  share = pl.cdiv(table_Bb.shape[1], splits)

  def block(at, b, z, step, lengths):
    first, end = parts.bounds(lengths[b], z, splits)
    last_step = jnp.maximum(parts.div_up(end - first, pages) - 1, 0)
    wanted = first + jnp.minimum(step, last_step) * pages + at
    last = jnp.maximum(end - 1, 0)  # 0: of an empty row, an owned page 0
    return jnp.minimum(wanted, last)

  def spec(x, at):
    """Pages as they lie in the cache, or, of scales, in the rows' order."""
    if x.ndim == 4:
      place = lambda b, z, i, _, lengths: (b, block(at, b, z, i, lengths), 0, 0)
      return pl.BlockSpec((None, None, *x.shape[2:]), place)
    place = lambda b, z, i, table, lengths: (
      table[b, block(at, b, z, i, lengths)],
      0,
      0,
    )
    return pl.BlockSpec((None, *x.shape[1:]), place)

  of_row = lambda b, z, step, *_: (b, 0, 0)
  of_part = lambda b, z, step, *_: (b, z, 0, 0)
  scratch = [(queries, 1), (queries, 1), (queries, latent_dim)]
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=2,
    grid=(rows, splits, pl.cdiv(share, pages)),
    in_specs=[
      pl.BlockSpec((None, queries, q_BtC.shape[-1]), of_row),
      pl.BlockSpec((None, queries, q_BtR.shape[-1]), of_row),
      *(spec(x, at) for x in inputs for at in range(pages)),
    ],
    out_specs=(
      pl.BlockSpec((None, None, queries, latent_dim), of_part),
      pl.BlockSpec((None, None, queries, 1), of_part),
    ),
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
  )


def _kernel(
  table, lengths, q_tC, q_tR, *refs, heads, queries, splits, pages, scale
):
  """One step of a part; refs: the pages of each input, outputs, scratch."""
  *inputs, o_tC, lse_t1, most_t1, total_t1, sum_tC = refs
  row, step = pl.program_id(0), pl.program_id(2)
  length = lengths[row]
  first, end = parts.bounds(length, pl.program_id(1), splits)

  @pl.when(step == 0)
  def _():
    most_t1[...] = jnp.full_like(most_t1, softmax.LEAST)
    total_t1[...] = jnp.zeros_like(total_t1)
    sum_tC[...] = jnp.zeros_like(sum_tC)

  @pl.when(first + step * pages < end)
  def _():
    start = (first + step * pages) * PAGE
    until = jnp.minimum(length, end * PAGE)  # the next part has what is beyond
    c_SC, k_rope_SR = _load(inputs, pages, start, until, q_tC.dtype)
    scores_tS = _dot(q_tC[...], c_SC, tpu.NT) + _dot(
      q_tR[...], k_rope_SR, tpu.NT
    )
    shape = scores_tS.shape
    s_tS = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    x_tS = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    t_tS = sum((x_tS >= t * heads).astype(jnp.int32) for t in range(1, queries))
    seen_tS = s_tS < jnp.minimum(until, length - queries + 1 + t_tS)
    scores_tS = jnp.where(seen_tS, scores_tS * scale, softmax.HIDDEN)
    before_t1 = most_t1[...]
    most = jnp.maximum(before_t1, jnp.max(scores_tS, axis=1, keepdims=True))
    p_tS = jnp.exp2(scores_tS - most)
    decay_t1 = jnp.exp2(before_t1 - most)
    most_t1[...] = most
    total_t1[...] = total_t1[...] * decay_t1 + jnp.sum(p_tS, 1, keepdims=True)
    part_tC = _dot(p_tS.astype(c_SC.dtype), c_SC, tpu.NN)
    sum_tC[...] = sum_tC[...] * decay_t1 + part_tC

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    total = total_t1[...]
    none = total == 0
    total = jnp.where(none, 1.0, total)
    o_tC[...] = sum_tC[...] / total
    lse = most_t1[...] / softmax.LOG2_E + jnp.log(total)
    lse_t1[...] = jnp.where(none, -jnp.inf, lse)


def _load(refs, pages: int, start, until, dtype):
  """Latents and rotary keys of a step's pages, zeros where none is seen."""
  of_input = [refs[at : at + pages] for at in range(0, len(refs), pages)]
  c_SC = [ref[...] for ref in of_input[0]]
  if len(of_input) == 3:
    scaled = zip(c_SC, of_input[2], strict=True)
    c_SC = [_dequantize(c_sC, ref[...], dtype) for c_sC, ref in scaled]
  k_rope_SR = [ref[...] for ref in of_input[1]]

  def tokens(loaded):
    x_SD = jnp.concatenate(loaded) if pages > 1 else loaded[0]
    s_SD = start + jax.lax.broadcasted_iota(jnp.int32, x_SD.shape, 0)
    return jnp.where(s_SD < until, x_SD, jnp.zeros_like(x_SD))

  return tokens(c_SC), tokens(k_rope_SR)


def _dequantize(values_sC, scale_cs, dtype):
  """value * scale in f32, rounded; 128 columns to a scale."""
  scale_sc = scale_cs.T
  tiles = [
    values_sC[:, k * tpu.LANES : (k + 1) * tpu.LANES].astype(jnp.float32)
    * scale_sc[:, k : k + 1]
    for k in range(scale_sc.shape[1])
  ]
  return jnp.concatenate(tiles, axis=1).astype(dtype)


def _dot(x, y, dims):
  """The matrix unit, f32 sums; of f32 operands all bits."""
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, dims, precision=exact, preferred_element_type=jnp.float32
  )


def _cost(q_BTNY, cache: caches.LatentPages, table_Bb) -> pl.CostEstimate:
  """Of rows as long as the table: more is not known before the run."""
  tokens = table_Bb.size * PAGE
  latent_dim = cache.c_psC.shape[-1]
  pairs = tokens * q_BTNY.shape[1] * q_BTNY.shape[2]
  written = q_BTNY.size // q_BTNY.shape[-1] * latent_dim * 4
  return pl.CostEstimate(
    flops=2 * pairs * (q_BTNY.shape[-1] + latent_dim),
    transcendentals=pairs,
    bytes_accessed=tokens * caches.bytes_per_token(cache)
    + q_BTNY.size * q_BTNY.dtype.itemsize
    + written,
  )
