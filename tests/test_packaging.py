"""What the wheel holds: the library and its experiments, no scripts."""

import configparser
import pathlib
import subprocess
import sys
import zipfile

import pytest
import setuptools

from dsv3_jax.cli import bench, main

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP_LEVEL = {'dsv3_jax', 'experiments', 'pallas_kernels'}


def packages():
  """What setuptools puts into the wheel."""
  setup = configparser.ConfigParser(inline_comment_prefixes='#')
  setup.read(ROOT / 'setup.cfg')
  include = setup['options.packages.find']['include'].split()
  return setuptools.find_packages(str(ROOT), include=include)


def test_the_wheel_has_three_top_level_packages():
  assert {name.split('.')[0] for name in packages()} == TOP_LEVEL


def test_every_folder_of_source_is_a_package():
  folders = {
    '.'.join(path.parent.relative_to(ROOT).parts)
    for top in TOP_LEVEL
    for path in (ROOT / top).rglob('*.py')
  }
  assert folders == set(packages())


@pytest.mark.slow
def test_a_built_wheel(tmp_path):
  """Without isolation, so that nothing is fetched."""
  build = ['wheel', '.', '--no-deps', '--no-build-isolation', '-q', '-w']
  copy = tmp_path / 'clone'  # setuptools leaves a build folder behind
  files = subprocess.run(
    ['git', 'ls-files', '-z', *TOP_LEVEL, 'benchmarks', '*.cfg', '*.toml',
     'README.md', 'LICENSE'],
    cwd=ROOT, check=True, capture_output=True, text=True,
  ).stdout.split('\0')  # fmt: skip
  for name in filter(None, files):
    if (ROOT / name).exists():
      (copy / name).parent.mkdir(parents=True, exist_ok=True)
      (copy / name).write_bytes((ROOT / name).read_bytes())
  subprocess.run(
    [sys.executable, '-m', 'pip', *build, tmp_path], cwd=copy, check=True
  )
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  tops = {name.split('/')[0] for name in names}
  assert {name for name in tops if '.dist-info' not in name} == TOP_LEVEL
  assert 'dsv3_jax/server/page.html' in names


def test_benchmarks_are_found_in_a_clone(capsys):
  assert main.main(['bench', '--help']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'same_bits' in lines and 'common' not in lines


@pytest.mark.parametrize('folder', ['', 'benchmarks'])
def test_an_installed_package_refuses_in_one_line(
  tmp_path, monkeypatch, capsys, folder
):
  """Also where another project has installed a package of that name."""
  (tmp_path / folder).mkdir(exist_ok=True)
  monkeypatch.setattr(bench, 'CLONE', tmp_path)
  assert main.main(['bench', 'same_bits']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'not part of the installed package' in line and 'clone' in line
