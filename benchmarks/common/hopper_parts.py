"""The checks and the sweep of `benchmarks.hopper`: rows, as they come.

A product is one of four: 'block' and 'row' have 128 x 128 and 1 x 128 scales
of b, 'grouped' and 'grouped_k' are those of many experts. Checked too are the
quantisers 'both' and 'transposed', which must give the bits of the reference,
and both attentions (`attention_checks`).
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import attention_checks, clock, report
from pallas_kernels import compat, numerics, quantized
from pallas_kernels.fp8_matmul import (
  cases,
  pallas_gpu,
  quantize_gpu,
  reference,
)
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import pallas_gpu as grouped_gpu
from pallas_kernels.grouped_matmul import reference as grouped_reference

BF16, F32 = jnp.bfloat16, jnp.float32
QUANTISERS = ('both', 'transposed')
SHARED_MEMORY = 227 * 1024  # of a program on Hopper
_REFUSALS = (RuntimeError, ValueError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One of the six and its case; mode: 'gpu', 'interpret', 'reference'."""

  kind: str
  name: str
  case: Any
  mode: str

  @property
  def out_dtype(self):
    return BF16 if self.kind in ('block', 'grouped') else F32

  @property
  def bound(self) -> float:
    """Of `error`."""
    if self.kind in QUANTISERS:
      return 0.0
    return numerics.SAME_OPERANDS[jnp.dtype(self.out_dtype).name]

  def error(self, got, want) -> float:
    return float(_relative_error(got, want))

  @property
  def flop(self) -> float:
    case = self.case
    rows = sum(case.sizes) if hasattr(case, 'sizes') else case.m
    return 2.0 * rows * case.n * case.k

  def function(self, mode: str, blocks=None) -> Callable[..., jax.Array]:
    """Of the operands of `draw`."""
    if self.kind in QUANTISERS:
      return _quantiser(self.kind, mode)
    more = {'blocks': blocks, 'interpret': mode == 'interpret'}
    if self.kind in ('block', 'row'):
      if mode == 'reference':
        return lambda a, b: reference.matmul(a, b, self.out_dtype)
      return lambda a, b: pallas_gpu.matmul(a, b, self.out_dtype, **more)
    last = BF16 if self.kind == 'grouped' else len(self.case.sizes)
    module, name = grouped_gpu, self.kind
    if mode == 'reference':
      module, more = grouped_reference, {}
    return lambda *operands: getattr(module, name)(*operands, last, **more)

  def draw(self, key: jax.Array) -> tuple:
    """Operands with scales over forty powers of two."""
    case = self.case
    if self.kind in QUANTISERS:
      x_MD, _ = jax.jit(_normal, static_argnums=(1, 2))(
        key, (case.m, case.k), (1, 1)
      )
      x_MD = x_MD.astype(BF16)
      both = self.kind == 'both'
      return (x_MD if both else jax.jit(reference.quantize)(x_MD),)
    if self.kind == 'block':
      shapes = (case.m, case.k), (case.n, case.k)
      return _draw(key, *shapes, quantized.BLOCK)
    if self.kind == 'row':  # a weight gradient contracts the tokens
      return _draw(key, (case.k, case.m), (case.n, case.m), quantized.ROW)
    expert_j, used_J = layout(case.sizes)
    tail = (jnp.asarray(expert_j), jnp.int32(used_J.size // 128 - 1))
    rows, count = used_J.size, len(case.sizes)
    if self.kind == 'grouped':
      shapes = (rows, case.k), (count, case.n, case.k)
      return *_draw(key, *shapes, quantized.BLOCK, used_J[:, None]), *tail
    shapes = (case.k, rows), (case.n, rows)
    return *_draw(key, *shapes, quantized.ROW, used_J), *tail


def layout(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Expert of each block of 128 rows, and rows in use; one block is spare."""
  experts, used = [], []
  for expert, size in enumerate(sizes):
    blocks = -(-size // 128)
    experts += [expert] * blocks
    used.append(np.arange(128 * blocks) < size)
  used = np.concatenate([*used, np.zeros(128, bool)])
  return np.array([*experts, len(sizes) - 1], np.int32), used


def _quantiser(kind: str, mode: str) -> Callable[..., Any]:
  name = {'both': 'quantize_both', 'transposed': 'requantize_transposed'}[kind]
  if mode == 'reference':
    return getattr(reference, name)
  run = getattr(quantize_gpu, name)
  return functools.partial(run, interpret=mode == 'interpret')


def _draw(key, shape_a, shape_b, tile_b, used=None):
  @jax.jit
  def make(key):
    a, b = _normal(key, shape_a, shape_b)
    a = a if used is None else a * used
    return reference.quantize(a), reference.quantize(b, tile_b)

  return make(key)


def _normal(key, shape_a, shape_b):
  """Both normal; a over forty powers of two, one for each 128 of a row."""
  keys = jax.random.split(key, 3)
  steps = (*shape_a[:-1], -(-shape_a[-1] // 128))
  power = jax.random.randint(keys[2], steps, -20, 20).astype(F32)
  wide = jnp.repeat(jnp.exp2(power), 128, -1)[..., : shape_a[-1]]
  a = jax.random.normal(keys[0], shape_a) * wide
  return a, jax.random.normal(keys[1], shape_b)


def mode_here() -> str:
  """The mode of this device; jax < 0.11 has only the reference on a CPU."""
  if jax.default_backend() == 'gpu':
    return 'gpu'
  return 'interpret' if compat.RELEASE >= (0, 11) else 'reference'


def kernels(mode: str, dry_run: bool, small: bool) -> list[Kernel]:
  """All at all shapes, what matters most first; small: for checks."""
  dense, experts = cases.V3, grouped_cases.V3
  if dry_run:
    dense = {'tiny': cases.SMALL['tiny']}
    experts = {'tiny': grouped_cases.Case((0, 130), 64, 128)}
  elif small:
    dense, experts = cases.SMALL | dense, grouped_cases.SMALL | experts
  first = ('attention_out', 'gate_up')
  listed = [
    Kernel(kind, name, case, mode)
    for kinds, table in (
      (('block', 'row', *(QUANTISERS if small else ())), dense),
      (('grouped', 'grouped_k'), experts),
    )
    for kind in kinds
    for name, case in table.items()
  ]
  return sorted(listed, key=lambda kernel: kernel.name not in first)


def checks(mode: str, dry_run: bool, seconds: float) -> Iterator[report.Row]:
  """Each kernel against the reference, and again on poisoned outputs."""
  end = time.monotonic() + seconds
  every = attention_checks.kernels(mode, dry_run)
  every += kernels(mode, dry_run, small=True)
  for number, kernel in enumerate(every):
    if time.monotonic() > end:
      yield {'kernel': kernel.kind, 'case': kernel.name, 'note': 'no time'}
      continue
    row = {'kernel': kernel.kind, 'case': kernel.name, 'mode': kernel.mode}
    repeats = 2 if dry_run else 20
    try:
      yield row | check_kernel(kernel, jax.random.key(number), repeats)
    except _REFUSALS as error:
      yield row | {'wrong': True, 'note': _reason(error)}


def check_kernel(
  kernel: Kernel | attention_checks.Kernel, key: jax.Array, repeats: int
) -> report.Row:
  """Three draws of operands; each must give the same bits `repeats` times."""
  run = jax.jit(kernel.function(kernel.mode))
  want_of = jax.jit(kernel.function('reference'))
  error, other_bits, poisoned, finite = 0.0, 0, 0, True
  for at in range(3):
    operands = kernel.draw(jax.random.fold_in(key, at))
    first = jax.block_until_ready(run(*operands))
    error = max(error, kernel.error(first, want_of(*operands)))
    finite &= bool(_finite(first))
    for _ in range(repeats):
      before = _poison(first)
      again = jax.block_until_ready(run(*operands))
      poisoned += not before.isdisjoint(_addresses(again))
      other_bits += not bool(_same_bits(again, first))
  return {
    'error': error,
    'bound': kernel.bound,
    'runs': 3 * repeats,
    'runs_over_nan': int(poisoned),
    'runs_with_other_bits': other_bits,
    'wrong': not (error <= kernel.bound and finite and not other_bits),
  }


def _poison(like) -> set[int]:
  """Fills memory for such outputs with NaN and frees it; its addresses."""
  nan = lambda x: jnp.full(x.shape, jnp.nan, x.dtype)
  junk = jax.block_until_ready(jax.tree.map(nan, like))
  addresses = _addresses(junk)
  for x in jax.tree.leaves(junk):
    x.delete()
  return addresses


def _addresses(tree) -> set[int]:
  return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}


@jax.jit
def _relative_error(got, want):
  """Largest over the arrays of two trees."""

  def one(got, want):
    got, want = got.astype(F32), want.astype(F32)
    largest = jnp.max(jnp.abs(want), initial=1e-30)
    return jnp.max(jnp.abs(got - want), initial=0.0) / largest

  return jnp.stack(jax.tree.leaves(jax.tree.map(one, got, want))).max()


@jax.jit
def _finite(tree):
  finite = [jnp.all(jnp.isfinite(x.astype(F32))) for x in jax.tree.leaves(tree)]
  return jnp.stack(finite).all()


@jax.jit
def _same_bits(x, y):
  def one(x, y):
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    x, y = (jax.lax.bitcast_convert_type(z, word) for z in (x, y))
    return jnp.all(x == y)

  return jnp.stack(jax.tree.leaves(jax.tree.map(one, x, y))).all()


def sweep(mode: str, dry_run: bool, seconds: float) -> Iterator[report.Row]:
  """Times block sizes: columns and stages, then strips of the best."""
  end = time.monotonic() + seconds
  for number, kernel in enumerate(kernels(mode, dry_run, small=False)):
    if time.monotonic() > end:
      yield {'kernel': kernel.kind, 'case': kernel.name, 'note': 'no time'}
      continue
    yield from sweep_kernel(kernel, jax.random.key(number), dry_run)


def sweep_kernel(
  kernel: Kernel, key: jax.Array, dry_run: bool
) -> Iterator[report.Row]:
  sets = [kernel.draw(jax.random.fold_in(key, at)) for at in range(2)]
  best = None
  for turn in range(2):
    if turn == 0:
      sizes = block_sizes(kernel)[: 2 if dry_run else None]
    elif best is not None:
      strips = (2, 4, 16, 32)[: 1 if dry_run else None]
      sizes = [dataclasses.replace(best, strip=strip) for strip in strips]
      sizes = [best, *sizes]
    for row, blocks in _time_sizes(kernel, sets, sizes, dry_run):
      yield row
      if row.get('best') and not row.get('wrong'):
        best = blocks
    if best is None:
      return


def block_sizes(kernel: Kernel) -> list[pallas_gpu.BlockSizes]:
  """Every number of columns with three, four and the most stages that fit."""
  row_scales = kernel.kind in ('row', 'grouped_k')
  sizes = []
  for columns in (128, 64) if row_scales else (192, 128, 64):
    most = _most_stages(columns, row_scales, jnp.dtype(kernel.out_dtype))
    for stages in sorted({3, 4, most}, reverse=True):
      if stages <= most:
        sizes.append(pallas_gpu.BlockSizes(columns=columns, stages=stages))
  return sizes


def _most_stages(columns: int, row_scales: bool, out_dtype) -> int:
  """That fit beside the output's pieces; at most eight."""
  gpu = pallas_gpu
  stage = (gpu.TILE_ROWS + columns) * gpu.DEPTH + 4 * gpu.TILE_ROWS
  stage += 4 * columns if row_scales else 0
  pieces = gpu.CONSUMERS * gpu.OUT_SLOTS * gpu.ROWS * gpu.PIECE
  left = SHARED_MEMORY - 1024 - pieces * out_dtype.itemsize
  return min(8, left // stage)


def _time_sizes(kernel: Kernel, sets, sizes, dry_run: bool):
  """Rows and their block sizes; all must give the bits of the default."""
  compiled, refused = {}, {}

  def build(blocks):
    run = kernel.function(kernel.mode, blocks)
    every = jax.jit(lambda sets: [run(*operands) for operands in sets])
    return every.lower(sets)

  lowered = {}
  for blocks in (None, *sizes):
    try:
      lowered[blocks] = build(blocks)
    except _REFUSALS as error:
      refused[blocks] = _reason(error)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    waiting = {
      b: pool.submit(program.compile) for b, program in lowered.items()
    }
  runs, firsts = {}, {}
  for blocks, future in waiting.items():
    try:
      compiled[blocks] = future.result()
      firsts[blocks] = jax.block_until_ready(compiled[blocks](sets))[0]
      runs[blocks] = lambda call=compiled[blocks]: call(sets)
    except _REFUSALS as error:
      refused[blocks] = _reason(error)
  same = {
    b: None not in firsts or bool(_same_bits(x, firsts[None]))
    for b, x in firsts.items()
  }
  firsts.clear()
  timer = clock.DRY if dry_run else clock.Clock(1.5, 0.01, (7, 30))
  times = timer.time(runs, dict.fromkeys(runs, len(sets))) if runs else {}
  ranked = sorted((b for b in times if b), key=lambda b: times[b].median)
  for blocks in (None, *sizes):
    row = {'kernel': kernel.kind, 'case': kernel.name}
    row |= dataclasses.asdict(blocks) if blocks else {'note': 'the heuristic'}
    if blocks in refused:
      yield row | {'note': f'refused: {refused[blocks]}'}, blocks
      continue
    row |= times[blocks].row()
    row['tflop_per_second'] = kernel.flop / times[blocks].median / 1e12
    row |= {'same_bits': same[blocks], 'best': blocks in ranked[:1]}
    yield row | {'wrong': not same[blocks]}, blocks


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
