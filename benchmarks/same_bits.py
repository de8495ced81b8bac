"""Does this tree train and generate to the same bits as another commit?

For refactors: runs both trees on this machine, one after the other, and
compares every logged number and the ids of generated tokens.

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
# Name -> number of prompts, speculative tokens, and devices of experts.
_GENERATE = {
  'greedy': (1, 0, 1),
  'greedy_batched': (4, 0, 1),
  'greedy_speculative': (1, 1, 1),
  'greedy_mesh': (4, 0, 2),
}
# 64 greedy tokens after each prompt, by the API of 0.1 or by that of today.
_TOKENS = """
import importlib.util, json, sys
import dsv3_jax
checkpoint, prompts, speculative, experts = map(json.loads, sys.argv[1:])
is_old = importlib.util.find_spec('dsv3_jax.inference.batching') is not None
if is_old:
  from dsv3_jax.inference import layout as meshes
else:
  from dsv3_jax.inference import generate, mesh as meshes
name = 'num_drafts' if is_old else 'num_speculative_tokens'
options = {name: speculative}
if experts > 1:
  options['mesh'] = meshes.make_mesh(expert=experts)
model = dsv3_jax.load(checkpoint, **options)
ids = [model.tokenizer.encode(p, add_bos=True).tolist() for p in prompts]
if is_old:
  output = model.engine.generate(ids, 64)
else:
  output = generate.generate(model.runner, ids, 64)
print(json.dumps(output.tokens))
"""
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
      _python(tree, _ENTRY, 'train', *flags)
      records[name] = _lines(workdir / 'metrics.jsonl')
    if not only or only == 'quickstart':
      records |= _generated(tree, folder)
  return records


def _generated(tree: pathlib.Path, folder: pathlib.Path) -> dict:
  """Token ids that the quickstart model continues prompts with, by case."""
  checkpoint = str(folder / 'quickstart')
  generated = {}
  for name, (num_prompts, *options) in _GENERATE.items():
    argv = (checkpoint, _PROMPTS[:num_prompts], *options)
    stdout = _python(tree, _TOKENS, *map(json.dumps, argv))
    generated[name] = json.loads(stdout)
  return generated


def _python(tree: pathlib.Path, code: str, *argv: str) -> str:
  """Runs code on the source of a tree; returns stdout."""
  environment = os.environ | {
    'PYTHONPATH': str(tree),
    'JAX_NUM_CPU_DEVICES': '8',
  }
  completed = subprocess.run(
    [sys.executable, '-c', code, *argv],
    cwd=tree,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if completed.returncode:
    raise SystemExit(f'{tree}: {" ".join(argv)}:\n{completed.stderr[-4000:]}')
  return completed.stdout


def _lines(path: pathlib.Path) -> list[dict]:
  lines = map(json.loads, path.read_text(encoding='utf-8').splitlines())
  return [
    {k: v for k, v in line.items() if k not in _CLOCK}
    for line in lines
    if line['kind'] != 'goodput'
  ]


def differences(before: dict, after: dict) -> list[str]:
  """A line for each case: number of records, and the first difference."""
  lines = []
  for name, old in before.items():
    new = after[name]
    pairs = zip(old, new, strict=False)
    first = next((f'{a} != {b}' for a, b in pairs if a != b), None)
    if first is None and len(old) != len(new):
      first = f'{len(old)} records, then {len(new)}'
    lines.append(f'{name:24} {len(old):4} records  {first or "equal"}')
  return lines


def run_commit(git: list[str], commit: str, only: str) -> dict:
  """`run` on a worktree of a commit, which is removed afterwards."""
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder) / 'before'
    add = [*git, 'worktree', 'add', '-q', '--detach', tree, commit]
    subprocess.run(add, check=True)
    try:
      return run(tree, only)
    finally:
      shutil.rmtree(tree)
      subprocess.run([*git, 'worktree', 'prune'], check=True)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--before', required=True, help='commit to compare with')
  parser.add_argument('--only', default='', choices=['', *CASES])
  parser.add_argument(
    '--keep', type=pathlib.Path, help='file to cache the other results in'
  )
  args = parser.parse_args(argv)
  here = pathlib.Path(__file__).resolve().parents[1]
  git = ['git', '-C', str(here)]
  rev_parse = subprocess.run(
    [*git, 'rev-parse', '--verify', f'{args.before}^{{commit}}'],
    capture_output=True,
    text=True,
    check=False,
  )
  if rev_parse.returncode:
    parser.error(f'--before={args.before} is no commit of this clone')
  commit = rev_parse.stdout.strip()
  key = f'{commit} {args.only}'
  cached = {}
  if args.keep and args.keep.exists():
    cached = json.loads(args.keep.read_text(encoding='utf-8'))
  if key not in cached:
    cached[key] = run_commit(git, commit, args.only)
  if args.keep:
    args.keep.write_text(json.dumps(cached), encoding='utf-8')
  lines = differences(cached[key], run(here, args.only))
  print('\n'.join(lines))
  return int(any(not line.endswith('equal') for line in lines))


if __name__ == '__main__':
  sys.exit(main())
