"""Does this tree train and generate to the same bits as another commit?

For refactors: runs both trees on this machine, one after the other, and
compares every logged number and every generated token.

  python -m benchmarks.same_bits --before=COMMIT [--only=CASE]

Cases: the first 100 steps of quickstart and 64 greedy tokens of it, plain,
batched and with speculative tokens; FP8 on pipe x expert x data; schedules,
context parallelism, FSDP and the deterministic mode in f32.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

_CLOCK = ('tokens_per_second', 'mfu', 'prefill_seconds', 'decode_seconds')
_QUICK = ('experiments/quickstart.py', {
  'train.total_tokens': 102_400,
  'train.log_every': 1,
  'eval.max_bytes': 20_000,
  'checkpoint.every_steps': 100,
})  # fmt: skip
_SMALL = {
  'train.log_every': 1,
  'eval.max_bytes': 2000,
  'sample.max_new_tokens': 8,
}
_MESH = {
  'train.batch_size': 32,
  'train.batch_size_start': 32,
  'train.total_tokens': 32 * 64 * 6,
}


def _local(config: str, **settings) -> tuple[str, dict]:
  named = {name.replace('__', '.'): x for name, x in settings.items()}
  return f'experiments/{config}', _SMALL | _MESH | named


CASES = {
  'quickstart': _QUICK,
  'fp8_pipe_expert_data': _local(
    'v3_671b.py:runlocal',
    parallel__pipe=2,
    parallel__expert=2,
    parallel__data=2,
  ),
  'fp8_one_device': _local('v3_671b.py:runlocal'),
  'zb1p_node_data': _local(
    'quickstart.py:runlocal',
    parallel__pipe=2,
    parallel__node=2,
    parallel__data=2,
    parallel__schedule='zb1p',
  ),
  'context_fsdp': _local(
    'quickstart.py:runlocal',
    parallel__context=2,
    parallel__data=2,
    parallel__expert=2,
    parallel__fsdp="('data',)",
    model__remat='report',
  ),
  'deterministic': _local(
    'quickstart.py:runlocal', parallel__data=2, parallel__deterministic=True
  ),
}
_PROMPTS = ('import ', 'def main(', 'The ', 'class Test')
_GENERATE = {
  'greedy': ['--prompt=import '],
  'greedy_batched': ['--prompts=PROMPTS'],
  'greedy_speculative': ['--prompt=import ', '--num_drafts=1'],
  'greedy_mesh': ['--prompts=PROMPTS', '--parallel.expert=2'],
}
_ENTRY = (
  'import sys; from dsv3_jax.cli import main; '
  'sys.exit(getattr(main, "main", main)(sys.argv[1:]))'
)


def run(tree: pathlib.Path, only: str = '') -> dict:
  """Metrics and generated tokens of a tree, by case."""
  records = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for name, (config, settings) in CASES.items():
      if only and only != name:
        continue
      workdir = folder / name
      flags = [f'--config={config}', f'--workdir={workdir}']
      flags += [f'--config.{key}={value}' for key, value in settings.items()]
      _dsv3(tree, 'train', *flags)
      records[name] = _lines(workdir / 'metrics.jsonl')
    if not only or only == 'quickstart':
      records |= _generated(tree, folder)
  return records


def _generated(tree: pathlib.Path, folder: pathlib.Path) -> dict:
  prompts = folder / 'prompts.jsonl'
  rows = [json.dumps({'prompt': prompt}) for prompt in _PROMPTS]
  prompts.write_text('\n'.join(rows), encoding='utf-8')
  options = ['--max_new_tokens=64', '--temperature=0', '--json']
  options.append(f'--checkpoint={folder / "quickstart"}')
  generated = {}
  for name, flags in _GENERATE.items():
    flags = [flag.replace('PROMPTS', str(prompts)) for flag in flags]
    text = _dsv3(tree, 'generate', *options, *flags)
    generated[name] = [json.loads(line) for line in text.splitlines()]
  return generated


def _dsv3(tree: pathlib.Path, *argv: str) -> str:
  """Runs a `dsv3` command of a tree; returns stdout."""
  environment = os.environ | {
    'PYTHONPATH': str(tree),
    'JAX_NUM_CPU_DEVICES': '8',
  }
  ended = subprocess.run(
    [sys.executable, '-c', _ENTRY, *argv],
    cwd=tree,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if ended.returncode:
    raise SystemExit(f'{tree}: dsv3 {" ".join(argv)}:\n{ended.stderr[-4000:]}')
  return ended.stdout


def _lines(path: pathlib.Path) -> list[dict]:
  lines = path.read_text(encoding='utf-8').splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in _CLOCK}
    for line in lines
  ]


def differences(before: dict, after: dict) -> list[str]:
  """A line for each case: number of records, and the first difference."""
  lines = []
  for name, old in before.items():
    new = after[name]
    pairs = enumerate(zip(old, new, strict=False))
    first = next((f'{a} != {b}' for _, (a, b) in pairs if a != b), None)
    if first is None and len(old) != len(new):
      first = f'{len(old)} records, then {len(new)}'
    lines.append(f'{name:24} {len(old):4} records  {first or "equal"}')
  return lines


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--before', required=True, help='commit to compare with')
  parser.add_argument('--only', default='', choices=['', *CASES])
  parser.add_argument(
    '--keep', type=pathlib.Path, help='file to cache the other results in'
  )
  given = parser.parse_args()
  here = pathlib.Path(__file__).resolve().parents[1]
  if given.keep and given.keep.exists():
    before = json.loads(given.keep.read_text(encoding='utf-8'))
  else:
    with tempfile.TemporaryDirectory() as folder:
      tree = pathlib.Path(folder) / 'before'
      git = ['git', '-C', str(here), 'worktree']
      subprocess.run([*git, 'add', '-q', tree, given.before], check=True)
      try:
        before = run(tree, given.only)
      finally:
        shutil.rmtree(tree)
        subprocess.run([*git, 'prune'], check=True)
  if given.keep:
    given.keep.write_text(json.dumps(before), encoding='utf-8')
  after = json.loads(json.dumps(run(here, given.only)))
  before = {name: x for name, x in before.items() if name in after}
  lines = differences(before, after)
  print('\n'.join(lines))
  return int(any(not line.endswith('equal') for line in lines))


if __name__ == '__main__':
  sys.exit(main())
