"""What a language model must beat: unigram, bigram, zlib and xz.

The n-grams count the training tokens and predict the held-out ones; the bigram
is smoothed after Witten and Bell: P(w | h) = (c(h, w) + n(h) P(w)) / (c(h) +
n(h)), where n(h) is the number of distinct tokens seen after h. The compressors
see each held-out file alone.
"""

import lzma
import zlib
from collections.abc import Iterable

import numpy as np


class NgramCounts:
  """Unigram and bigram counts of a token stream, document by document."""

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size
    self._unigrams = np.zeros(vocab_size, np.int64)
    self._pairs: list[np.ndarray] = []

  def add(self, tokens: np.ndarray) -> None:
    """Counts one document."""
    tokens = tokens.astype(np.int64)
    self._unigrams += np.bincount(tokens, minlength=self._vocab_size)
    self._pairs.append(tokens[:-1] * self._vocab_size + tokens[1:])

  def bits(self, documents: Iterable[np.ndarray]) -> dict[str, float]:
    """Total bits of all tokens but each document's first, under both models."""
    probs_V = (self._unigrams + 1.0) / (self._unigrams.sum() + self._vocab_size)
    pairs, counts = np.unique(np.concatenate(self._pairs), return_counts=True)
    heads = pairs // self._vocab_size
    followers_V = np.bincount(heads, minlength=self._vocab_size)
    total_V = np.bincount(heads, weights=counts, minlength=self._vocab_size)
    sums = {'unigram': 0.0, 'bigram': 0.0}
    for tokens in documents:
      tokens = tokens.astype(np.int64)
      head, tail = tokens[:-1], tokens[1:]
      at = np.searchsorted(pairs, head * self._vocab_size + tail)
      at = np.minimum(at, len(pairs) - 1)
      seen = np.where(
        pairs[at] == head * self._vocab_size + tail, counts[at], 0
      )
      rest = followers_V[head] + (total_V[head] == 0)  # unseen: the unigram
      bigram = (seen + rest * probs_V[tail]) / (total_V[head] + rest)
      sums['unigram'] -= float(np.sum(np.log2(probs_V[tail])))
      sums['bigram'] -= float(np.sum(np.log2(bigram)))
    return sums


def compressed_bits(texts: Iterable[str]) -> dict[str, float]:
  """Total bits of each text compressed alone, zlib -9 and xz -9e."""
  sums = {'zlib': 0, 'xz': 0}
  for text in texts:
    data = text.encode()
    sums['zlib'] += 8 * len(zlib.compress(data, 9))
    sums['xz'] += 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
  return {name: float(bits) for name, bits in sums.items()}
