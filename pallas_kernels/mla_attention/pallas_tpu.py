"""Causal attention of MLA on TPUs, through Pallas and Mosaic: forward.

A grid over sequences, heads, blocks of queries and blocks of keys. Largest
score, sum and output of a block of queries stay in VMEM, in f32, while keys
pass; exponentials are powers of two. A block beyond the diagonal does nothing,
and names the last one before it, so that nothing is copied.

A block's last two dims must be multiples of the tile (8, 128) or whole: a block
of one head of [B, T, N, D] is not. So arrays have heads first, a layout that
XLA gives to the product before. Numbers of queries (segments, log-sum-exp) lie
along the lanes, [1, T]: [T, 1] would be padded to 128 times its size. A kernel
that needs a column transposes it once for a block.

Any length: padding is behind all keys that a query sees.

Letters: as in reference.py; here T, S are queries and keys of a block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax, tpu


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Queries and keys of a step, multiples of 128."""

  queries: int
  keys: int

  def __post_init__(self):
    for name, size in dataclasses.asdict(self).items():
      if size < tpu.LANES or size % tpu.LANES:
        raise ValueError(
          f'blocks.{name}={size} must be a multiple of {tpu.LANES}'
        )

  @property
  def common(self) -> int:
    """Lengths are padded to a multiple of it."""
    return math.lcm(self.queries, self.keys)

  def last_key(self, i):
    """The block of keys at the end of what query block i sees."""
    return jax.lax.div((i + 1) * self.queries - 1, self.keys)

  def first_query(self, j):
    """The first block of queries that sees some of key block j."""
    return jax.lax.div(j * self.keys, self.queries)


def choose_blocks(length: int) -> BlockSizes:
  """At most 512, all equal, so that little is padded.

  512 x 512 scores take 1 MiB of VMEM. Larger blocks waste more on the diagonal
  (an eighth of the work at 4,096 tokens); a step of smaller ones is as short as
  its start. Not measured.
  """
  size = pl.cdiv(length, pl.cdiv(length, 512))
  size = pl.cdiv(size, tpu.LANES) * tpu.LANES
  return BlockSizes(size, size)


