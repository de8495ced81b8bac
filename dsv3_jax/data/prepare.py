"""Writes the rows of a run to shards, once (`shards` has the format).

The rows are those of `loader.packed_rows`. A finished shard has its final name
and a line in the index, with the stream's position after it. So a start that
was killed, or a shard that is missing, is made good from the shard before, and
the bytes are the same. Threads encode documents, as the library releases
Python's lock; the order does not depend on their number.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from dsv3_jax import config, errors
from dsv3_jax.data import (
  batch_ramp,
  loader,
  mixture,
  output_folder,
  scan,
  selection,
  shards,
)
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import tokenizer as tokenizers

_SHARD_TOKENS = 1 << 26  # a shard has at most 268 MB, and is soon done again
# Settings of `data` that say where things are, not what the rows are.
_PLACES = ('source', 'cache_dir', 'bad_records', 'on_change', 'prepared')
_PLACES += ('tokenizer', 'tokenizer_vocab', 'mixture', 'max_epochs')
REPORT = 'report.json'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def settings(
  cfg: config.DataConfig,
  seed: int,
  corpus: corpora.Corpus,
  tokenizer: tokenizers.Tokenizer,
) -> dict[str, Any]:
  """All that the rows depend on, as JSON values."""
  values = {}
  for name, value in dataclasses.asdict(cfg).items():
    if isinstance(value, dict):
      values |= {f'{name}.{key}': x for key, x in value.items()}
    elif name not in _PLACES:
      values[name] = value
  values |= {'seed': seed, 'corpus': corpus.fingerprint}
  return json.loads(json.dumps(values | {'tokenizer': tokenizer.digest}))


def prepare(
  cfg: config.Config,
  output: pathlib.Path,
  *,
  rows: int = 0,
  num_workers: int = 1,
  rows_per_shard: int = 0,
  verify: bool = False,
) -> dict[str, Any]:
  """Writes what is missing in a folder; returns a summary in JSON values.

  Args:
    rows: that the folder is to have at least; 0: those that the run reads.
    num_workers: threads that encode, and processes that judge documents.
    rows_per_shard: 0: about 67M tokens.
    verify: checks the digests of finished shards, too.

  Raises:
    InputError: bad data, or the folder has other rows.
    OSError: the disk is full; what is finished is safe.
  """
  start, length = time.monotonic(), cfg.data.seq_len
  rows = rows or batch_ramp.rows_of_run(cfg.train, length)
  with output_folder.held(output):
    corpus = corpora.open_corpus(cfg.data)
    tokenizer = corpora.load_tokenizer(cfg.data, corpus)
    corpora.check_tokens(corpus, tokenizer, cfg.model.vocab_size)
    choose = functools.partial(
      selection.select, cfg.data, corpus, num_workers=num_workers, say=_say
    )
    head = {
      'format': shards.FORMAT,
      'rows_per_shard': rows_per_shard or max(1, _SHARD_TOKENS // length),
      'settings': settings(cfg.data, cfg.seed, corpus, tokenizer),
    }
    head, chosen = output_folder.open_output(
      output, head, cfg.data.selects, choose
    )
    tokenizer.save(output / shards.TOKENIZER)
    documents = corpus.train
    if chosen is not None:
      documents = mixture.subset(documents, chosen.kept)
    stream = loader.packed_rows(
      documents, tokenizer, cfg.data, seed=cfg.seed, num_threads=num_workers
    )
    writer = _Writer(output, head, stream, tokenizer.bos_id)
    writer.limit_epochs(mixture.parts(documents), cfg.data.max_epochs)
    written = writer.write(rows, verify)
    report = _report(writer.index, documents, chosen)
    output_folder.write_text(
      output / REPORT, json.dumps(report, indent=2) + '\n'
    )
  return report | {
    'output': str(output),
    'written_rows': written,
    'seconds': time.monotonic() - start,
  }


def _report(
  index: list[shards.Shard],
  documents: Sequence[Any],
  chosen: selection.Selection | None,
) -> dict[str, Any]:
  """What the folder has, and what was left out."""
  totals, sources = _totals(index), {}
  for source in mixture.parts(documents):
    tokens, begun = totals.get(source.name, (0, 0))
    sources[source.name] = {
      'tokens': tokens,
      'documents': begun,
      'epochs': begun / len(source.documents),
    }
  return {
    'rows': sum(shard.rows for shard in index),
    'shards': len(index),
    'bytes': sum(shard.num_bytes for shard in index),
    'tokens': sum(x['tokens'] for x in sources.values()),
    'sources': sources,
    'selection': chosen and chosen.report,
  }


def _totals(index: list[shards.Shard]) -> dict[str, tuple[int, int]]:
  """Name of a source -> its tokens, and its documents that begin."""
  totals: dict[str, tuple[int, int]] = {}
  for shard in index:
    for name, (tokens, begun) in shard.counts.items():
      before = totals.get(name, (0, 0))
      totals[name] = before[0] + tokens, before[1] + begun
  return totals


class _Writer:
  """Writes shards in order, each from the position after the one before."""

  def __init__(
    self, output: pathlib.Path, head: dict[str, Any], stream: Any, bos_id: int
  ):
    self._output, self._stream, self._bos = output, stream, bos_id
    self._rows_per_shard = head['rows_per_shard']
    self._length = head['settings']['seq_len'] + 1
    self._sources, self._max_epochs = (), 0.0
    self.index = shards.read_index(output)
    self._iterator, self._next = iter(stream), 0  # the shard it is before
    self._write_index()  # without a line that a kill left half

  def limit_epochs(
    self, sources: Sequence[mixture.Source], max_epochs: float
  ) -> None:
    """Names the sources, and how often each may be read; 0: no limit."""
    self._sources, self._max_epochs = sources, max_epochs

  def _check_epochs(self) -> None:
    totals = _totals(self.index) if self._max_epochs else {}
    for source in self._sources:
      epochs = totals.get(source.name, (0, 0))[1] / len(source.documents)
      if epochs > self._max_epochs > 0:
        rows = sum(shard.rows for shard in self.index)
        raise errors.InputError(
          f'{source.name or "data.source"} has been read {epochs:.2f} times '
          f'after {rows:,} rows, more than data.max_epochs={self._max_epochs}: '
          'raise it, add documents, or ask for fewer --rows in another folder'
        )

  def write(self, rows: int, verify: bool) -> int:
    """Makes all shards of so many rows; returns how many rows were written."""
    counts = [
      min(self._rows_per_shard, rows - first)
      for first in range(0, rows, self._rows_per_shard)
    ]
    todo = [i for i, n in enumerate(counts) if not self._is_done(i, n, verify)]
    total = sum(counts[i] for i in todo)
    self._say_space(total)
    progress = _Progress(total, self._length - 1)
    self._check_epochs()
    for i in todo:
      self._write_shard(i, counts[i], progress)
      self._check_epochs()
    return total

  def _is_done(self, i: int, rows: int, verify: bool) -> bool:
    if i >= len(self.index) or self.index[i].rows < rows:
      return False
    path = self._output / shards.name(i)
    if not path.exists() or path.stat().st_size != self.index[i].num_bytes:
      return False
    return not verify or shards.file_digest(path) == self.index[i].sha256

  def _say_space(self, rows: int) -> None:
    most = rows * shards.most_bytes(self._length)
    free = shutil.disk_usage(self._output).free
    if rows:
      few = ', which may be too few' if free < most else ''
      _say(
        f'{rows:,} rows of {self._length - 1:,} tokens need up to '
        f'{most / 1e9:.2f} GB; {free / 1e9:.2f} GB are free{few}'
      )

  def _write_shard(self, i: int, rows: int, progress: '_Progress') -> None:
    old = self.index[i] if i < len(self.index) else None
    if old is not None:
      rows = max(rows, old.rows)
    if self._next != i:
      self._iterator = iter(self._stream)
      if i:
        self._iterator.set_state(self.index[i - 1].state)
    path = self._output / shards.name(i)
    scratch = path.with_name(f'.{path.name}')
    counts = {source.name: [0, 0] for source in self._sources}
    with _full_disk_as_os_error(scratch):
      writer = array_record_module.ArrayRecordWriter(
        str(scratch), shards.WRITER_OPTIONS
      )
      for at in range(rows):
        row = next(self._iterator)
        number = i * self._rows_per_shard + at
        writer.write(shards.encode_row(number, row))
        self._count(row, counts)
        progress.add(1)
      writer.close()
    _check_whole(scratch, rows)
    self._next = i + 1
    shard = shards.Shard(
      rows=rows,
      num_bytes=scratch.stat().st_size,
      sha256=shards.file_digest(scratch),
      state=self._iterator.get_state(),
      counts=counts,
    )
    if old is not None and old.rows == rows and old.sha256 != shard.sha256:
      raise errors.InputError(
        f'{path} does not come out as it was: other versions of the libraries, '
        'perhaps: name another --output'
      )
    output_folder.sync(scratch)
    scratch.replace(path)
    self._keep(i, shard)

  def _count(
    self, row: dict[str, np.ndarray], counts: dict[str, list[int]]
  ) -> None:
    """Adds the tokens of a row, and the documents that begin in it."""
    is_token = row['tokens_segment_ids'] > 0
    for i, count in enumerate(counts.values()):
      mine = is_token & (row.get('source', np.zeros_like(is_token)) == i)
      count[0] += int(mine.sum())
      count[1] += int((mine & (row['tokens'] == self._bos)).sum())

  def _keep(self, i: int, shard: shards.Shard) -> None:
    """Writes the shard's line, once its file is safe."""
    is_next = i == len(self.index)
    self.index[i : i + 1] = [shard]
    if not is_next:
      self._write_index()
      return
    with (self._output / shards.INDEX).open('a', encoding='utf-8') as file:
      file.write(_line(shard))
      file.flush()
      os.fsync(file.fileno())

  def _write_index(self) -> None:
    lines = ''.join(map(_line, self.index))
    output_folder.write_text(self._output / shards.INDEX, lines)


