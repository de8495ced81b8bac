"""Every mutant is an edit of today's source that still compiles."""

import pathlib

import pytest

from tests.mutations import mutants, run

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('mutant', mutants.ALL, ids=lambda m: m.name)
def test_an_edit_can_be_made(mutant):
  text = (ROOT / mutant.path).read_text(encoding='utf-8')
  edited = run.apply(text, mutant)
  assert edited != text
  compile(edited, mutant.path, 'exec')
  assert mutant.tests and all(
    (ROOT / test.split('::')[0]).is_file() for test in mutant.tests
  )


def test_names_are_distinct():
  names = [mutant.name for mutant in mutants.ALL]
  assert len(set(names)) == len(names) >= 40


def test_an_edit_that_fits_not_once_is_refused():
  mutant = mutants.Mutant('', 'a.py', 'x', 'y', ())
  for text in ('', 'x x'):
    with pytest.raises(ValueError, match=r'a\.py has \d times'):
      run.apply(text, mutant)


def test_a_noticed_and_a_living_mutant(tmp_path):
  """The real runner on a file of its own."""
  source = tmp_path / 'tests/mutations/__init__.py'
  source.parent.mkdir(parents=True)
  (tmp_path / 'test_a.py').write_text(
    'from tests import mutations\ndef test(): assert mutations.x == 1\n'
  )
  for after, killer in (('x = 2', 'test_a.py::test'), ('x = 1.0', None)):
    source.write_text('x = 1\n')
    source.write_text(source.read_text().replace('x = 1', after))
    code, output = run.run_tests(tmp_path, ('test_a.py',))
    assert (code, 'test_a.py::test' in output) == (
      int(bool(killer)),
      bool(killer),
    )
