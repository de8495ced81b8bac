"""The folder that an import or export fills before it renames it to `--output`.

So a folder of the final name is always complete.
"""

import pathlib

from dsv3_jax import errors


def path(output: pathlib.Path) -> pathlib.Path:
  """The folder beside `output`, of the same name and `.partial` behind it.

  Raises:
    InputError: `output` exists.
  """
  if output.exists():
    raise errors.InputError(f'--output={output} exists: name another')
  return output.with_name(output.name + '.partial')


def make(partial: pathlib.Path) -> None:
  """Makes the folder, if it does not exist.

  Raises:
    InputError: it cannot be written.
  """
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.InputError(
      f'--output: {partial} cannot be written ({error.strerror})'
    ) from error
