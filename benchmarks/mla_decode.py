"""Decoding over a paged latent cache beside the ceilings of the same device.

Question: how near does each implementation come to the ceilings of the device:
to the bandwidth of a copy where a row has few heads, to the FLOPs of a plain
BF16 dot where it has 128?

  dsv3 bench mla_decode [--json] [--only=TEXT] [--output=FILE]

Random normal data, pages in random order. Beside each time stands the
difference from the reference in f32 on the same operands (bound 1e-5), on some
rows. Variants of a case take turns. On a CPU batches and lengths are smaller,
as the shapes in the table show.
"""

import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import clock, report
from pallas_kernels import dispatch, numerics
from pallas_kernels.mla_decode import api, cases, reference

SCALE = 0.1352338  # of V3 with YaRN
DIFFERENCE = 1e-5  # of FlashMLA's own tests
CHECKED_ROWS = 2
BF16_DOT = 'bf16 dot'
CACHES = ('bf16', 'fp8')
REFUSALS = (RuntimeError, ValueError, NotImplementedError)
ABOUT = """Times are those of one layer, from absorbed queries to the output
before W_UV. `of_bf16_dot`, `of_copy`: products and bytes a second over those of
a square BF16 product and of a device copy. FLOPs count what is seen, bytes each
token of the rows once, with queries and outputs. `difference` is
1 - 2 <x, y> / (|x|^2 + |y|^2) from the reference in f32 on the same operands.
"""


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('mla_decode', __doc__)
  parser.add_argument('--only', default='', help='part of "case cache"')
  parser.add_argument('--dry_run', action='store_true', help='tiny shapes')
  args = parser.parse_args(argv)
  works = [
    (name, case, kind)
    for name, case in shapes(args.dry_run).items()
    for kind in CACHES
    if args.only in f'{name} {kind}'
  ]
  if not works:
    parser.error(f'--only={args.only!r} leaves nothing')
  rows = report.Rows(args)
  timer = clock.DRY if args.dry_run else clock.default()
  ceilings = measure_ceilings(timer, rows, args.dry_run)
  for number, work in enumerate(works):
    for row in one_work(*work, timer, ceilings, jax.random.key(number)):
      rows.append(row)
  report.publish('mla_decode', ABOUT, rows, args)
  return int(any(row.get('wrong') for row in rows))


def shapes(dry_run: bool) -> dict[str, cases.Case]:
  """V3's cases, on a CPU with fewer and shorter rows."""
  if dry_run:
    return {name: cases.SMALL[name] for name in ('ragged', 'speculative')}
  if jax.default_backend() != 'cpu':
    return cases.V3
  short = lambda case: tuple(min(n, 1024) for n in case.lengths[-2:])
  return {n: case._replace(lengths=short(case)) for n, case in cases.V3.items()}


def implementations() -> tuple[str, ...]:
  """Those that have a kernel for this device."""
  try:
    dispatch.backend_kernel()
  except NotImplementedError:
    return ('reference',)
  return ('reference', 'pallas')


def measure_ceilings(
  timer: clock.Clock, rows: report.Rows, dry_run: bool
) -> dict[str, float]:
  """Bytes a second of a copy, FLOPs a second of a product."""
  large = not dry_run and jax.default_backend() != 'cpu'
  x = jnp.zeros((1 << (27 if large else 18),), jnp.uint32)
  size = 8192 if large else 128 if dry_run else 512
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  copy, dot = jax.jit(lambda x: x ^ 1), jax.jit(jnp.dot)
  runs = {'copy': lambda: copy(x), BF16_DOT: lambda: dot(a, a)}
  for run in runs.values():
    jax.block_until_ready(run())
  times = timer.time(runs, dict.fromkeys(runs, 1))
  rates = {
    'copy': 2 * x.nbytes / times['copy'].median,
    BF16_DOT: 2 * size**3 / times[BF16_DOT].median,
  }
  rows.append(
    {'case': 'copy', 'gigabyte_per_second': rates['copy'] / 1e9}
    | times['copy'].row()
  )
  rows.append(
    {'case': BF16_DOT, 'tflop_per_second': rates[BF16_DOT] / 1e12}
    | times[BF16_DOT].row()
  )
  return rates


