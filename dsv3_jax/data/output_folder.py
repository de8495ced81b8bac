"""The folder that `prepare` writes: one process, one set of rows, whole files.

The head is written last of what a new folder needs. A file has its name once it
is whole and on the disk.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv3_jax import errors
from dsv3_jax.data import selection, shards

KEPT, SELECTION = 'kept-documents', 'selection.json'


def check_settings(
  folder: pathlib.Path, then: dict[str, Any], now: dict[str, Any]
) -> None:
  """Checks that a folder's rows are those of the settings `now`.

  Raises:
    InputError: names the first setting that differs.
  """
  for key, value in now.items():
    if then.get(key) != value:
      raise errors.InputError(
        f'{folder} was prepared with {key}={then.get(key)!r}, but here it is '
        f'{value!r}: keep the value, or prepare another folder'
      )


@contextlib.contextmanager
def held(folder: pathlib.Path, flag: str = 'output') -> Iterator[None]:
  """Makes the folder and keeps other processes from writing to it.

  Args:
    flag: that names it, for messages.

  Raises:
    InputError: it cannot be written, or another process holds it.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / '.lock').open('w', encoding='utf-8')
  except OSError as error:
    raise errors.InputError(
      f'--{flag}={folder} cannot be written ({error.strerror}): name another'
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.InputError(
        f'--{flag}={folder} is in use by another process: wait for its end, or '
        'name another'
      ) from error
    yield


def open_output(
  output: pathlib.Path,
  head: dict[str, Any],
  selects: bool,
  choose: Callable[[], selection.Selection],
) -> tuple[dict[str, Any], selection.Selection | None]:
  """Head and selection of a new folder, or those of the one that is there.

  Args:
    head: of a new one. selects: documents are chosen. choose: chooses them.

  Raises:
    InputError: the folder has other rows or files, or is damaged; or no
      document is left.
  """
  chosen = None
  if (output / shards.HEAD).exists():
    old = shards.read_head(output)
    check_settings(output, old['settings'], head['settings'])
    return old, _read_selection(output, old) if selects else None
  names = {x.name for x in output.iterdir() if x.name[0] != '.'}
  if others := sorted(names - {KEPT, SELECTION}):
    raise errors.InputError(
      f'--output={output} has other files, {others[0]!r} among them: name a '
      'new folder'
    )
  if selects:
    chosen = choose()
    if not len(chosen.kept):
      raise errors.InputError(
        'data.filters and data.dedup leave no document: loosen them'
      )
    head['settings']['kept'] = chosen.digest
    write_bytes(output / KEPT, chosen.kept.astype('<i8').tobytes())
    write_text(output / SELECTION, json.dumps(chosen.report) + '\n')
  write_text(output / shards.HEAD, json.dumps(head, indent=2) + '\n')
  return head, chosen


def _read_selection(
  output: pathlib.Path, head: dict[str, Any]
) -> selection.Selection:
  """The selection of an earlier start."""
  try:
    kept = np.frombuffer((output / KEPT).read_bytes(), '<i8')
    report = json.loads((output / SELECTION).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise shards.damaged(output / KEPT, error) from error
  chosen = selection.Selection(kept.astype(np.int64), report)
  if chosen.digest != head['settings'].get('kept'):
    raise errors.InputError(
      f'{output / KEPT} is damaged: it has another digest: name another '
      '--output'
    )
  return chosen


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file that is whole or not there, whatever happens."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is whole or not there, whatever happens."""
  scratch = path.with_name(f'.{path.name}')
  scratch.write_bytes(data)
  sync(scratch)
  scratch.replace(path)
  sync(path.parent)


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
