"""Rules that a text must keep: named, counted, each with its source.

  min_chars, max_chars   number of characters
  language               the likeliest by py3langid is one of those wanted
  duplicate_lines ...    Gopher's 13 rules on repetition (Rae et al.,
                         arXiv 2112.11446, table A1)

A text breaks the first rule that says so. Words are what white space separates,
so the rules on n-grams say little about Chinese or Japanese.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from dsv3_jax import config, errors

_LANGUAGE_CHARS = 4096  # of a text, from which its language is guessed
# Name of a rule -> the largest share that is kept (table A1).
GOPHER = {
  'duplicate_lines': 0.30,
  'duplicate_paragraphs': 0.30,
  'duplicate_line_chars': 0.20,
  'duplicate_paragraph_chars': 0.20,
  'top_2_gram': 0.20,
  'top_3_gram': 0.18,
  'top_4_gram': 0.16,
  'duplicate_5_grams': 0.15,
  'duplicate_6_grams': 0.14,
  'duplicate_7_grams': 0.13,
  'duplicate_8_grams': 0.12,
  'duplicate_9_grams': 0.11,
  'duplicate_10_grams': 0.10,
}


def make_check(cfg: config.FilterConfig) -> Callable[[str], str]:
  """A function of a text: the name of the rule it breaks, or ''.

  Raises:
    InputError: a language is unknown, or py3langid is missing.
  """
  language = _identifier(cfg.languages) if cfg.languages else None

  def check(text: str) -> str:
    if len(text) < cfg.min_chars:
      return 'min_chars'
    if cfg.max_chars and len(text) > cfg.max_chars:
      return 'max_chars'
    if language and language(text[:_LANGUAGE_CHARS]) not in cfg.languages:
      return 'language'
    if not cfg.gopher_repetition:
      return ''
    shares = repetition(text)
    return next((x for x, share in shares if share > GOPHER[x]), '')

  return check


def _identifier(languages: tuple[str, ...]) -> Callable[[str], str]:
  try:
    from py3langid import langid
  except ImportError as error:
    raise needs('data.filters.languages', 'py3langid') from error
  model = _load(langid)
  if unknown := [x for x in languages if x not in model.labels]:
    raise errors.InputError(
      f'data.filters.languages={languages!r}: {unknown[0]!r} must be one of: '
      f'{", ".join(model.labels)}'
    )
  return lambda text: model.classify(text)[0]


@functools.cache
def _load(langid: Any) -> Any:
  return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def needs(setting: str, package: str) -> errors.InputError:
  """The error of a setting whose package is not installed."""
  return errors.InputError(
    f"{setting} needs {package}: pip install 'dsv3-jax[prepare]'"
  )


def repetition(text: str) -> Iterator[tuple[str, float]]:
  """Shares of repeated text, in the order of `GOPHER`.

  Lines and paragraphs: the share of those that came before, by number and by
  characters. An n-gram of words: the share of the text's characters in the most
  frequent one, where it comes more than once (n = 2 to 4), or in words of all
  that came before, each counted once (n = 5 to 10). Characters are those that
  are no white space.
  """
  lines = [x.strip() for x in text.split('\n') if x.strip()]
  paragraphs = [x.strip() for x in re.split(r'\n\s*\n', text) if x.strip()]
  units = (('line', lines), ('paragraph', paragraphs))
  repeated = {name: list(_seen_before(parts)) for name, parts in units}
  for name, parts in units:
    yield f'duplicate_{name}s', len(repeated[name]) / max(1, len(parts))
  for name, parts in units:
    yield f'duplicate_{name}_chars', _chars(repeated[name]) / _chars(parts, 1)
  words = text.split()
  total = _chars(words, 1)
  for n in range(2, 5):
    grams = collections.Counter(_grams(words, n))
    gram, count = max(grams.items(), key=_weight, default=((), 0))
    yield f'top_{n}_gram', (count > 1) * count * _chars(gram) / total
  for n in range(5, 11):
    yield f'duplicate_{n}_grams', _repeated_chars(words, n) / total


def _weight(item: tuple[tuple[str, ...], int]) -> tuple[int, int]:
  """Sorts n-grams by their number, then by their length."""
  return item[1], _chars(item[0])


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
  return zip(*(words[i:] for i in range(n)), strict=False)


def _seen_before(parts: list[str]) -> Iterator[str]:
  seen = set()
  for part in parts:
    if part in seen:
      yield part
    seen.add(part)


def _chars(parts: Any, least: int = 0) -> int:
  """Characters of texts that are no white space."""
  return max(least, sum(len(x) for part in parts for x in part.split()))


def _repeated_chars(words: list[str], n: int) -> int:
  """Characters of the words in n-grams that came before."""
  seen, covered = set(), 0
  last = 0  # words below this index are counted
  for i, gram in enumerate(_grams(words, n)):
    if gram in seen:
      covered += _chars(words[max(last, i) : i + n])
      last = i + n
    seen.add(gram)
  return covered
