"""Flags, rows, tables and results files of the benchmarks.

A row is a dict of one measurement, its units in the keys; a table has a column
for each key of any row. Rows can be written as they come, one JSON object a
line, so that an interrupted run keeps its rows.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence

import jax

# Of absent hardware; named where they are installed.
COMPILERS = ('jax-cuda13-plugin', 'nvidia-cuda-nvcc', 'libtpu')

Row = dict[str, str | float | int | bool | None]

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'


class Parser(argparse.ArgumentParser):
  """Reports errors in one line and exits with 2."""

  def error(self, message: str):
    self.exit(2, f'dsv3: {" ".join(message.split())}\n')


def parser(name: str, about: str) -> Parser:
  """With `--json`, `--output` and `--rows`, which all have that use it."""
  flags = Parser(prog=f'dsv3 bench {name}', description=about.splitlines()[0])
  flags.add_argument(
    '--json', action='store_true', help='one object a line, not a table'
  )
  flags.add_argument(
    '--output',
    type=pathlib.Path,
    help=f'Markdown to append the table to ({RESULTS / name}_DEVICE.md)',
  )
  flags.add_argument(
    '--rows', type=pathlib.Path, help='file to add each row to as it comes'
  )
  return flags


class Rows(list):
  """Rows that are also written as they come: on a line each, as JSON.

  With `--json` they are printed; with `--rows` they are added to a file.
  """

  def __init__(self, args: argparse.Namespace):
    super().__init__()
    self._print, self._path = args.json, args.rows

  def append(self, row: Row) -> None:
    super().append(row)
    if self._print:
      print(json.dumps(row), flush=True)
    if self._path is not None:
      with self._path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')


def publish(
  name: str, about: str, rows: Sequence[Row], args: argparse.Namespace
) -> None:
  """Prints the table and appends it to a file, with hardware and versions.

  args: of `parser`; with `json`, the rows were printed as they came.
  """
  if not args.json:
    print(f'{table(rows)}\n\n{about}\n{where_line()}\n')
  write(
    args.output or RESULTS / f'{name}_{device_slug()}.md', name, about, rows
  )


def write(
  output: pathlib.Path, name: str, about: str, rows: Sequence[Row]
) -> None:
  """Appends a table to a file, with command, hardware and versions."""
  command = f'python -m benchmarks.{name} {shlex.join(sys.argv[1:])}'.strip()
  text = f'{table(rows)}\n\n{about}\n`{command}`: {where_line()}\n'
  output.parent.mkdir(parents=True, exist_ok=True)
  fresh = not output.exists()
  with output.open('a', encoding='utf-8') as file:
    file.write(f'# {name}\n\n{text}' if fresh else f'\n## Again\n\n{text}')


def table(rows: Sequence[Row]) -> str:
  """Markdown; a cell without value is empty, a column of such is left out."""
  names = dict.fromkeys(name for row in rows for name in row)
  names = [n for n in names if any(row.get(n) is not None for row in rows)]
  lines = [names, ['---'] * len(names)]
  lines += [[row.get(name) for name in names] for row in rows]
  return '\n'.join(map(line, lines))


def line(cells: Iterable) -> str:
  """One line of a table."""
  return f'| {" | ".join(map(_cell, cells))} |'


def _cell(value) -> str:
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'
  return str(value).replace('|', '/').replace('\n', ' ')


def where() -> Row:
  """Hardware, versions, commit and a hash of the kernels' source."""
  device = jax.devices()[0]
  facts = {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'device': _cpu() if device.platform == 'cpu' else device.device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': importlib.metadata.version('jaxlib'),
    **_compilers(),
    'commit': _output(
      *('git', '-C', str(ROOT), 'describe', '--always', '--dirty'),
      '--exclude=*',
    ),
    'source': source_hash(),
  }
  if device.platform == 'gpu':
    query = 'driver_version,clocks.max.sm,clocks.max.mem,power.limit'
    facts[f'nvidia_smi({query})'] = _output(
      'nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader'
    )
  return facts


def where_line() -> str:
  """`where`, as a sentence for people."""
  return '; '.join(f'{name} {value}' for name, value in where().items()) + '.'


def source_hash() -> str:
  """Of all files of `pallas_kernels`: names a state that git does not know."""
  total = hashlib.sha256()
  for path in sorted((ROOT / 'pallas_kernels').rglob('*.py')):
    total.update(path.relative_to(ROOT).as_posix().encode())
    total.update(path.read_bytes())
  return total.hexdigest()[:12]


def device_slug() -> str:
  """What a results file of this hardware is called: cpu, h100, h200, ..."""
  if jax.default_backend() == 'cpu':
    return 'cpu'
  kind = jax.devices()[0].device_kind.lower()
  return re.sub(r'[^a-z0-9]+', '_', kind.replace('nvidia ', '')).strip('_')


def _compilers() -> Row:
  versions = {}
  for name in COMPILERS:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def _cpu() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  text = info.read_text(encoding='utf-8') if info.exists() else ''
  names = re.findall(r'model name\s*: (.*)', text) or [platform.processor()]
  # A name may be cut short where the machine is virtual; `lscpu` shows these.
  numbers = re.search(r'cpu family\s*: (\d+)\s*model\s*: (\d+)', text)
  kind = ' (family {}, model {})'.format(*numbers.groups()) if numbers else ''
  return f'{os.cpu_count()} cores of {names[0]}{kind}'


def _output(*command: str) -> str:
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return done.stdout.strip()


def read_rows(lines: Iterable[str]) -> list[Row]:
  """Rows as `Rows` wrote them; the last may be incomplete."""
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows
