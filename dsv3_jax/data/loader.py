"""Batches for training and windows for evaluation.

Training data is an endless Grain pipeline: shuffle, encode, pack, shuffle rows,
batch. All randomness comes from the seed and a document's index. So the stream
does not depend on the number of processes; each process reads all of it, or its
own rows of what `prepare` wrote. A position in the stream is a small dict,
which the checkpoint stores.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from dsv3_jax import config, errors
from dsv3_jax.data import corpus, mixture, packing
from dsv3_jax.data import tokenizer as tokenizers

_READ_AHEAD = 16  # documents a thread
_BATCHES_AHEAD = 4


class Loader:
  """Endless iterator of batches; deterministic, resumable.

  A batch is a dict of arrays [rows, T]: `tokens_BT`, `targets_BT`,
  `positions_BT`, `segments_BT` (int32), `weights_BT` (f32).

  Args:
    documents: records with 'text' or 'messages', by index.
    rows: number of rows of a batch.
  Attributes:
    seed: of order, FIM and token splits.
  """

  def __init__(
    self,
    documents: Sequence[dict[str, Any]],
    tokenizer: tokenizers.Tokenizer,
    cfg: config.DataConfig,
    *,
    seed: int,
    rows: int,
  ):
    self.seed = seed
    data = packed_rows(documents, tokenizer, cfg, seed=seed)
    example = functools.partial(
      packing.to_example, isolated=cfg.isolate_samples
    )
    data = data.map(example).batch(rows, drop_remainder=True)
    data = experimental.ThreadPrefetchIterDataset(
      data, prefetch_buffer_size=_BATCHES_AHEAD
    )
    self._iterator = iter(data)

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Position after the last batch, as JSON values."""
    return self._iterator.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Resumes from a position of `get_state`."""
    self._iterator.set_state(state)

  def close(self) -> None:
    """Ends the read-ahead thread."""
    self._iterator.close()


def packed_rows(
  documents: Sequence[dict[str, Any]],
  tokenizer: tokenizers.Tokenizer,
  cfg: config.DataConfig,
  *,
  seed: int,
  num_threads: int = 1,
) -> grain.IterDataset:
  """The endless stream of packed rows, as `packing.to_example` takes them.

  Rows of a mixture also have `source`, the number of each token's source.

  Args:
    num_threads: that encode documents; order and positions do not depend on it.
  """
  length = cfg.seq_len + 1
  features = ['tokens', 'learned']
  if isinstance(documents, mixture.Mixture):
    features.append('source')
  encode = functools.partial(_encode, tokenizer=tokenizer, cfg=cfg)
  data = shuffled(documents, seed).random_map(encode)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=_READ_AHEAD * num_threads
  )
  data = data.to_iter_dataset(options)
  data = experimental.FlatMapIterDataset(
    data, _SplitDocuments(length=length, isolated=cfg.isolate_samples)
  )
  data = experimental.BestFitPackIterDataset(
    data,
    length_struct=dict.fromkeys(features, length),
    num_packing_bins=cfg.packing_bins,
    seed=seed,
  )
  # A long document fills many consecutive rows. Without this shuffle, a small
  # batch could consist of a single book.
  return experimental.WindowShuffleIterDataset(
    data, window_size=cfg.shuffle_window, seed=seed
  )


def shuffled(documents: Any, seed: int) -> grain.MapDataset:
  """All documents in random order, again and again; sources by their weight."""
  endless = lambda x: grain.MapDataset.source(x).seed(seed).shuffle().repeat()
  if not isinstance(documents, mixture.Mixture):
    return endless(documents)
  parts = [
    endless(source.documents).map(functools.partial(_with_source, number=i))
    for i, source in enumerate(documents.sources)
  ]
  return grain.MapDataset.mix(parts, documents.document_weights).seed(seed)


def _with_source(record: dict[str, Any], *, number: int) -> dict[str, Any]:
  return record | {'source': number}


def _encode(
  record: dict[str, Any],
  rng: np.random.Generator,
  *,
  tokenizer: tokenizers.Tokenizer,
  cfg: config.DataConfig,
) -> dict[str, np.ndarray]:
  document = packing.encode_document(record, tokenizer, cfg, rng)
  if 'source' in record:
    document['source'] = np.full_like(document['tokens'], record['source'])
  return document


@dataclasses.dataclass(frozen=True)
class _SplitDocuments(experimental.FlatMapTransform):
  """`packing.split_document` for Grain."""

  length: int
  isolated: bool
  max_fan_out: int = 10**9  # no limit: a document may be a book

  def flat_map(self, element: dict) -> list[dict]:
    return packing.split_document(element, self.length, self.isolated)


def eval_windows(
  documents: Sequence[dict[str, Any]],
  tokenizer: tokenizers.Tokenizer,
  cfg: config.DataConfig,
  max_bytes: int,
  stride: int,
) -> dict[str, Any]:
  """Held-out documents as sliding windows that score every token once.

  Documents are taken in the order of a hash of their names, until `max_bytes`
  of text, at least one. A document is bos and its tokens, in windows of T
  tokens that advance by `stride`. A window scores tokens that no earlier one
  did. B counts windows.

  Returns:
    tokens_BT, targets_BT, positions_BT, segments_BT (int32), weights_BT (f32, 1
    on scored targets); `num_bytes` of the scored text in UTF-8; `texts`.
  """
  order = sorted(
    range(len(documents)),
    key=lambda i: hashlib.sha256(documents[i]['name'].encode()).digest(),
  )
  texts, num_bytes = [], 0
  for i in order:
    text = corpus.document_text(documents[i])
    size = len(text.encode())
    if texts and num_bytes + size > max_bytes:
      break
    texts.append(text)
    num_bytes += size
  rows = []
  for text in texts:
    tokens = tokenizer.encode(text, add_bos=True)
    rows += _windows(tokens, cfg.seq_len, stride)
  if not rows:
    raise errors.InputError(
      'the held-out documents hold no text: see data.source, '
      'data.valid_fraction'
    )
  stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
  return stacked | {'num_bytes': num_bytes, 'texts': texts}


def _windows(
  tokens: np.ndarray, length: int, stride: int
) -> list[dict[str, np.ndarray]]:
  """Windows of one document; targets are tokens 1 to the last."""
  rows, scored, last = [], 0, len(tokens) - 1
  while scored < last:
    # The first window scores all of its targets, later ones `stride` targets.
    end = min(scored + (stride if scored else length), last)
    start = max(0, end - length)
    size = end - start
    pad = lambda x, size=size: np.pad(x, (0, length - size)).astype(np.int32)
    index_T = np.arange(length)
    new_T = (index_T >= scored - start) & (index_T < size)
    rows.append(
      {
        'tokens_BT': pad(tokens[start:end]),
        'targets_BT': pad(tokens[start + 1 : end + 1]),
        'positions_BT': index_T.astype(np.int32),
        'segments_BT': (index_T < size).astype(np.int32),
        'weights_BT': new_T.astype(np.float32),
      }
    )
    scored = end
  return rows
