"""Which documents `prepare` keeps: filters, then duplicates, and a report.

Texts are judged one by one, in processes of their own if there are several;
duplicates are found in the order of the corpus. So the result depends on the
corpus and the settings only.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import dedup, mixture, quality, scan

CHUNK = 256  # documents that a process judges in one go
_ZEROS = dict.fromkeys(
  ('documents', 'bytes', 'kept_documents', 'kept_bytes'), 0
)
_EXAMPLES = 5  # of each rule, in the report


@dataclasses.dataclass(frozen=True)
class Selection:
  """The documents that are kept, by their index in the training part.

  report: JSON values: documents and bytes before and after, by source; by rule,
  how many were dropped, and the first of them with their places and partners.
  """

  kept: np.ndarray
  report: dict[str, Any]

  @property
  def digest(self) -> str:
    """Of the indices."""
    return hashlib.sha256(self.kept.astype('<i8').tobytes()).hexdigest()


def select(
  cfg: config.DataConfig,
  corpus: corpora.Corpus,
  *,
  num_workers: int = 1,
  say: Callable[[str], None],
) -> Selection:
  """Applies the rules of `data.filters` and `data.dedup`.

  A document that is like a held-out one is dropped, too.

  Args:
    say: prints a line of progress.

  Raises:
    InputError: a rule cannot be applied.
  """
  documents = _Documents(cfg, corpus)
  judge = _Judge(cfg, documents)  # raises before anything is read
  index = dedup.Index(cfg.dedup, documents.text)
  kept, sources = [], {}
  dropped: dict[str, dict[str, Any]] = {}
  total = len(documents)
  with _judgements(cfg, judge, total, num_workers) as judgements:
    for key, (rule, size, sketch) in enumerate(
      _with_progress(judgements, total, say)
    ):
      if key < documents.num_valid:
        if index.find(key, sketch) is None:
          index.add(key, sketch)
        continue
      counts = sources.setdefault(documents.source(key), dict(_ZEROS))
      _add(counts, '', size)
      partner = None
      if not rule and (match := index.find(key, sketch)):
        rule, partner = match
        if partner < documents.num_valid:
          rule = 'like_held_out'
      if rule:
        example = {'place': documents.place(key)}
        if partner is not None:
          example['partner'] = documents.place(partner)
        _drop(dropped, rule, size, example)
        continue
      index.add(key, sketch)
      kept.append(key - documents.num_valid)
      _add(counts, 'kept_', size)
  report = {name: sum(x[name] for x in sources.values()) for name in _ZEROS}
  most_first = sorted(dropped, key=lambda x: -dropped[x]['documents'])
  report['sources'] = sources
  report['dropped'] = {rule: dropped[rule] for rule in most_first}
  return Selection(np.array(kept, np.int64), report)


def _add(counts: dict[str, int], prefix: str, size: int) -> None:
  counts[f'{prefix}documents'] += 1
  counts[f'{prefix}bytes'] += size


def _drop(dropped: dict, rule: str, size: int, example: dict) -> None:
  """Counts a document that is left out."""
  entry = dropped.setdefault(rule, {'documents': 0, 'bytes': 0, 'examples': []})
  entry['documents'] += 1
  entry['bytes'] += size
  if len(entry['examples']) < _EXAMPLES:
    entry['examples'].append(example)


Judgement = tuple[str, int, dedup.Sketch | None]


class _Documents:
  """The held-out documents, if there may be copies of them; then the others."""

  def __init__(self, cfg: config.DataConfig, corpus: corpora.Corpus):
    self._parts = corpus.valid, corpus.train
    searches = cfg.dedup.exact or cfg.dedup.near
    self.num_valid = len(corpus.valid) if searches else 0

  def __len__(self) -> int:
    return self.num_valid + len(self._parts[1])

  def _find(self, key: int) -> tuple[Any, int]:
    if key < self.num_valid:
      return self._parts[0], key
    return self._parts[1], key - self.num_valid

  def record(self, key: int) -> dict[str, Any]:
    part, at = self._find(key)
    return part[at]

  def text(self, key: int) -> str:
    return corpora.document_text(self.record(key))

  def place(self, key: int) -> str:
    part, at = self._find(key)
    return part.place(at)

  def source(self, key: int) -> str:
    """Name of a training document's source."""
    part, at = self._find(key)
    sources = mixture.parts(part)
    return sources[part.find(at)[0] if len(sources) > 1 else 0].name


class _Judge:
  """What can be said of a document alone."""

  def __init__(self, cfg: config.DataConfig, documents: _Documents):
    self._documents = documents
    self._check = quality.make_check(cfg.filters)
    self._sketch = dedup.make_sketch(cfg.dedup)

  def judge(self, key: int) -> Judgement:
    """Broken rule or '', size [bytes], sketch."""
    record = self._documents.record(key)
    text = corpora.document_text(record)
    has_rules = key >= self._documents.num_valid and 'messages' not in record
    rule = self._check(text) if has_rules else ''
    return rule, len(text.encode()), None if rule else self._sketch(text)


_judge: _Judge | None = None  # of a worker process


def _start_worker(cfg: config.DataConfig) -> None:
  global _judge
  _judge = _Judge(cfg, _Documents(cfg, corpora.open_corpus(cfg)))


def _judge_chunk(keys: range) -> list[Judgement]:
  return [_judge.judge(key) for key in keys]


@contextlib.contextmanager
def _judgements(
  cfg: config.DataConfig,
  judge: _Judge,
  total: int,
  num_workers: int,
) -> Iterator[Iterable[Judgement]]:
  """Of all documents, in their order."""
  if num_workers == 1:
    yield map(judge.judge, range(total))
    return
  keys = range(total)
  chunks = [keys[at : at + CHUNK] for at in range(0, total, CHUNK)]
  with concurrent.futures.ProcessPoolExecutor(
    num_workers,
    multiprocessing.get_context('spawn'),
    _start_worker,
    (cfg,),
  ) as pool:
    yield _in_order(pool, chunks, 4 * num_workers)


def _in_order(
  pool: Any, chunks: list[range], ahead: int
) -> Iterator[Judgement]:
  """Results in the order of the chunks, few of them waiting."""
  waiting: collections.deque = collections.deque()
  for chunk in chunks:
    waiting.append(pool.submit(_judge_chunk, chunk))
    if len(waiting) >= ahead:
      yield from waiting.popleft().result()
  while waiting:
    yield from waiting.popleft().result()


def _with_progress(
  items: Iterable[Any], total: int, say: Callable[[str], None]
) -> Iterator[Any]:
  """The items, and now and then a line."""
  start = last = time.monotonic()
  for done, item in enumerate(items, start=1):
    yield item
    if (now := time.monotonic()) - last >= scan.QUIET_SECONDS:
      last, rate = now, done / max(now - start, 1e-9)
      say(
        f'judged {done:,} of {total:,} documents ({done / total:.0%}), '
        f'{rate:,.0f} a second, {(total - done) / rate / 60:.0f} min left'
      )
