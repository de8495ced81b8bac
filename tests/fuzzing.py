"""What the scripts that fuzz share: a count of cases, and a seed."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any


def main(run: Callable[[pathlib.Path, int, int], Any], argv: list[str]) -> None:
  """Prints `run(folder, count, seed)`; argv: command, count, perhaps seed."""
  seed = int(argv[2]) if len(argv) > 2 else 0
  with tempfile.TemporaryDirectory() as folder:
    print(run(pathlib.Path(folder), int(argv[1]), seed))
