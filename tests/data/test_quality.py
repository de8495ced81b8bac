"""Each rule on texts, by hand: which it drops, and at which share."""

import sys

import pytest

from dsv3_jax import errors
from dsv3_jax.data import quality
from tests import settings


def check(text, **changes):
  named = {f'data__filters__{name}': x for name, x in changes.items()}
  return quality.make_check(settings.small(**named).data.filters)(text)


def test_no_rule_by_default():
  assert check('') == check('a ' * 1000) == ''


def test_length():
  limits = {'min_chars': 3, 'max_chars': 5}
  texts = ('ab', 'abc', 'abcde', 'abcdef')
  broken = [check(text, **limits) for text in texts]
  assert broken == ['min_chars', '', '', 'max_chars']
  assert check('ab' * 10**5, min_chars=3) == ''


def test_language():
  english = 'The cat sat on the mat, and looked at the birds in the garden.'
  german = 'Die Katze sitzt auf der Matte und schaut die Voegel im Garten an.'
  assert check(english, languages=('en',)) == ''
  assert check(german, languages=('en',)) == 'language'
  assert check(german, languages=('en', 'de')) == ''
  # The start of a text decides.
  assert check(german * 200 + english * 2000, languages=('de',)) == ''


def test_an_unknown_language_is_one_line():
  with pytest.raises(
    errors.InputError, match=r"'english' must be one of: .*en"
  ):
    check('', languages=('en', 'english'))


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'py3langid', None)
  expected = r"languages needs py3langid: pip install 'dsv3-jax\[prepare\]'"
  with pytest.raises(errors.InputError, match=expected):
    check('', languages=('en',))


def shares(text):
  return dict(quality.repetition(text))


def test_lines_and_paragraphs():
  """5 lines, 2 of them repeated; 3 paragraphs, 1 of them repeated."""
  text = 'abc d\n\nabc d\n  ef\n\n\nabc d\n\nghij'
  got = shares(text)
  assert got['duplicate_lines'] == 2 / 5
  assert got['duplicate_line_chars'] == 8 / 18
  assert got['duplicate_paragraphs'] == 1 / 4
  assert got['duplicate_paragraph_chars'] == 4 / 18


def test_n_grams():
  """`aa bb` twice among 5 words; `cc dd ee ff gg` twice among 11."""
  got = shares('aa bb xx aa bb')
  assert got['top_2_gram'] == 2 * 4 / 10
  assert got['top_3_gram'] == 0.0
  got = shares('cc dd ee ff gg xx cc dd ee ff gg')
  assert got['top_4_gram'] == 2 * 8 / 22
  assert got['duplicate_5_grams'] == 10 / 22
  assert got['duplicate_6_grams'] == 0.0


def test_a_word_is_counted_once():
  """All but the first five words of a run are repeated."""
  got = shares(' '.join(['a'] * 20))
  assert got['duplicate_5_grams'] == 19 / 20
  assert got['duplicate_10_grams'] == 19 / 20
  assert got['top_2_gram'] == 19 * 2 / 20


def test_texts_without_words():
  assert set(shares('').values()) == set(shares(' \n').values()) == {0.0}
  assert list(shares('')) == list(quality.GOPHER)


def test_the_published_limits():
  """Table A1 of arXiv 2112.11446, row by row."""
  assert list(quality.GOPHER.values()) == [
    *(0.30, 0.30, 0.20, 0.20),
    *(0.20, 0.18, 0.16),
    *(0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
  ]


@pytest.mark.parametrize(
  ('repeated', 'total', 'broken'), [(3, 10, ''), (4, 10, 'duplicate_lines')]
)
def test_a_share_above_the_limit_is_dropped(repeated, total, broken):
  """The limit itself is kept."""
  lines = [str(i) * 40 for i in range(total - repeated - 1)]
  text = '\n'.join([*lines, *['x'] * (repeated + 1)])
  assert shares(text)['duplicate_lines'] == repeated / total
  assert check(text, gopher_repetition=True) == broken
  assert check(text) == ''