def _line(shard: shards.Shard) -> str:
  return json.dumps(dataclasses.asdict(shard)) + '\n'


class _Progress:
  """Now and then a line on stderr: rows, rate, share, time left."""

  def __init__(self, total: int, length: int):
    self._total, self._length, self._done = total, length, 0
    self._start = self._last = time.monotonic()

  def add(self, rows: int) -> None:
    self._done += rows
    now = time.monotonic()
    if now - self._last < scan.QUIET_SECONDS:
      return
    self._last = now
    rate = self._done / max(now - self._start, 1e-9)
    left = (self._total - self._done) / rate
    _say(
      f'{self._done:,} of {self._total:,} rows '
      f'({self._done / self._total:.0%}), {rate * self._length:,.0f} tokens/s, '
      f'{left / 60:.0f} min left'
    )


def _say(line: str) -> None:
  print(f'prepare: {line}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def _full_disk_as_os_error(path: pathlib.Path) -> Iterator[None]:
  """The library's error of a full disk as the operating system's."""
  try:
    yield
  except (RuntimeError, ValueError) as error:
    for code in _FULL:
      if os.strerror(code) in str(error):
        raise OSError(code, os.strerror(code), str(path)) from error
    raise


def _check_whole(path: pathlib.Path, rows: int) -> None:
  """Checks that a file that was written can be read."""
  reader = array_record_module.ArrayRecordReader(str(path))
  assert reader.num_records() == rows, path
  reader.close()
