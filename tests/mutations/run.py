"""Which test notices each mutant: a table, and exit code 1 if one lives.

  python -m tests.mutations.run [--only=TEXT] [--output=FILE]

The tests are first run on the source as it is: all must pass. Then each edit is
made in a copy of the working tree and its tests run until one fails.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutations import mutants

ROOT = pathlib.Path(__file__).resolve().parents[2]
_FAILED = re.compile(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', re.MULTILINE)
_SECONDS = 1800  # of one mutant's tests


def copy_tree(target: pathlib.Path) -> None:
  """The working tree without what git ignores."""
  command = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
  names = subprocess.check_output(command, cwd=ROOT, text=True)
  for name in filter(None, names.split('\0')):
    if (ROOT / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, target / name)
  shared = ROOT.parent / 'shared'
  if shared.is_dir():  # data that some tests read beside the checkout
    (target.parent / 'shared').symlink_to(shared)


def run_tests(folder: pathlib.Path, tests: tuple[str, ...]) -> tuple[int, str]:
  """The exit code of pytest, and what it printed."""
  command = [sys.executable, '-m', 'pytest', '-q', '-x', '--tb=line', *tests]
  env = os.environ | {'PYTHONPATH': str(folder)}
  env['PYTHONDONTWRITEBYTECODE'] = '1'  # an edit may keep a file's size and age
  done = subprocess.run(
    command,
    cwd=folder,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    timeout=_SECONDS,
    check=False,
  )
  return done.returncode, done.stdout


def mutate(folder: pathlib.Path, mutant: mutants.Mutant) -> None:
  """Makes the edit in the copy."""
  text = (ROOT / mutant.path).read_text(encoding='utf-8')
  (folder / mutant.path).write_text(apply(text, mutant), encoding='utf-8')


def apply(text: str, mutant: mutants.Mutant) -> str:
  """The text with the edit.

  Raises:
    ValueError: `before` stands not once in it.
  """
  count = text.count(mutant.before)
  if count != 1:
    raise ValueError(f'{mutant.path} has {count} times {mutant.before!r}')
  return text.replace(mutant.before, mutant.after)


def try_mutant(folder: pathlib.Path, mutant: mutants.Mutant) -> str | None:
  """The test that fails with the edit; None if all pass."""
  mutate(folder, mutant)
  try:
    code, output = run_tests(folder, mutant.tests)
  finally:
    shutil.copy2(ROOT / mutant.path, folder / mutant.path)
  if code == 0:
    return None
  failed = _FAILED.search(output)
  if code != 1 or failed is None or '::' not in failed[1]:
    raise RuntimeError(f'{mutant.name}: pytest ended with {code}\n{output}')
  return failed[1]


def row(mutant: mutants.Mutant, killer: str | None, seconds: float) -> str:
  """A line of the table."""
  path = mutant.path.removeprefix('dsv3_jax/')
  killed = f'`{killer.removeprefix("tests/")}`' if killer else '**lives**'
  return f'| {mutant.name} | `{path}` | {killed} | {seconds:.0f} |'


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='part of a name or path')
  parser.add_argument('--output', type=pathlib.Path, help='Markdown file')
  args = parser.parse_args(argv)
  chosen = [
    mutant for mutant in mutants.ALL if args.only in mutant.name + mutant.path
  ]
  tests = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
  lines = ['| Edit | File | Noticed by | s |', '|---|---|---|---|']
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch, 'tree')
    copy_tree(folder)
    print(f'{len(tests)} files of tests on the source as it is', flush=True)
    code, output = run_tests(folder, tests)
    if code:
      raise SystemExit(f'the tests fail without an edit\n{output}')
    alive = 0
    for mutant in chosen:
      start = time.monotonic()
      killer = try_mutant(folder, mutant)
      alive += killer is None
      lines.append(row(mutant, killer, time.monotonic() - start))
      print(lines[-1], flush=True)
  lines.append(f'\n{len(chosen) - alive} of {len(chosen)} edits are noticed.')
  print(lines[-1])
  if args.output:
    args.output.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return int(alive > 0)


if __name__ == '__main__':
  sys.exit(main())
