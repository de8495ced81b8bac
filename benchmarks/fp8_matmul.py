"""FP8 products and quantisers beside the ceilings of the same device and run.

Question: how fast is each implementation at DeepSeek-V3's shapes, as a share of
what the device does anyway (a copy, a BF16 product of the same shape, an FP8
product with one scale a tensor), and of PyTorch's block-scaled product?

  dsv3 bench fp8_matmul [--json] [--only=TEXT] [--output=FILE]

Random normal data. Beside each time stand the difference from the product of
the *unquantised* operands (bound 1e-3) and the relative error to the reference
with the same FP8 operands; both on 256 rows, all columns. Variants take turns.
On a CPU, M and the number of experts are smaller, as the shapes in the table
show.
"""

import os
import sys
from collections.abc import Iterator

# PyTorch needs memory of the same device.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import clock, fp8_work, report, torch_rivals
from pallas_kernels import dispatch, numerics
from pallas_kernels.fp8_matmul import cases
from pallas_kernels.grouped_matmul import cases as grouped_cases

CHECKED_ROWS = 256
REFUSALS = (RuntimeError, ValueError, NotImplementedError)
_CPU_ROWS = 64
_CPU_GROUPS = (128, 128)  # rows of each expert
ABOUT = """Times are those of one product or quantisation.
`of_bf16_dot`, `of_fp8_dot`: the ceiling's median time over this row's;
`of_copy`: bytes per second over those of the best device copy;
`pallas_speed_over_this`: our kernel's speed over a rival's. Bytes count every
operand once, as FP8 with its scales. `difference` is
1 - 2 <x, y> / (|x|^2 + |y|^2) from the product of the unquantised operands (of
a quantiser: from its input), `relative_error` is to the reference on the same
FP8 operands; both on 256 rows, all columns.
"""


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('fp8_matmul', __doc__)
  parser.add_argument('--only', default='', help='part of "op case"')
  parser.add_argument('--dry_run', action='store_true', help='tiny shapes')
  args = parser.parse_args(argv)
  works = dry_run_works() if args.dry_run else all_works()
  works = [work for work in works if args.only in f'{work.op} {work.case}']
  if not works:
    parser.error(f'--only={args.only!r} leaves nothing')
  rows = report.Rows(args)
  timer = clock.DRY if args.dry_run else clock.default()
  measure(works, timer, rows, dry_run=args.dry_run)
  report.publish('fp8_matmul', ABOUT, rows, args)
  return int(any(row.get('wrong') for row in rows))


def implementations() -> tuple[str, ...]:
  """Those that have a kernel for this device."""
  try:
    dispatch.backend_kernel()
  except NotImplementedError:
    return ('reference',)
  return ('reference', 'pallas')


def all_works() -> list[fp8_work.Work]:
  """V3's shapes, smaller on a CPU."""
  names = implementations()
  cpu = jax.default_backend() == 'cpu'
  works = []
  for name, case in cases.V3.items():
    case = case._replace(m=_CPU_ROWS) if cpu else case
    works.append(fp8_work.product('forward', name, case, names))
  for name, case in grouped_cases.V3.items():
    if cpu and name != 'down':
      continue
    case = case._replace(sizes=_CPU_GROUPS) if cpu else case
    works.append(fp8_work.grouped(name, case, names))
    works.append(fp8_work.grouped_k(name, case, names))
  for name, case in cases.V3.items():
    if cpu and name != 'down':
      continue
    case = case._replace(m=2 * _CPU_ROWS) if cpu else case
    works.append(fp8_work.product('weight gradient', name, case, names))
  for op in ('rows', 'both', 'transposed'):
    for width in (7168, 2048):
      rows = 512 if cpu else 4096
      works.append(fp8_work.quantisation(op, rows, width, names))
  # What matters most first, should the run be stopped.
  first = ('attention_out', 'gate_up', 'x7168')
  return sorted(works, key=lambda work: not any(x in work.case for x in first))


