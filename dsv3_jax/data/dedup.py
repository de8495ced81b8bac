"""Duplicates: exact ones by a hash, near ones by MinHash.

Near duplicates have at least `data.dedup.near` of their shingles in common
(Jaccard index of the sets). MinHash with b bands of r rows proposes a pair of
index s with probability 1 - (1 - s^r)^b; the index of what it proposes is then
computed, so that no other document is dropped. The hashes are rensa's.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_jax import config
from dsv3_jax.data import quality

_SEED = 42  # of MinHash
_KEPT_SETS = 256  # shingles of documents that may come again


class Sketch(NamedTuple):
  """What is compared of a document.

  digest: of the normalised text. minhash: rensa's, or None.
  """

  digest: bytes
  minhash: Any


def normalise(text: str) -> str:
  """Without differences of case, white space and composed characters."""
  return ' '.join(unicodedata.normalize('NFC', text).casefold().split())


def shingles(text: str, num_words: int) -> set[str]:
  """Runs of so many words of a normalised text; the whole if it is short."""
  words = normalise(text).split(' ')
  last = max(1, len(words) - num_words + 1)
  return {' '.join(words[i : i + num_words]) for i in range(last)}


def jaccard(a: set[str], b: set[str]) -> float:
  """Share of the elements of two sets that are in both."""
  return len(a & b) / len(a | b)


def make_sketch(cfg: config.DedupConfig) -> Callable[[str], Sketch]:
  """A function of a text.

  Raises:
    InputError: rensa is missing.
  """
  rensa = _rensa() if cfg.near else None
  num_hashes = cfg.bands * cfg.rows_per_band

  def sketch(text: str) -> Sketch:
    digest = hashlib.sha256(normalise(text).encode()).digest()[:16]
    if rensa is None:
      return Sketch(digest, None)
    minhash = rensa.RMinHash(num_hashes, _SEED)
    minhash.update(sorted(shingles(text, cfg.shingle_words)))
    return Sketch(digest, minhash)

  return sketch


def _rensa() -> Any:
  try:
    import rensa
  except ImportError as error:
    raise quality.needs('data.dedup.near', 'rensa') from error
  return rensa


class Index:
  """Documents that are kept, and which of them another one is like."""

  def __init__(self, cfg: config.DedupConfig, read: Callable[[int], str]):
    """Args: read: the text of a document by its key."""
    self._cfg, self._exact = cfg, {}
    self._lsh = None
    if cfg.near:
      num_hashes = cfg.bands * cfg.rows_per_band
      self._lsh = _rensa().RMinHashLSH(cfg.near, num_hashes, cfg.bands)
    self._shingles = functools.lru_cache(maxsize=_KEPT_SETS)(
      lambda key: shingles(read(key), cfg.shingle_words)
    )

  def find(self, key: int, sketch: Sketch) -> tuple[str, int] | None:
    """The rule that a document breaks, and the first that it is like."""
    partner = self._exact.get(sketch.digest)
    if partner is not None and (self._cfg.exact or self._cfg.near):
      return 'exact_duplicate', partner
    if self._lsh is None:
      return None
    for candidate in sorted(self._lsh.query(sketch.minhash)):
      index = jaccard(self._shingles(key), self._shingles(candidate))
      if index >= self._cfg.near:
        return 'near_duplicate', candidate
    return None

  def add(self, key: int, sketch: Sketch) -> None:
    """Keeps a document."""
    self._exact.setdefault(sketch.digest, key)
    if self._lsh is not None:
      self._lsh.insert(key, sketch.minhash)
