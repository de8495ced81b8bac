"""Operands and blocks of the Hopper kernels of MLA's attention.

Widths are padded with zeros to what TMA and wgmma take: H and U to one of 64 or
128, R to 64; none of V3's. T is padded to 8, and what has one number a token to
128: TMA fills what lies behind with zeros, and drops stores there.

Blocks of queries and of keys whose ranges of segments do not overlap have no
visible pair; a kernel begins or ends at the last of them. So of consecutive
samples only the blocks on their borders are loaded in vain.

Letters: as in reference.py; h = H = U as padded.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers, softmax
from pallas_kernels.fp8_matmul import pallas_gpu as dense

plgpu = compat.mosaic_gpu

CONSUMERS = 2  # warpgroups that multiply; one more loads
ROWS = registers.ROWS  # of a consumer: of one wgmma
BLOCK = CONSUMERS * ROWS  # what a program has, queries or keys
ROTARY = 64
WIDEST = 128
LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # of 512 for the three


class AttentionPlan(NamedTuple):
  """Constants of a launch."""

  batch: int
  length: int
  heads: int
  width: int  # h
  scale: float
  segments: bool
  interpret: bool

  @property
  def base2(self) -> float:
    """Scale of scores in powers of two."""
    return self.scale * softmax.LOG2_E

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.length, BLOCK)

  @property
  def padded(self) -> int:
    """Tokens of arrays in memory."""
    return dense.up(self.length, dense.GROUP)


def unsupported(q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU) -> str | None:
  """Why the kernels do not take such arguments, if they do not."""
  if q_BTNX.dtype != jnp.bfloat16:
    return f'q is {q_BTNX.dtype}, not bfloat16'
  wide = max(k_nope_BSNH.shape[-1], v_BSNU.shape[-1])
  if wide > WIDEST or k_rope_BSR.shape[-1] > ROTARY:
    return (
      f'widths {k_nope_BSNH.shape[-1]} + {k_rope_BSR.shape[-1]} and '
      f'{v_BSNU.shape[-1]} must be at most {WIDEST} + {ROTARY} and {WIDEST}'
    )
  return None


def plan(args, scale: float, interpret: bool) -> AttentionPlan:
  """args: q, k_nope, k_rope, v, segments.

  Raises:
    NotImplementedError: see `unsupported`.
  """
  *operands, segments_BT = args
  if reason := unsupported(*operands):
    raise NotImplementedError(reason)
  batch, length, heads, _ = args[0].shape
  widths = operands[1].shape[-1], operands[3].shape[-1]
  width = dense.up(max(widths), ROTARY)
  has_segments = segments_BT is not None
  return AttentionPlan(
    batch, length, heads, width, scale, has_segments, interpret
  )


def operands(args, plan: AttentionPlan) -> tuple:
  """q, k_nope, k_rope and v, padded."""
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, _ = args
  nope, rope = k_nope_BSNH.shape[-1], k_rope_BSR.shape[-1]
  if (nope, rope) != (plan.width, ROTARY):
    q_nope, q_rope = jnp.split(q_BTNX, [nope], axis=-1)
    parts = widen(q_nope, plan.width), widen(q_rope, ROTARY)
    q_BTNX = jnp.concatenate(parts, axis=-1)
  return (
    widen(q_BTNX, plan.width + ROTARY),
    widen(k_nope_BSNH, plan.width),
    widen(k_rope_BSR, ROTARY),
    widen(v_BSNU, plan.width),
  )


def widen(x, width: int):
  """Zeros behind the tokens and the last dim."""
  x = dense.pad(x, 1, width)
  missing = -x.shape[1] % dense.GROUP
  ends = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, ends) if missing else x


def of_tokens(x_T):
  """The last dim padded to whole blocks."""
  return dense.pad(x_T, 1, BLOCK)


def first_keys(segments_BT, queries: int, keys: int):
  """For blocks of queries the first block of keys that they may see."""
  return jnp.argmax(_blocks_overlap(segments_BT, queries, keys), axis=2).astype(
    jnp.int32
  )


def end_queries(segments_BT, queries: int, keys: int):
  """For blocks of keys the end of the blocks of queries that may see them."""
  overlap_Bij = _blocks_overlap(segments_BT, queries, keys)
  from_end = jnp.argmax(overlap_Bij[:, ::-1], axis=1)
  return (overlap_Bij.shape[1] - from_end).astype(jnp.int32)


def _blocks_overlap(segments_BT, queries: int, keys: int):
  """[B, blocks of queries, blocks of keys]: do their ranges overlap?"""

  def ranges(size):
    missing = -segments_BT.shape[1] % size
    x_BT = jnp.pad(segments_BT, ((0, 0), (0, missing)), mode='edge')
    x_BiT = x_BT.reshape(len(x_BT), -1, size)
    return x_BiT.min(-1), x_BiT.max(-1)

  (low_Bi, high_Bi), (low_Bj, high_Bj) = ranges(queries), ranges(keys)
  overlap_Bij = low_Bi[:, :, None] <= high_Bj[:, None]
  return overlap_Bij & (low_Bj[:, None] <= high_Bi[:, :, None])


def launch(
  body, plan: AttentionPlan, name: str, outputs, scratch: dict, *operands
):
  """A program for each sequence, head and block; those of a head run together.

  body: `load` and `consume`, which get refs, place, scratch and plan; scratch
  of a consumer has `staging`, see `registers.add`.
  """
  if plan.interpret:
    scratch = scratch | {'staging': memory(CONSUMERS, ROWS, BLOCK)}
  kernel = plgpu.kernel(
    functools.partial(_roles, body=body, plan=plan),
    out_type=outputs,
    scratch_types={'scratch': scratch},
    grid=(plan.batch, plan.heads, plan.blocks),
    grid_names=('sequence', 'head', 'block'),
    num_threads=CONSUMERS + 1,
    thread_name='warpgroup',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      # A row of the wgmma layout is within a warp: reductions need none.
      reduction_scratch_bytes=0,
      approx_math=True,
    ),
    interpret=compat.gpu_interpreter(plan.interpret),
  )
  return kernel(*operands)


def _roles(*refs, body, plan: AttentionPlan, scratch: dict):
  """The role of each warpgroup."""
  load, consume = body
  index = lax.axis_index('warpgroup')
  place = tuple(map(lax.axis_index, ('sequence', 'head', 'block')))

  def do_load():
    plgpu.set_max_registers(LOADER_REGISTERS, action='decrease')
    load(refs, place, scratch, plan)

  def do_consume():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')
    staging = scratch['staging'].at[index] if plan.interpret else None
    consume(refs, place, index, scratch | {'staging': staging}, plan)

  lax.cond(index == CONSUMERS, do_load, do_consume)


class Ring(NamedTuple):
  """Buffers of shared memory that blocks pass through, one after another.

  names: those that share the barriers `NAME_full` and `NAME_empty`, where NAME
  is the first.
  """

  scratch: dict
  stages: int
  names: tuple[str, ...]

  def slot(self, turn):
    return lax.rem(turn, jnp.int32(self.stages))

  def fill(self, turn, sources) -> None:
    """Loads the block of `turn` as soon as its buffers are free."""
    slot = self.slot(turn)
    full, empty = self._barriers(slot)

    @pl.when(turn >= self.stages)
    def _():
      plgpu.barrier_wait(empty)

    for name, source in zip(self.names, sources, strict=True):
      plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot], full)

  def drain(self, turns) -> None:
    """Waits for the last use of each buffer: barriers must end in phase."""

    @pl.loop(lax.max(turns - self.stages, 0), turns)
    def _(turn):
      plgpu.barrier_wait(self._barriers(self.slot(turn))[1])

  def take(self, turn) -> list:
    """The buffers of `turn`, when they are full."""
    slot = self.slot(turn)
    plgpu.barrier_wait(self._barriers(slot)[0])
    return [self.scratch[name].at[slot] for name in self.names]

  def release(self, turn) -> None:
    plgpu.barrier_arrive(self._barriers(self.slot(turn))[1])

  def _barriers(self, slot):
    name = self.names[0]
    return (
      self.scratch[f'{name}_full'].at[slot],
      self.scratch[f'{name}_empty'].at[slot],
    )


def ring_scratch(stages: int, buffers: dict, line: int = 128) -> dict:
  """Of a `Ring`: buffers of shape and type, and two barriers a stage."""
  name = next(iter(buffers))
  barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
  scratch = {
    key: memory(stages, *shape, dtype=dtype, line=line)
    for key, (shape, dtype) in buffers.items()
  }
  return scratch | {
    f'{name}_full': barrier(num_arrivals=len(buffers)),
    f'{name}_empty': barrier(num_arrivals=CONSUMERS),
  }


def memory(*shape, dtype=jnp.bfloat16, line: int = 128):
  """Shared memory: BF16 as wgmma has it, and numbers of tokens.

  line: swizzled bytes; wgmma contracts a multiple of them.
  """
  if dtype == jnp.bfloat16:
    return dense.swizzled(shape, dtype, line)
  return plgpu.SMEM(shape, dtype)


def hide(x, value: float, plan: AttentionPlan, ahead, segments, keys: int = 1):
  """A tile x with `value` where a query and a key do not meet.

  ahead: how far the first query is ahead of the first key; None: far enough.
  segments: of the tile's rows and columns. keys: the dim that they are.
  """
  hidden = jnp.full(x.shape, value, x.dtype)
  if ahead is not None:
    apart = registers.iota(x.shape, keys) - registers.iota(x.shape, 1 - keys)
    x = registers.tile(jnp.where(apart <= ahead, x, hidden))
  if plan.segments:
    of_rows, of_columns = segments
    same = registers.from_rows(of_rows, x.shape) == registers.from_columns(
      of_columns, x.shape
    )
    x = registers.tile(jnp.where(same, x, hidden))
  return x


def load(sources: dict, scratch, barrier: str) -> None:
  """Copies each to the memory of its name."""
  for name, source in sources.items():
    plgpu.copy_gmem_to_smem(source, scratch[name], scratch[barrier])
