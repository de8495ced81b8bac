"""`dsv3 bench NAME`: runs a script of `benchmarks/`, which only a clone has."""

import importlib
import pathlib
import pkgutil
import sys

from dsv3_jax import errors

CLONE = pathlib.Path(__file__).resolve().parents[2]


def bench(argv: list[str]) -> int:
  """Runs a benchmark of a clone: NAME, then its own flags (NAME --help)."""
  names = _names()
  name = argv[0] if argv else ''
  if name in ('-h', '--help'):
    print(f'dsv3 bench NAME: {bench.__doc__}\n\n' + '\n'.join(names))
    return 0
  if name not in names:
    raise errors.InputError(
      f'benchmark {name!r} must be one of: {", ".join(names)}'
    )
  before, sys.argv = sys.argv, [name, *argv[1:]]
  try:  # like `python -m benchmarks.NAME`, which every script supports
    return importlib.import_module(f'benchmarks.{name}').main() or 0
  except SystemExit as exit_:
    return exit_.code or 0
  finally:
    sys.argv = before


def _names() -> list[str]:
  """Names of all benchmarks; makes them importable.

  Raises:
    InputError: the package does not run from a clone.
  """
  folder = CLONE / 'benchmarks'
  # Beside an installed package, `benchmarks` would be some other project's.
  if not folder.is_dir() or not (CLONE / 'pyproject.toml').is_file():
    raise errors.InputError(
      'benchmarks are not part of the installed package: run `dsv3 bench` from '
      'a clone that was installed with `pip install -e .`'
    )
  if str(CLONE) not in sys.path:
    sys.path.insert(0, str(CLONE))
  import benchmarks

  modules = pkgutil.iter_modules(benchmarks.__path__)
  return [module.name for module in modules if not module.ispkg]
