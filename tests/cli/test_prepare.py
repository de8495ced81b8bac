"""`dsv3 prepare`, and training on what it wrote."""

import errno
import json

import pytest

from dsv3_jax.data import shards
from tests import tiny_run
from tests.cli import commands

# How ml_collections loads an experiment, when asked in this process.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """Arguments of a small run, without its workdir."""
  folder = tmp_path_factory.mktemp('data')
  overrides = tiny_run.overrides(folder, 6)
  return [f'--config.{name}={x}' for name, x in overrides.items()]


def dsv3(*args):
  """Exit code, stdout and stderr of the command, in this process."""
  done = commands.in_process(*args)
  return done.returncode, done.stdout, done.stderr


def test_rows_of_the_run_by_default(settings, tmp_path):
  output = f'--output={tmp_path / "rows"}'
  code, out, err = dsv3('prepare', commands.CONFIG, *settings, output, '--json')
  assert code == 0, err
  summary = json.loads(out)
  assert summary['rows'] == summary['written_rows'] == 6 * 2
  assert 12 * 20 < summary['tokens'] <= 12 * 33
  assert summary['bytes'] == (tmp_path / 'rows' / shards.name(0)).stat().st_size
  assert 'prepare: 12 rows of 32 tokens need up to' in err
  args = ('prepare', commands.CONFIG, *settings, output)
  code, out, _ = dsv3(*args, '--rows=20', '--workers=2', '--verify')
  assert code == 0
  assert '20 rows in 1 shards, ' in out and '20 rows written' in out
  rules = ['--config.data.filters.min_chars=5000']
  code, out, _ = dsv3(*args[:-1], f'--output={tmp_path / "b"}', *rules)
  assert code == 0
  _, *table = out.split('documents         MB\n')[1].splitlines()
  name, count, size = table[0].replace('- ', '').split()
  assert name == 'min_chars' and int(count) > 0 and 0 < float(size) < 0.2
  assert table[1].startswith('kept ')
  assert table[2].startswith('first min_chars: ') and '.txt' in table[2]
  code, out, err = dsv3(*args, '--config.seed=9')
  assert (code, out) == (2, '')
  assert err.startswith('dsv3: ') and 'prepared with seed=0, but here' in err


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    ([], '--output=DIR is missing'),
    (['--output=x', '--rows=0'], 'rows=0 must be >= 1'),
    (['--output=x', '--workers=-1'], 'workers=-1 must be >= 1'),
    (['--output=/dev/null/x'], '--output=/dev/null/x cannot be written'),
  ],
)
def test_bad_input_is_one_line(settings, args, expected):
  code, out, err = dsv3('prepare', commands.CONFIG, *settings, *args)
  assert (code, out) == (2, '')
  assert err.startswith(f'dsv3: {expected}')
  assert err.count('\n') == 1


def test_a_full_disk_is_one_line(settings, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(shards, 'encode_row', full)
  output = f'--output={tmp_path / "rows"}'
  code, _, err = dsv3('prepare', commands.CONFIG, *settings, output)
  assert code == 2
  last = err.splitlines()[-1]
  assert last.startswith(f'dsv3: {tmp_path}/rows cannot be written (No space')
  assert 'what is finished is safe; free space, and repeat' in last
