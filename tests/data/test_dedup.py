"""Exact and near duplicates."""

import sys

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import dedup
from tests import settings


def config(**changes):
  named = {f'data__dedup__{name}': x for name, x in changes.items()}
  return settings.small(**named).data.dedup


def partners(texts, **changes):
  """(rule, partner) of each text that is not kept, by index."""
  cfg = config(**changes)
  sketch = dedup.make_sketch(cfg)
  index, dropped = dedup.Index(cfg, texts.__getitem__), {}
  for key, text in enumerate(texts):
    if match := index.find(key, sketch(text)):
      dropped[key] = match
    else:
      index.add(key, sketch(text))
  return dropped


def words(seed, count=200):
  return [str(x) for x in np.random.default_rng(seed).integers(0, 10**6, count)]


def test_exact_but_for_case_and_white_space():
  texts = ['Ein Caf\u00e9', 'ein\n  cafe\u0301 ', 'ein cafe', 'EIN CAF\u00c9']
  first = ('exact_duplicate', 0)
  assert partners(texts, exact=True) == {1: first, 3: first}
  assert partners(texts) == {}


def test_shingles():
  assert dedup.shingles('A b  c\nd', 3) == {'a b c', 'b c d'}
  assert dedup.shingles('a b', 3) == {'a b'}
  assert dedup.shingles('', 3) == {''}
  assert dedup.jaccard({'a', 'b', 'c'}, {'b', 'c', 'd'}) == 0.5


def test_near_duplicates_and_their_first_partner():
  """Whoever is dropped is nobody's partner."""
  base = words(0)
  near = [*base[:-1], 'other']
  texts = [words(1), base, near, [*near[:-2], 'x', 'other'], words(2), base]
  texts = [' '.join(x) for x in texts]
  dropped = partners(texts, near=0.8)
  near = ('near_duplicate', 1)
  assert dropped == {2: near, 3: near, 5: ('exact_duplicate', 1)}


def test_the_true_index_decides():
  """Every pair is proposed here, and one at the threshold is dropped."""
  base = words(0, 104)
  texts = [base, [*base[:54], *words(1, 50)], base[:84]]
  texts = [' '.join(x) for x in texts]
  sets = [dedup.shingles(text, 5) for text in texts]
  indices = [dedup.jaccard(sets[0], x) for x in sets]
  assert indices[1:] == [50 / 150, 0.8]
  every = {'bands': 128, 'rows_per_band': 1}
  match = ('near_duplicate', 0)
  assert partners(texts, near=0.8, **every) == {2: match}
  assert partners(texts, near=0.81, **every) == {}
  assert partners(texts, near=0.33, **every) == {1: match, 2: match}


def test_bands_find_what_their_formula_says():
  """1 - (1 - s^r)^b of the pairs with index s, within 4 sigma."""
  count, shared, rows, bands = 300, 60, 4, 6
  texts = []
  for seed in range(count):
    base = words(seed, 80)
    first = [
      f'{x} {y}' for x, y in zip(base, words(seed + count, 80), strict=True)
    ]
    second = first[:shared] + [x + '!' for x in first[shared:]]
    texts += [first, second]
  index = shared / (80 + 80 - shared)
  wanted = 1 - (1 - index**rows) ** bands
  cfg = config(near=0.01, shingle_words=1, bands=bands, rows_per_band=rows)
  rensa_like = dedup.make_sketch(cfg)
  found_pairs = 0
  for first, second in zip(texts[::2], texts[1::2], strict=True):
    pair = [
      ' '.join(x.replace(' ', '_') for x in part) for part in (first, second)
    ]
    lsh = dedup.Index(cfg, pair.__getitem__)
    lsh.add(0, rensa_like(pair[0]))
    found_pairs += lsh.find(1, rensa_like(pair[1])) is not None
  sigma = (wanted * (1 - wanted) / count) ** 0.5
  assert abs(found_pairs / count - wanted) < 4 * sigma


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'rensa', None)
  with pytest.raises(errors.InputError, match=r'data\.dedup\.near needs rensa'):
    dedup.make_sketch(config(near=0.8))
  dedup.make_sketch(config(exact=True))
