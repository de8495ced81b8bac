"""Checkpoints: Orbax writes the arrays, this module commits and verifies steps.

A step is written into a hidden folder: arrays by Orbax, documents as JSON, then
`manifest.json` with the SHA-256 of every file. One rename makes it visible, so
a visible step is complete, whenever the process dies. Restoring hashes every
file again and refuses a changed, cut, missing, surplus or swapped file by name.
Nothing is unpickled. Several processes write their shards into one folder,
which must be on a file system that all of them see. They share the hashing; the
first process commits.

  checkpoints/000000040/manifest.json  progress.json  arrays/...
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv3_jax import errors
from dsv3_jax.checkpoint import full_disk, lazy_array
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.distributed import processes

Tree = Any
_MANIFEST = 'manifest.json'
_ARRAYS = 'arrays'
_UNFINISHED = ('.tmp-', '.old-')  # being written, being deleted


class CheckpointError(errors.InputError):
  """A step cannot be used; the message names the file and a remedy."""


def _is_news(record: logging.LogRecord) -> bool:
  """False for the tracebacks that Orbax logs and then raises."""
  return not (record.exc_info and 'orbax' in record.pathname)


class Store:
  """The committed steps of one run.

  `save` returns once the arrays are copied; a thread writes, hashes and commits
  them. The next `save`, `wait` or `close` raises the thread's error.

  Args:
    directory: has a folder for each step.
    keep: number of newest steps that a commit leaves.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int):
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    logging.getLogger('absl').addFilter(_is_news)
    registry = lazy_array.registry()
    self._writer = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        use_compression=False,  # slow, and weights hardly shrink
      )
    )
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._commit: concurrent.futures.Future | None = None

  def steps(self) -> list[int]:
    """Committed steps, ascending; as this process sees them."""
    if not self.directory.is_dir():
      return []
    names = (path.name for path in self.directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())

  def latest(self) -> int | None:
    """The newest committed step, the same for all processes."""
    return processes.broadcast('latest', max(self.steps(), default=None))

  def save(self, step: int, state: Tree, extras: dict[str, Any]) -> None:
    """Starts to save `state` (arrays) and `extras` (name -> JSON document).

    The arrays may be changed or donated as soon as this returns. All processes
    must pass the same extras.

    Raises:
      ValueError: the step is committed already.
      OSError: the folder cannot be written.
      FullDiskError: the same, for the disk is full; committed steps are safe.
    """
    self.wait()
    scratch = self.directory / f'.tmp-{step:09d}'
    with processes.propagate_errors('save'), self._full_disk():
      if processes.index() == 0:
        self._begin(step, scratch, extras)
    # Orbax copies device arrays before it returns; host arrays we copy.
    copy = lambda x: np.array(x) if isinstance(x, np.ndarray) else x
    state = jax.tree.map(copy, state)
    args = ocp.args.PyTreeSave(state, lazy_array.save_args(state))
    with self._full_disk():
      self._writer.save(scratch / _ARRAYS, args)
    self._commit = self._pool.submit(self._finish, step, scratch)

  def wait(self) -> None:
    """Waits for the save in progress and raises its error."""
    if self._commit is not None:
      commit, self._commit = self._commit, None
      commit.result()

  def close(self) -> None:
    """Waits for the save in progress and ends the threads.

    Raises:
      FullDiskError: of the last save; Orbax may raise it a second time.
    """
    try:
      self.wait()
    finally:
      self._pool.shutdown()
      with self._full_disk():
        self._writer.close()

  def verify(self, step: int) -> None:
    """Hashes every file of a step.

    Raises:
      CheckpointError: a file is damaged; names it, and the newest earlier step
        that is intact.
    """
    damage = self._damage(step)
    if damage is None:
      return
    steps = processes.broadcast('steps', self.steps())
    earlier = [s for s in reversed(steps) if s < step]
    good = next((s for s in earlier if self._damage(s) is None), None)
    advice = 'no earlier step is intact'
    if good is not None:
      advice = (
        f'step {good} is intact: checkpoint.restore_step={good} resumes from '
        f'it, --step={good} reads it'
      )
    raise CheckpointError(
      f'{self._path(step) / damage[0]} {damage[1]}; {advice}'
    )

  def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """Verifies and reads a step; returns the arrays and the extras.

    Args:
      like: a tree of arrays or ShapeDtypeStructs. Leaves with a sharding come
        back as jax.Arrays of that sharding, others as NumPy arrays.

    Raises:
      CheckpointError: a damaged file, or a leaf that differs from `like`.
    """
    self.verify(step)
    folder = self._path(step)
    handler = ocp.PyTreeCheckpointHandler()
    _check_like(handler.metadata(folder / _ARRAYS).tree, like, folder)
    with ocp.Checkpointer(handler) as reader:
      state = reader.restore(
        folder / _ARRAYS,
        ocp.args.PyTreeRestore(
          item=like,
          restore_args=jax.tree.map(_restore_args, like),
        ),
      )
    return state, self.extras(step)

  def extras(self, step: int) -> dict[str, Any]:
    """The extras of a step, which only `restore` verifies.

    Raises:
      CheckpointError: a damaged file.
    """
    paths = self._path(step).glob('*.json')
    try:
      return {
        path.stem: json.loads(path.read_text(encoding='utf-8'))
        for path in paths
        if path.name != _MANIFEST
      }
    except ValueError as error:
      raise CheckpointError(
        f'{self._path(step)} is damaged: {error}'
      ) from error

  def open(self, step: int) -> dict[tuple[str, ...], lazy_array.LazyArray]:
    """Verifies a step; returns its arrays by path, which are read on demand.

    Raises:
      CheckpointError: a damaged file.
    """
    self.verify(step)
    folder = self._path(step) / _ARRAYS
    names = _leaves(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    arrays = lazy_array.open_arrays(folder, list(names))
    return {tuple(name.split('.')): array for name, array in arrays.items()}

  def mark(self, step: int) -> str:
    """Identifies a step's content: a hash of its hashes.

    Raises:
      CheckpointError: there is no such step.
    """
    path = self._path(step) / _MANIFEST
    if not path.exists():
      self.verify(step)
    return shards.digest(path)

  def roll_back(self, step: int) -> list[pathlib.Path]:
    """Moves the steps after `step` aside, so that training can redo them.

    Returns:
      Their new paths: `000000040.aside-1`. Nothing here deletes them.
    """
    moved = []
    for later in [s for s in self.steps() if s > step]:
      path, count = self._path(later), 1
      while (aside := path.with_suffix(f'.aside-{count}')).exists():
        count += 1
      moved.append(path.rename(aside))
    return moved

  def _full_disk(self) -> contextlib.AbstractContextManager:
    """Says of a full disk which step is safe."""
    newest = max(self.steps(), default=None)
    advice = 'no step is there yet; free space, and start again'
    if newest is not None:
      advice = (
        f'step {newest} is safe; free space, and the same command goes on '
        'from there'
      )
    return full_disk.reported(self.directory, advice)

  def _path(self, step: int) -> pathlib.Path:
    return self.directory / f'{step:09d}'

  def _begin(
    self, step: int, scratch: pathlib.Path, extras: dict[str, Any]
  ) -> None:
    """Makes the hidden folder and writes the documents."""
    if step in self.steps():
      raise ValueError(f'{self._path(step)} is committed already')
    self.directory.mkdir(parents=True, exist_ok=True)
    for old in self.directory.iterdir():  # left by a killed process
      if old.name.startswith(_UNFINISHED):
        shutil.rmtree(old)
    scratch.mkdir()
    for name, document in extras.items():
      text = json.dumps(document, sort_keys=True)
      (scratch / f'{name}.json').write_text(text, encoding='utf-8')

  def _finish(self, step: int, scratch: pathlib.Path) -> None:
    """The second half of a save, in the thread."""
    with processes.propagate_errors('written'), self._full_disk():
      self._writer.wait_until_finished()
    # A network file system may show a process its own files first, so all are
    # asked.
    seen = processes.gather('seen', _files(scratch))
    names = processes.broadcast('files', sorted(set().union(*seen)))
    with processes.propagate_errors('hashed'), self._full_disk():
      hashed = _digests(scratch, names)
      for name in hashed:
        _flush(scratch / name)
    files = {}
    for part in processes.gather('hashes', hashed):
      files |= part
    with processes.propagate_errors('committed'), self._full_disk():
      if processes.index() == 0:
        self._publish(step, scratch, files)

  def _publish(
    self, step: int, scratch: pathlib.Path, files: dict[str, Any]
  ) -> None:
    """Makes the step visible and deletes the oldest steps."""
    body = {'step': step, 'files': dict(sorted(files.items()))}
    manifest = {'body': body, 'sha256': _digest_json(body)}
    path = scratch / _MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    _flush(path)
    _flush(scratch)
    scratch.rename(self._path(step))
    _flush(self.directory)
    for old in self.steps()[: -self._keep]:
      hidden = self.directory / f'.old-{old:09d}'
      self._path(old).rename(hidden)  # not visible while it is deleted
      shutil.rmtree(hidden)

  def _damage(self, step: int) -> tuple[str, str] | None:
    """The first file that differs from its manifest, and how it differs."""
    return processes.first_reported('damage', self._damage_here(step))

  def _damage_here(self, step: int) -> tuple[str, str] | None:
    """The same, for the files that this process hashes."""
    folder = self._path(step)
    if not folder.is_dir():
      return '', 'does not exist'
    try:
      text = (folder / _MANIFEST).read_text(encoding='utf-8')
      manifest = json.loads(text)
      body, digest = manifest['body'], manifest['sha256']
    except FileNotFoundError:
      return _MANIFEST, 'is missing'
    except (ValueError, KeyError, TypeError):
      return _MANIFEST, 'is damaged'
    if _digest_json(body) != digest:
      return _MANIFEST, 'does not match its own sha256'
    if body['step'] != step:
      return _MANIFEST, f'is of step {body["step"]}'
    wanted, present = body['files'], set(_files(folder)) - {_MANIFEST}
    for name in sorted(wanted.keys() - present):
      return name, 'is missing'
    for name in sorted(present - wanted.keys()):
      return name, 'is in no manifest'
    names = sorted(wanted)
    for name in names:
      size = (folder / name).stat().st_size
      if size != wanted[name]['bytes']:
        return name, f'has {size} bytes in place of {wanted[name]["bytes"]}'
    for name, digest in _digests(folder, names).items():
      if digest != wanted[name]:
        return name, 'does not match its sha256'
    return None


def _check_like(stored: Tree, like: Tree, folder: pathlib.Path):
  """Compares leaf by leaf, for errors in one line; Orbax's are long."""
  stored = _leaves(stored)
  for name, leaf in _leaves(like).items():
    if name not in stored:
      raise CheckpointError(f'{folder} has no array {name}')
    shape, dtype = tuple(stored[name].shape), np.dtype(stored[name].dtype)
    want = tuple(np.shape(leaf)), np.dtype(leaf.dtype)
    if (shape, dtype) != want:
      raise CheckpointError(
        f'{folder}: {name} is {dtype}{list(shape)}, wanted {want[1]}'
        f'{list(want[0])}'
      )
  surplus = sorted(stored.keys() - _leaves(like).keys())
  if surplus:
    raise CheckpointError(f'{folder} also holds {surplus[0]}')


def _leaves(tree: Tree) -> dict[str, Any]:
  """Leaves by dotted path, for dicts and NamedTuples."""
  parts = lambda path: [
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  ]
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {'.'.join(parts(path)): leaf for path, leaf in flat}


def _restore_args(leaf: Any) -> Any:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
  return ocp.ArrayRestoreArgs(
    sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
  )


def _files(folder: pathlib.Path) -> list[str]:
  return sorted(
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*')
    if not path.is_dir()
  )


def _digests(folder: pathlib.Path, names: list[str]) -> dict[str, Any]:
  """Digests and sizes of this process's share of the files."""
  names = names[processes.index() :: processes.count()]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    digests = pool.map(_digest, (folder / name for name in names))
    return dict(zip(names, digests, strict=True))


def _digest(path: pathlib.Path) -> dict[str, Any]:
  return {'sha256': shards.digest(path), 'bytes': path.stat().st_size}


def _digest_json(body: Any) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flush(path: pathlib.Path) -> None:
  """Forces a file or folder to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
