"""Every benchmark says what it answers, without running anything."""

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [
  module.name
  for module in pkgutil.iter_modules(benchmarks.__path__)
  if not module.ispkg
]
RIVALS = {'train_vs_transformers': ('torch', 'transformers')}


@pytest.mark.parametrize('name', NAMES)
def test_help_is_the_first_line_of_the_module(name, monkeypatch, capsys):
  for rival in RIVALS.get(name, ()):
    pytest.importorskip(rival)
  monkeypatch.setenv('COLUMNS', '200')  # no line is broken
  monkeypatch.setenv('OMP_NUM_THREADS', '2')  # what an import sets is undone
  module = importlib.import_module(f'benchmarks.{name}')
  with pytest.raises(SystemExit) as ended:
    module.main(['--help'])
  assert not ended.value.code
  assert module.__doc__.splitlines()[0] in capsys.readouterr().out
