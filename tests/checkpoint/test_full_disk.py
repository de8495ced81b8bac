"""A disk that is full: one line, what is safe, and the way on."""

import contextlib
import errno
import os
import resource

import numpy as np
import pytest
from absl import flags

from dsv3_jax import errors
from dsv3_jax.checkpoint import full_disk, store
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from dsv3_jax.cli import main as cli
from tests.checkpoint.hf import exchanged

SMALL, LARGE = {'a': np.zeros(64, 'f4')}, {'a': np.zeros(1 << 17, 'f4')}


@contextlib.contextmanager
def files_up_to(size):
  """The kernel refuses larger files, as a full disk does: EFBIG."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An exported model of several shards; not to be changed."""
  cfg = exchanged.make('unrolled, 2 dense, no MTP')
  path = tmp_path_factory.mktemp('exchange') / 'hf'
  return exchanged.write(cfg, *exchanged.random_weights(cfg), path)


def one_line(captured, *expected):
  """Nothing else on stderr, no traceback that a library logs either."""
  stderr = captured.readouterr().err
  assert stderr.startswith('dsv3: ') and stderr.count('\n') == 1, stderr
  for part in expected:
    assert part in stderr, stderr


def save(checkpoints, step, state, extras):
  checkpoints.save(step, state, extras)
  checkpoints.wait()


@pytest.mark.parametrize(
  ('state', 'extras', 'size'),
  [
    (LARGE, {}, 100_000),  # a piece of an array, in Orbax's thread
    (LARGE, {}, 10),  # Orbax's first file
    (SMALL, {'more': 'x' * 10_000}, 5_000),  # a document
  ],
)
def test_a_save_keeps_the_step_before(tmp_path, capfd, state, extras, size):
  checkpoints = store.Store(tmp_path / 'run', keep=2)
  save(checkpoints, 1, SMALL, {'at': 1})
  with files_up_to(size), pytest.raises(errors.FullDiskError) as caught:
    save(checkpoints, 2, state, extras)
  assert str(caught.value) == (
    f'{tmp_path / "run"} cannot be written (File too large): step 1 is safe; '
    'free space, and the same command goes on from there'
  )
  assert checkpoints.steps() == [1]
  got, document = checkpoints.restore(1, SMALL)
  np.testing.assert_array_equal(got['a'], SMALL['a'])
  assert document == {'at': 1}
  with contextlib.suppress(errors.FullDiskError):  # once more, from Orbax
    checkpoints.close()
  again = store.Store(tmp_path / 'run', keep=2)  # there is space again
  with contextlib.closing(again):
    save(again, 2, state, extras)
    assert again.steps() == [1, 2]
  assert 'Traceback' not in capfd.readouterr().err


def test_the_first_save_says_that_there_is_none(tmp_path):
  refused = pytest.raises(errors.FullDiskError, match='no step is there')
  checkpoints = store.Store(tmp_path / 'run', keep=2)
  with contextlib.closing(checkpoints), files_up_to(100_000), refused:
    save(checkpoints, 2, LARGE, {})


def test_an_import_leaves_nothing(folder, tmp_path, capfd):
  args = ['import', f'--hf={folder}', f'--output={tmp_path / "run"}']
  before = sorted(path.name for path in folder.iterdir())
  with files_up_to(4000):
    assert cli.main(args) == errors.EXIT_BAD_INPUT
  expected = f'{tmp_path / "run"} cannot be written (File too large): nothing'
  one_line(capfd, expected)
  assert not list(tmp_path.iterdir())
  assert sorted(path.name for path in folder.iterdir()) == before
  assert not cli.main(args)


def test_an_export_keeps_its_finished_shards(
  folder, tmp_path, capfd, monkeypatch
):
  """Space for two shards; then the rest, and the files are the same."""
  out, pwrite, left = tmp_path / 'out', os.pwrite, [130_000]

  def full(handle, raw, offset):
    left[0] -= len(raw)
    if left[0] < 0:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(handle, raw, offset)

  args = ['export', f'--checkpoint={folder}', f'--output={out}']
  args += ['--dtype=float32', '--shard_gb=0.00006']
  monkeypatch.setattr(shard_writer.os, 'pwrite', full)
  assert cli.main(args) == errors.EXIT_BAD_INPUT
  expected = f'{out}.partial cannot be written (No space left on device): '
  one_line(capfd, expected, 'finished shards are safe; free space')
  assert not out.exists()
  first = next(tmp_path.glob('out.partial/model-00001-*'))
  identity = first.stat().st_ino, first.stat().st_mtime_ns
  monkeypatch.setattr(shard_writer.os, 'pwrite', pwrite)
  assert not cli.main(args)
  kept = (out / first.name).stat()
  assert (kept.st_ino, kept.st_mtime_ns) == identity
  sums = (out / 'SHA256SUMS').read_text()
  assert sums == (folder / 'SHA256SUMS').read_text()
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_any_other_file_of_a_command(monkeypatch, capsys, tmp_path):
  """As the curves of a run; other errors of files stay faults."""

  def fail(code):
    def command(values):
      del values
      raise OSError(code, os.strerror(code), str(tmp_path / 'metrics.jsonl'))

    define = lambda values, argv: None
    monkeypatch.setitem(cli.COMMANDS, 'export', (command, define))

  fail(errno.EDQUOT)
  assert cli.main(['export']) == errors.EXIT_BAD_INPUT
  expected = f'{tmp_path}/metrics.jsonl cannot be written (Disk quota'
  one_line(capsys, expected, 'what is finished is safe; free space, and repeat')
  fail(errno.EACCES)
  with pytest.raises(PermissionError):
    cli.main(['export'])


@pytest.mark.parametrize('name', ['workdir', 'output', 'checkpoint'])
def test_a_write_that_names_no_file(monkeypatch, capsys, tmp_path, name):
  """As the system tells it: then the command's folder is named."""

  def define(values, argv):
    flags.DEFINE_string(name, None, '', flag_values=values)

  def command(values):
    with open('/dev/full', 'w') as file:
      file.write(values[name].value)

  monkeypatch.setitem(cli.COMMANDS, 'train', (command, define))
  args = ['train', f'--{name}={tmp_path / "run"}']
  assert cli.main(args) == errors.EXIT_BAD_INPUT
  folder = 'a file' if name == 'checkpoint' else f'{tmp_path}/run'
  one_line(
    capsys, f'dsv3: {folder} cannot be written (No space left on device)'
  )


def test_space_that_ends_when_files_are_flushed(tmp_path, monkeypatch):
  """Network disks notice only then."""
  checkpoints = store.Store(tmp_path / 'run', keep=2)
  save(checkpoints, 1, SMALL, {})

  def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(errors.FullDiskError, match='step 1 is safe; free'):
      save(checkpoints, 2, SMALL, {})
  assert checkpoints.steps() == [1]
  checkpoints.close()


def test_what_is_no_full_disk():
  for error in (
    ValueError('UNAVAILABLE: no such node'),
    ValueError("NOT_FOUND: [os_error_code='2']"),
    OSError(errno.EIO, 'x'),
    KeyError('x'),
  ):
    assert full_disk.reason(error) is None