def forward(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None,
  scale: float,
  *,
  blocks: BlockSizes | None = None,
  interpret=False,
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Output and log-sum-exp; see `reference.forward`.

  Args:
    blocks: None: `choose_blocks`.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams`.
  """
  length = q_BTNX.shape[1]
  blocks = blocks or choose_blocks(length)
  args = operands(q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT, blocks)
  batch, heads, padded, _ = args[0].shape
  values = v_BSNU.shape[-1]
  query = lambda b, n, i, j: (b, n, i)
  key = lambda b, n, i, j: (b, n, jnp.minimum(j, blocks.last_key(i)))
  f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
  o_BNTU, lse_BN1T = pl.pallas_call(
    functools.partial(_kernel, scale=scale * softmax.LOG2_E, blocks=blocks),
    out_shape=(
      jax.ShapeDtypeStruct((batch, heads, padded, values), q_BTNX.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
    ),
    grid=(batch, heads, padded // blocks.queries, padded // blocks.keys),
    in_specs=operand_specs(args, blocks, query, key),
    out_specs=(
      of_head(blocks.queries, values, query),
      row_of_head(blocks.queries, query),
    ),
    scratch_shapes=[
      pltpu.VMEM((blocks.queries, 1), jnp.int32),
      f32((blocks.queries, 1)),
      f32((blocks.queries, 1)),
      f32((blocks.queries, values)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tpu.VMEM_BYTES,
    ),
    cost_estimate=cost(args, products=1, of_values=1),
    interpret=interpret,
    name='mla_attention',
  )(*args)
  return tokens_first(o_BNTU, length), lse_BN1T[:, :, 0, :length]


def _kernel(
  q_TX,
  k_nope_SH,
  k_rope_SR,
  v_SU,
  segments_1T,
  segments_1S,
  o_TU,
  lse_1T,
  segments_T1,
  most_T1,
  total_T1,
  sum_TU,
  *,
  scale,
  blocks,
):
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    segments_T1[...] = column(segments_1T[...])
    most_T1[...] = jnp.full_like(most_T1, softmax.LEAST)
    total_T1[...] = jnp.zeros_like(total_T1)
    sum_TU[...] = jnp.zeros_like(sum_TU)

  @pl.when(j <= blocks.last_key(i))
  def _():
    width = k_nope_SH.shape[-1]
    scores_TS = dot(q_TX[:, :width], k_nope_SH[...], tpu.NT)
    scores_TS += dot(q_TX[:, width:], k_rope_SR[...], tpu.NT)
    ahead_TS = iota(scores_TS, 1) - iota(scores_TS, 0)
    seen_TS = ahead_TS <= i * blocks.queries - j * blocks.keys
    seen_TS &= segments_T1[...] == segments_1S[...]
    scores_TS = jnp.where(seen_TS, scores_TS * scale, softmax.HIDDEN)
    before_T1 = most_T1[...]
    most = jnp.maximum(before_T1, jnp.max(scores_TS, axis=1, keepdims=True))
    p_TS = jnp.exp2(scores_TS - most)
    decay_T1 = jnp.exp2(before_T1 - most)
    most_T1[...] = most
    total_T1[...] = total_T1[...] * decay_T1 + jnp.sum(p_TS, 1, keepdims=True)
    part_TU = dot(p_TS.astype(v_SU.dtype), v_SU[...], tpu.NN)
    sum_TU[...] = sum_TU[...] * decay_T1 + part_TU

  @pl.when(j == blocks.last_key(i))
  def _():
    o_TU[...] = (sum_TU[...] / total_T1[...]).astype(o_TU.dtype)
    lse_1T[...] = row(most_T1[...] / softmax.LOG2_E + jnp.log(total_T1[...]))


def operands(q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT, blocks):
  """Padded, heads before tokens; segments in lanes, for queries and keys."""
  if segments_BT is None:
    segments_BT = jnp.zeros(q_BTNX.shape[:2], jnp.int32)
  segments_B1T = pad(segments_BT, 1, blocks)[:, None]
  return (
    heads_first(q_BTNX, blocks),
    heads_first(k_nope_BSNH, blocks),
    pad(k_rope_BSR, 1, blocks),
    heads_first(v_BSNU, blocks),
    segments_B1T,
    segments_B1T,
  )


def operand_specs(args, blocks: BlockSizes, query, key) -> list[pl.BlockSpec]:
  """Of `operands`; query and key give sequence, head and block of a step."""
  q, k_nope, k_rope, v, *_ = (x.shape[-1] for x in args)

  def without_head(at):
    return lambda *step: (at(*step)[0], at(*step)[2], 0)

  def in_lanes(at):
    return lambda *step: (at(*step)[0], 0, at(*step)[2])

  return [
    of_head(blocks.queries, q, query),
    of_head(blocks.keys, k_nope, key),
    pl.BlockSpec((None, blocks.keys, k_rope), without_head(key)),
    of_head(blocks.keys, v, key),
    pl.BlockSpec((None, 1, blocks.queries), in_lanes(query)),
    pl.BlockSpec((None, 1, blocks.keys), in_lanes(key)),
  ]


def of_head(size: int, width: int, at) -> pl.BlockSpec:
  """A block of [B, N, T, D]."""
  return pl.BlockSpec((None, None, size, width), lambda *step: (*at(*step), 0))


def row_of_head(size: int, at) -> pl.BlockSpec:
  """A block of [B, N, 1, T]."""

  def index(*step):
    sequence, head, block = at(*step)
    return sequence, head, 0, block

  return pl.BlockSpec((None, None, 1, size), index)


def pad(x, axis: int, blocks: BlockSizes):
  """Zeros behind the tokens."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % blocks.common)
  return jnp.pad(x, widths)


def heads_first(x_BTND, blocks: BlockSizes):
  return jnp.swapaxes(pad(x_BTND, 1, blocks), 1, 2)


def tokens_first(x_BNTD, length: int):
  return jnp.swapaxes(x_BNTD, 1, 2)[:, :length]


def column(x_1T):
  """[T, 1]; whole tiles are transposed."""
  return jnp.broadcast_to(x_1T, (tpu.LANES, x_1T.shape[1])).T[:, :1]


def row(x_T1):
  """[1, T]; whole tiles are transposed."""
  return jnp.broadcast_to(x_T1, (x_T1.shape[0], tpu.LANES)).T[:1]


def iota(like, axis: int):
  return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)


def dot(x, y, dims):
  """The matrix unit, f32 sums; of f32 operands all bits."""
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, dims, precision=exact, preferred_element_type=jnp.float32
  )


def cost(args, *, products: int, of_values: int) -> pl.CostEstimate:
  """Of half the pairs, so many products X and U wide."""
  q, k_nope, k_rope, v, *_ = args
  batch, heads, length, width = q.shape
  pairs = batch * heads * length**2 // 2
  moved = sum(x.size * x.dtype.itemsize for x in (q, k_nope, k_rope, v))
  return pl.CostEstimate(
    flops=2 * pairs * (products * width + of_values * v.shape[-1]),
    transcendentals=pairs,
    bytes_accessed=2 * moved,
  )
