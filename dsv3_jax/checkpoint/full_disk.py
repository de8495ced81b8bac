"""A full disk, quota or limit as one line in place of a traceback."""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

from dsv3_jax import errors

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How TensorStore, which writes Orbax's arrays, ends its ValueErrors.
_CODE = re.compile(r"os_error_code='(\d+)'")


@contextlib.contextmanager
def reported(path: pathlib.Path, advice: str) -> Iterator[None]:
  """Names `path` and gives advice if the disk is full; the outermost has it.

  Raises:
    FullDiskError: the body met a full disk. Other errors pass.
  """
  try:
    yield
  except (OSError, ValueError) as error:
    if (why := reason(error)) is None:
      raise
    raise errors.FullDiskError(path, why, advice) from error


def reason(error: BaseException) -> str | None:
  """What the operating system says of a full disk; None of other errors."""
  if isinstance(error, errors.FullDiskError):
    return error.reason
  code = getattr(error, 'errno', None)
  if isinstance(error, ValueError) and (match := _CODE.search(str(error))):
    code = int(match[1])
  return os.strerror(code) if code in _FULL else None
