"""All measurements that need a Hopper GPU, in under eight minutes.

Question: are the Hopper kernels right on the device, how fast are they beside
its ceilings and PyTorch, and which block sizes are best?

  python3 -m benchmarks.hopper --output=DIR [--seconds=470] [--parts=checks,...]

Needs a source tree, JAX with CUDA, NumPy and jaxtyping (`layer` also Flax,
`routing` ml_collections); no network, no install.
PyTorch is a rival if the same python3 has it. Each part is a process of its
own with its own share of the time, so that a kernel that hangs ends one part:

  checks      every kernel against the reference, again on poisoned outputs
  benchmark   `fp8_matmul`, with rivals
  layer       `fp8_layer`, the quantisers' share
  routing     `routing`: the gate, and tokens in the order of experts
  decode      `mla_decode`
  attention   `mla_attention`, with rivals
  sweep       block sizes over V3's shapes, until the time is over

DIR gets PART.jsonl, a row as soon as it is measured, PART.log and, at the end,
hopper.md. `--dry_run` takes tiny shapes on any device: interpreted kernels, or
the reference where JAX has no interpreter for them.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

from benchmarks.common import hopper_parts, report

# Second of the run at which each part must have ended, of 470.
PARTS = {
  'checks': 125,
  'benchmark': 260,
  'layer': 290,
  'routing': 310,
  'decode': 350,
  'attention': 415,
  'sweep': 460,
}
_BENCHMARKS = {
  'benchmark': 'fp8_matmul',
  'layer': 'fp8_layer',
  'routing': 'routing',
  'decode': 'mla_decode',
  'attention': 'mla_attention',
}
SECONDS = 470
# Ceilings are the library's: XLA would also try its own Triton kernels for
# seconds a shape.
_FLAGS = '--xla_gpu_enable_triton_gemm=false'
# A CPU has as many threads as devices or cores, and each interpreted warpgroup
# waits in one of its own.
_DRY_FLAGS = '--xla_force_host_platform_device_count=8'
_GRACE = 5.0  # between a part's own end and that of its process


def main(argv: list[str] | None = None) -> int:
  parser = report.Parser(
    prog='dsv3 bench hopper', description=__doc__.splitlines()[0]
  )
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--seconds', type=float, default=float(SECONDS))
  parser.add_argument('--parts', default=','.join(PARTS))
  parser.add_argument('--dry_run', action='store_true')
  parser.add_argument('--part', choices=PARTS, help='run it in this process')
  args = parser.parse_args(argv)
  names = args.parts.split(',')
  if unknown := [name for name in names if name not in PARTS]:
    parser.error(f'--parts={unknown[0]!r} must be of: {", ".join(PARTS)}')
  args.output.mkdir(parents=True, exist_ok=True)
  if args.part:
    return run_part(args)
  start, ended = time.monotonic(), {}
  for name in names:
    end = start + PARTS[name] * args.seconds / SECONDS
    ended[name] = run_process(name, args, end - time.monotonic())
    print(f'{name}: {ended[name]}', flush=True)
  text = render(args.output, ended, time.monotonic() - start)
  (args.output / 'hopper.md').write_text(text, encoding='utf-8')
  print(text)
  return int(any(status != 'done' for status in ended.values()))


def run_part(args: argparse.Namespace) -> int:
  """Checks or sweep; 1 if a kernel was wrong."""
  part = {'checks': hopper_parts.checks, 'sweep': hopper_parts.sweep}[args.part]
  rows = report.Rows(
    argparse.Namespace(json=True, rows=args.output / f'{args.part}.jsonl')
  )
  for row in part(hopper_parts.mode_here(), args.dry_run, args.seconds):
    rows.append(row)
  return int(any(row.get('wrong') for row in rows))


def run_process(name: str, args: argparse.Namespace, seconds: float) -> str:
  """Runs a part as a process; 'done', or how it ended otherwise."""
  folder = args.output
  if name in _BENCHMARKS:
    module = _BENCHMARKS[name]
    command = [f'benchmarks.{module}', f'--rows={folder / name}.jsonl']
    command += [f'--output={folder / module}.md']
  else:
    own = max(0.0, seconds - 4 * _GRACE)  # a last shape may take as long
    command = ['benchmarks.hopper', f'--part={name}', f'--output={folder}']
    command += [f'--seconds={own}']
  command += ['--dry_run'] if args.dry_run else []
  flags = f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}'.strip()
  flags += f' {_DRY_FLAGS}' if args.dry_run else ''
  with (folder / f'{name}.log').open('w', encoding='utf-8') as log:
    child = subprocess.Popen(
      [sys.executable, '-m', *command],
      stdout=log,
      stderr=subprocess.STDOUT,
      cwd=report.ROOT,
      env=os.environ | {'XLA_FLAGS': flags, 'PYTHONUNBUFFERED': '1'},
    )
    try:
      code = child.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
      child.kill()
      child.wait()
      return f'cut off after {seconds:.0f} s'
  return 'done' if code == 0 else f'exit code {code}: see {name}.log'


def render(folder: pathlib.Path, ended: dict[str, str], seconds: float) -> str:
  """One document of what the parts wrote, complete or not."""
  rows = {}
  for name in ended:
    path = folder / f'{name}.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    rows[name] = report.read_rows(lines)
  lines = ['# Kernels on a Hopper GPU', '']
  lines += [report.where_line() + f' {seconds:.0f} s in all.', '']
  lines += ['## Aims', '', report.table(aims(rows)), '']
  for name, part_rows in rows.items():
    wrong = sum(bool(row.get('wrong')) for row in part_rows)
    lines += [
      f'## {name}: {ended[name]}, {len(part_rows)} rows, {wrong} wrong',
      '',
    ]
    lines += [report.table(part_rows), '']
  return '\n'.join(lines)


def aims(rows: dict[str, list[report.Row]]) -> list[report.Row]:
  """Targets beside measurements; nothing where a row is absent."""
  by_key = {
    (row['op'], row['case'].split(' ')[0], row['implementation']): row
    for row in rows.get('benchmark', [])
    if 'implementation' in row
  }

  def value(op, case, key, name='pallas'):
    return by_key.get((op, case, name), {}).get(key)

  speed = 'tflop_per_second'
  blocks = 'torch _scaled_mm, block scales'
  over = 'pallas_speed_over_this'
  out = 'attention_out'
  table = [
    ('forward 4096x7168x16384, TFLOP/s', 1150, ('forward', out, speed)),
    ('the same over BF16', 1.4, ('forward', out, 'of_bf16_dot')),
    ('the same over PyTorch', 0.85, ('forward', out, over, blocks)),
    ('grouped 8x4096x4096x7168, TFLOP/s', 1050,
     ('grouped forward', 'gate_up', speed)),
    ('weight gradient, TFLOP/s', 700, ('weight gradient', 'gate_up', speed)),
    ('the same over PyTorch', 0.85,
     ('weight gradient', 'gate_up', over, blocks)),
    ('grouped weight gradient, TFLOP/s', 700,
     ('grouped weight gradient', 'gate_up', speed)),
  ]  # fmt: skip
  shares = [
    row['share_percent']
    for row in rows.get('layer', [])
    if row['what'] == 'all'
  ]
  known = [
    {'aim': text, 'wanted': wanted, 'measured': value(*key)}
    for text, wanted, key in table
  ]
  share = {'aim': 'quantisers, % of a layer, at most', 'wanted': 8.0}
  return [*known, share | {'measured': shares[0] if shares else None}]


if __name__ == '__main__':
  sys.exit(main())