def dry_run_works() -> list[fp8_work.Work]:
  """One tiny work of each kind, for tests."""
  names = implementations()
  tiny = cases.SMALL['ragged']
  experts = grouped_cases.Case((128, 128), 72, 200)
  return [
    fp8_work.product('forward', 'ragged', tiny, names),
    fp8_work.grouped('tiny', experts, names),
    fp8_work.grouped_k('tiny', experts, names),
    fp8_work.product('weight gradient', 'ragged', tiny, names),
    *(
      fp8_work.quantisation(op, 130, 200, names)
      for op in ('rows', 'both', 'transposed')
    ),
  ]


def measure(
  works: list[fp8_work.Work],
  timer: clock.Clock,
  rows: report.Rows,
  dry_run: bool = False,
) -> None:
  """Appends rows as they come: the copy, then work by work."""
  gpu = jax.default_backend() == 'gpu'
  rivals = torch_rivals.Rivals() if gpu else None
  sets = 4 if gpu else 1
  copy = copy_rate(timer, 1 << (20 if dry_run else 29 if gpu else 27))
  rows.append({'op': 'copy', 'case': '', 'gigabyte_per_second': copy / 1e9})
  for number, work in enumerate(works):
    for row in one_work(work, timer, sets, copy, jax.random.key(number)):
      rows.append(row)
    if work.op in ('forward', 'weight gradient'):
      for row in rival_rows(work, rivals, rows):
        rows.append(row)
  if rivals is not None:
    rivals.close()


def copy_rate(timer: clock.Clock, size: int) -> float:
  """Bytes read and written a second: the best of two ways to copy."""
  x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
  kernels = {'copy': jax.jit(jnp.copy), 'xor': jax.jit(lambda x: x ^ 1)}
  runs = {
    name: lambda kernel=kernel: kernel(x) for name, kernel in kernels.items()
  }
  for run in runs.values():
    jax.block_until_ready(run())
  times = timer.time(runs, dict.fromkeys(runs, 1))
  return 2 * x.nbytes / min(timing.median for timing in times.values())


def one_work(
  work: fp8_work.Work,
  timer: clock.Clock,
  sets: int,
  copy: float,
  key: jax.Array,
) -> Iterator[report.Row]:
  """Times and checks all variants of a work on `sets` sets of inputs."""
  draw = jax.jit(work.draw)
  operands = [draw(jax.random.fold_in(key, at)) for at in range(sets)]
  head = {'op': work.op, 'case': work.case}
  inputs_of, units, runs, outs, notes = {}, {}, {}, {}, {}
  for name, variant in work.variants.items():
    if variant.inputs not in inputs_of:
      make = variant.inputs
      make = make if make is fp8_work.same else jax.jit(make)
      inputs_of[variant.inputs] = [make(*arrays) for arrays in operands]
    inputs = inputs_of[variant.inputs]
    if name == 'reference' and work.flop:  # slow; what it loads is no matter
      inputs = inputs[:1]
    units[name] = len(inputs)
    every = lambda sets, run=variant.run: [run(*arrays) for arrays in sets]
    try:  # one that fails on this device must not end the others
      compiled = jax.jit(every).lower(inputs).compile()
      outs[name] = jax.block_until_ready(compiled(inputs))[0]
    except REFUSALS as error:
      why = ' '.join(str(error).split())[:200]
      yield head | {'implementation': name, 'note': f'refused: {why}'}
      continue
    runs[name] = lambda call=compiled, inputs=inputs: call(inputs)
    notes[name] = _note(name, compiled)
  checks = _checks(work, operands[0], outs)
  outs.clear()
  times = timer.time(runs, units)
  median = lambda name: times[name].median if name in times else None
  for name, timing in times.items():
    rate = work.bytes / timing.median
    ours = bool(work.variants[name].implementation)
    share = lambda other, timing=timing: other and other / timing.median
    yield {
      **head,
      'implementation': name,
      **timing.row(),
      'tflop_per_second': work.flop / timing.median / 1e12 or None,
      'gigabyte_per_second': rate / 1e9 if ours else None,
      'of_bf16_dot': share(median(fp8_work.BF16_DOT)),
      'of_fp8_dot': share(median(fp8_work.FP8_DOT)),
      'of_copy': rate / copy if ours else None,
      **checks.get(name, {}),
      'note': notes[name] or None,
    }


