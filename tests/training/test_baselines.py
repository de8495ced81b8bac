"""n-grams by hand and as probability distributions; compressors."""

import lzma
import math
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.training import baselines

_VOCAB = 5
_documents = st.lists(
  st.lists(st.integers(0, _VOCAB - 1), min_size=2, max_size=12),
  min_size=1,
  max_size=4,
)


def counted(documents):
  counts = baselines.NgramCounts(_VOCAB)
  for tokens in documents:
    counts.add(np.array(tokens))
  return counts


def test_by_hand():
  """Training text 0 1 0 1 0 2; c(0 1) = 2, c(0 2) = 1, n(0) = 2."""
  counts = counted([[0, 1, 0, 1, 0, 2]])
  p1 = (2 + 1) / (6 + _VOCAB)
  bits = counts.bits([np.array([0, 1])])
  assert bits['unigram'] == pytest.approx(-math.log2(p1))
  assert bits['bigram'] == pytest.approx(-math.log2((2 + 2 * p1) / (3 + 2)))
  unseen = counts.bits([np.array([4, 1])])  # nothing follows a 4: unigram
  assert unseen['bigram'] == pytest.approx(-math.log2(p1))


@hypothesis.given(_documents, st.integers(0, _VOCAB - 1))
def test_probabilities_of_what_may_follow_sum_to_one(documents, head):
  counts = counted(documents)
  bits = [counts.bits([np.array([head, w])]) for w in range(_VOCAB)]
  for name in ('unigram', 'bigram'):
    assert sum(2.0 ** -b[name] for b in bits) == pytest.approx(1.0)


@hypothesis.given(_documents)
def test_bits_are_summed_over_documents(documents):
  counts = counted(documents)
  arrays = [np.array(d) for d in documents]
  total = counts.bits(arrays)
  for name, value in total.items():
    assert value == pytest.approx(sum(counts.bits([a])[name] for a in arrays))


def test_compressors_see_each_file_alone():
  texts = ['def f(x):\n' * 20, 'gr\u00fc\u00dfe ' * 9]
  bits = baselines.compressed_bits(texts)
  want = sum(8 * len(zlib.compress(t.encode(), 9)) for t in texts)
  assert bits['zlib'] == want
  for text in texts:
    assert lzma.decompress(lzma.compress(text.encode())) == text.encode()
  assert (
    bits['xz']
    == baselines.compressed_bits(texts[:1])['xz']
    + (baselines.compressed_bits(texts[1:])['xz'])
  )
