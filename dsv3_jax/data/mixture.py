"""Several sources in one corpus, each with its share.

A share is that of the bytes of text that training reads. Documents of a source
are drawn in proportion to share / mean bytes of its documents, interleaved
evenly and without randomness (`grain.MapDataset.mix`); each source is shuffled,
and begins anew when it ends.
"""

import bisect
import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax import errors

_ENTRY = re.compile(r'([A-Za-z0-9_.-]+)=([0-9.eE+-]+):(.+)')
SAMPLE = 10_000  # documents of a source, of which the mean size is taken


@dataclasses.dataclass(frozen=True)
class Source:
  """One source: its name, its share of all shares, and documents by index."""

  name: str
  share: float
  documents: Any


def parse(entries: Sequence[str]) -> list[Source]:
  """Sources of `data.mixture`, whose `documents` are values for `data.source`.

  Raises:
    InputError: names the first entry that is not NAME=SHARE:SOURCE.
  """
  sources = []
  for entry in entries:
    match = _ENTRY.fullmatch(entry)
    try:
      share = float(match[2]) if match else 0.0
    except ValueError:
      share = 0.0
    if not 0 < share < float('inf'):
      raise errors.InputError(
        f'data.mixture: {entry!r} must be NAME=SHARE:SOURCE with a share > 0, '
        'such as web=0.7:/data/*.jsonl'
      )
    sources.append(Source(match[1], share, match[3]))
  names = [source.name for source in sources]
  if twice := [name for name in names if names.count(name) > 1]:
    raise errors.InputError(f'data.mixture names {twice[0]!r} more than once')
  return sources


@dataclasses.dataclass(frozen=True)
class Subset(Sequence):
  """Some records of a sequence, selected by index."""

  records: Any
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.records[int(self.indices[i])]

  def place(self, i: int) -> str:
    """Where a record is, for messages."""
    return self.records.place(int(self.indices[i]))


class Mixture(Sequence):
  """The documents of all sources, one source after the other."""

  def __init__(self, sources: Sequence[Source]):
    self.sources = tuple(sources)
    sizes = (len(source.documents) for source in self.sources)
    self._ends = list(itertools.accumulate(sizes))

  def __len__(self) -> int:
    return self._ends[-1]

  def find(self, i: int) -> tuple[int, int]:
    """Which source, and which of its documents."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    at = bisect.bisect_right(self._ends, i)
    return at, i - (self._ends[at - 1] if at else 0)

  def __getitem__(self, i: int) -> dict[str, Any]:
    at, i = self.find(i)
    return self.sources[at].documents[i]

  def place(self, i: int) -> str:
    """Where a record is, for messages."""
    at, i = self.find(i)
    return self.sources[at].documents.place(i)

  @functools.cached_property
  def document_weights(self) -> list[float]:
    """How often a document of each source is drawn, relatively."""
    return [s.share / _mean_bytes(s.documents) for s in self.sources]


def _mean_bytes(documents: Any) -> float:
  """Mean size of documents; of many, that of some spread evenly."""
  step = -(-len(documents) // SAMPLE)
  sizes = [_size(documents[i]) for i in range(0, len(documents), step)]
  return max(1.0, sum(sizes) / len(sizes))


def _size(record: dict[str, Any]) -> int:
  """Bytes of the text of a document, roles and names of tools left out."""
  if 'messages' not in record:
    return len(record['text'].encode())
  contents = (turn.get('content') or '' for turn in record['messages'])
  return sum(len(text.encode()) for text in contents)


def subset(documents: Any, kept: np.ndarray) -> Any:
  """Some documents of a part of a corpus, by ascending index.

  Raises:
    InputError: a source has none of them.
  """
  if not isinstance(documents, Mixture):
    return Subset(documents, kept)
  sources, start = [], 0
  for source in documents.sources:
    end = start + len(source.documents)
    mine = kept[(kept >= start) & (kept < end)] - start
    if not len(mine):
      raise errors.InputError(
        f'data.filters and data.dedup leave no document of {source.name!r}: '
        'loosen them, or take it out of data.mixture'
      )
    chosen = Subset(source.documents, mine)
    sources.append(dataclasses.replace(source, documents=chosen))
    start = end
  return Mixture(sources)


def parts(documents: Any) -> tuple[Source, ...]:
  """The sources of a part of a corpus; one, without a name, of no mixture."""
  if isinstance(documents, Mixture):
    return documents.sources
  return (Source('', 1.0, documents),)