def _note(name: str, compiled) -> str:
  """What XLA made of a variant, if not what its name says."""
  if jax.default_backend() != 'gpu':
    return ''
  text = compiled.as_text()
  if name == fp8_work.FP8_DOT and '$f8' not in text:
    return 'no FP8 kernel: XLA widens it'
  if name == 'pallas' and 'mosaic' not in text:
    return 'no kernel of ours: a fusion of XLA'
  return ''


def _checks(work: fp8_work.Work, operands, outs) -> dict[str, report.Row]:
  """Differences of each variant, on some rows."""
  exact = np.asarray(
    jax.jit(lambda *x: _checked_rows(work.exact(*x)))(*operands)
  )
  checks, got = {}, {}
  for name, out in outs.items():
    if not work.variants[name].comparable:
      continue
    ours = bool(work.variants[name].implementation)
    decode = work.decode if ours else lambda out: out
    rows = jax.jit(lambda out, decode=decode: _checked_rows(decode(out)))
    got[name] = np.asarray(rows(out), np.float32)
    checks[name] = {'difference': numerics.difference(got[name], exact)}
    wrong = not checks[name]['difference'] < numerics.FP8_DIFFERENCE
    if ours and name != 'reference' and 'reference' in got:
      error = numerics.relative_error(got[name], got['reference'])
      checks[name]['relative_error'] = error
      wrong |= not error <= _bound(out)
    if ours and wrong:
      checks[name]['wrong'] = True
  return checks


def _bound(out) -> float:
  """Of the relative error; that of a quantiser is one step of e4m3."""
  if isinstance(out, jax.Array):
    return numerics.SAME_OPERANDS[str(out.dtype)]
  return 1 / 14


def _checked_rows(out):
  """At most `CHECKED_ROWS` rows, the first and the last among them."""
  out = out.reshape(-1, out.shape[-1])
  at = np.linspace(0, out.shape[0] - 1, min(CHECKED_ROWS, out.shape[0]))
  return out[np.unique(at.astype(int))]


def rival_rows(
  work: fp8_work.Work, rivals: torch_rivals.Rivals | None, rows: report.Rows
) -> Iterator[report.Row]:
  """PyTorch's rows of a work, each with what our kernel's speed is of it."""
  head = {'op': work.op, 'case': work.case}
  if rivals is None:
    if not any('torch' in row.get('implementation', '') for row in rows):
      why = 'absent: PyTorch multiplies block-scaled FP8 on NVIDIA GPUs only'
      yield head | {'implementation': 'torch _scaled_mm', 'note': why}
    return
  m, n, k = map(int, work.case.split()[1].split('x'))
  answers = rivals.time(m, n, k, block=work.op == 'forward')
  if rivals.absent:
    yield head | {'implementation': 'torch', 'note': f'absent: {rivals.absent}'}
    return
  ours = {
    row['implementation']: row for row in rows if head.items() <= row.items()
  }
  for answer in answers:
    row = head | {'implementation': answer['name']}
    if 'absent' in answer:
      yield row | {'note': f'refused: {answer["absent"]}'}
      continue
    times = clock.summary(answer['samples'])
    row |= times.row()
    row['tflop_per_second'] = work.flop / times.median / 1e12
    row['difference'] = answer['difference']
    if 'milliseconds_median' in ours.get('pallas', {}):
      seconds = ours['pallas']['milliseconds_median'] * 1e-3
      row['pallas_speed_over_this'] = times.median / seconds
    yield row


if __name__ == '__main__':
  sys.exit(main())