def draw(case: cases.Case, kind: str, key: jax.Array) -> tuple:
  """Arguments of `api.decode` before the scale."""
  keys = jax.random.split(key, 4)
  num_pages = [-(-length // api.PAGE) for length in case.lengths]
  normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  page = lambda key, width: normal(key, (sum(num_pages), api.PAGE, width))
  cache = api.LatentPages(
    page(keys[0], case.latent), page(keys[1], case.rotary)
  )
  if kind == 'fp8':
    cache = jax.jit(api.quantize)(cache)
  shape = (len(num_pages), case.queries, case.heads, case.latent + case.rotary)
  order = np.asarray(jax.random.permutation(keys[3], sum(num_pages)))
  table_Bb = np.zeros((len(num_pages), case.blocks), np.int32)
  ends = np.cumsum(num_pages)
  for row, (end, count) in enumerate(zip(ends, num_pages, strict=True)):
    table_Bb[row, :count] = order[end - count : end]
  lengths_B = jnp.asarray(case.lengths, jnp.int32)
  # Scores of about one, of which many tokens have their part.
  q_BTNY = normal(keys[2], shape) / 4
  return q_BTNY, cache, jnp.asarray(table_Bb), lengths_B


def count(case: cases.Case, args: tuple) -> tuple[int, int]:
  """FLOPs and bytes that any implementation has to do and to move."""
  q_BTNY, cache, *_ = args
  seen = sum(
    max(length - before, 0)
    for length in case.lengths
    for before in range(case.queries)
  )
  width = 2 * case.latent + case.rotary
  per_token = sum(
    x.dtype.itemsize * x.shape[-1] for x in jax.tree.leaves(cache)
  )
  outputs = q_BTNY.size // q_BTNY.shape[-1] * (2 * case.latent + 4)
  moved = sum(case.lengths) * per_token + q_BTNY.nbytes + outputs
  return 2 * seen * case.heads * width, moved


def one_work(
  name: str,
  case: cases.Case,
  kind: str,
  timer: clock.Clock,
  ceilings: dict[str, float],
  key: jax.Array,
) -> Iterator[report.Row]:
  """Times and checks all implementations on one cache."""
  args = draw(case, kind, key)
  head = {'case': name, 'shape': _shape(case), 'cache': kind}
  runs, checks = {}, {}
  for variant in implementations():
    call = functools.partial(api.decode, scale=SCALE, implementation=variant)
    try:  # one that fails on this device must not end the others
      compiled = jax.jit(call).lower(*args).compile()
      out = jax.block_until_ready(compiled(*args))
    except REFUSALS as error:
      why = ' '.join(str(error).split())[:200]
      yield head | {'implementation': variant, 'note': f'refused: {why}'}
      continue
    checks[variant] = _difference(args, out)
    runs[variant] = lambda compiled=compiled: compiled(*args)
  flop, moved = count(case, args)
  for variant, timing in timer.time(runs, dict.fromkeys(runs, 1)).items():
    row = head | {'implementation': variant} | timing.row()
    row['tflop_per_second'] = flop / timing.median / 1e12
    row['gigabyte_per_second'] = moved / timing.median / 1e9
    row['of_bf16_dot'] = flop / timing.median / ceilings[BF16_DOT]
    row['of_copy'] = moved / timing.median / ceilings['copy']
    row['difference'] = checks[variant]
    if not checks[variant] < DIFFERENCE:
      row['wrong'] = True
    yield row


def _shape(case: cases.Case) -> str:
  """Rows x queries x heads, and their tokens."""
  tokens = f'{min(case.lengths)}-{max(case.lengths)}'
  if min(case.lengths) == max(case.lengths):
    tokens = str(case.lengths[0])
  return f'{len(case.lengths)}x{case.queries}x{case.heads} over {tokens}'


def _difference(args: tuple, out: tuple) -> float:
  """Of the first and the last rows, from the reference in f32."""
  q_BTNY, cache, table_Bb, lengths_B = args
  at = np.unique(np.linspace(0, len(q_BTNY) - 1, CHECKED_ROWS).astype(int))
  pages = jnp.unique(table_Bb[at])
  table_Bb = jnp.searchsorted(pages, table_Bb[at]).astype(jnp.int32)
  latents = jax.tree.map(lambda x: x[pages], cache)
  latents = api.dequantize(latents, q_BTNY.dtype)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q_BTNY[at], latents))
  with jax.default_matmul_precision('highest'):
    want = reference.decode(*wide, table_Bb, lengths_B[at], SCALE)[0]
  return numerics.difference(np.asarray(out[0][at], np.float32), want)


if __name__ == '__main__':
  sys.exit(main())
