"""Small wrong edits of the source, each of which some test must notice.

`before` stands once in the file. `tests` are run in this order until one fails;
they are the fastest ones whose business the edit is.
"""

from typing import NamedTuple

from tests.mutations import edits_data, edits_model, edits_programs


class Mutant(NamedTuple):
  """One edit: `before` of the file `path` becomes `after`."""

  name: str
  path: str
  before: str
  after: str
  tests: tuple[str, ...]


ALL = tuple(
  Mutant(*edit)
  for edit in (
    *edits_programs.TRAINING,
    *edits_model.MODEL,
    *edits_model.FP8,
    *edits_programs.PARALLEL,
    *edits_programs.SYSTEM,
    *edits_data.DATA,
  )
)
