"""Makes `published.json.gz`: what tests need of the published tokenizer.

  python -m tests.data.make_published TOKENIZER_JSON_GZ

The published file has 7.8 MB. Kept are all special tokens, the tokens that
training may split, and what BPE uses to encode 200 texts: the merges that it
applies, in their order, and the tokens that these join. Other merges are never
the first choice in these texts, so the ids stay those of the whole file. Beside
them are the texts with their ids, and the SHA-256 of the whole file.
"""

import gzip
import hashlib
import itertools
import json
import pathlib
import random
import sys

from dsv3_jax.data import tokenizer

FIXTURE = pathlib.Path(__file__).with_name('published.json.gz')
_WORDS = r"""
def return import class self lambda None True for in while x y1 _z result
the The THE of and latent attention Mixture Experts tokenizer unbelievable
internationalization antidisestablishmentarianism GPU naive don't I'll we've
U.S.A. e.g. http://a.b/c?d=e&f=1 a@b.org C:\dir\file.txt $x^2 + y_i$
\frac{a}{b} <p class="q"> </p> // # {"k": [1, null]} != == <= -> => ::= ...
?! -- 50% (a) [b] {c}; 0 7 12 345 1234567 3.14159 -1e-9 0x7f 2026-11-30
"""
_OTHER_SCRIPTS = """
caf\u00e9 Stra\u00dfe se\u00f1or e\u0301 \u00bd \u221e \u2211 \u20ac10 \u2014
\u041f\u0440\u0438\u0432\u0435\u0442 \u03bb\u03cc\u03b3\u03bf\u03c2
\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627
\u4f60\u597d \u4e16\u754c \u6df1\u5ea6\u5b66\u4e60\u6a21\u578b
\u3053\u3093\u306b\u3061\u306f \u30e2\u30c7\u30eb \uc548\ub155
\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947
\u201cquoted\u201d \u3002 \uff0c \uff01 \U0001f600 \U0001f468\u200d\U0001f469
"""
_GAPS = (
  ' ',
  ' ',
  ' ',
  ' ',
  '  ',
  '\n',
  '\n\n',
  '\r\n',
  '\t',
  '\n    ',
  '',
  ' \n',
)


def texts() -> list[str]:
  """200 texts: code, prose, numbers, many scripts, all kinds of white space."""
  rng, words = random.Random(0), (_WORDS + _OTHER_SCRIPTS).split()
  some = lambda: (rng.choice(words) + rng.choice(_GAPS) for _ in range(12))
  return [''.join(list(some())[: rng.randint(1, 12)]) for _ in range(200)]


def applied_merges(piece: str, rank: dict[tuple[str, str], int]) -> set[int]:
  """Ranks of the merges that BPE applies to a piece of byte-level letters."""
  parts, applied = list(piece), set()
  while True:
    pairs = [(rank.get(p, len(rank)), p) for p in itertools.pairwise(parts)]
    best = min(pairs, default=(len(rank), None))
    if best[0] == len(rank):
      return applied
    applied.add(best[0])
    joined, at = [], 0
    while at < len(parts):
      take = 2 if tuple(parts[at : at + 2]) == best[1] else 1
      joined.append(''.join(parts[at : at + take]))
      at += take
    parts = joined


def reduce(text: str) -> dict:
  """The content of the fixture, from the text of a `tokenizer.json`."""
  spec, whole = json.loads(text), tokenizer.Tokenizer(text)
  model = spec['model']
  merges = [tuple(merge.split(' ')) for merge in model['merges']]
  rank = {merge: i for i, merge in enumerate(merges)}
  used = set()
  for sample in texts():
    for piece in whole.pieces(sample):
      used |= applied_merges(piece, rank)
  largest = max(model['vocab'], key=model['vocab'].get)
  name_of = {index: token for token, index in model['vocab'].items()}
  kept = {token for token in model['vocab'] if len(token) == 1} | {largest}
  kept |= {token['content'] for token in spec['added_tokens']}
  for i in used:
    kept |= {*merges[i], ''.join(merges[i])}
  for index, parts in whole.punctuation_newlines.items():
    kept |= {name_of[i] for i in (index, *parts.tolist())}
  spec['model'] = model | {
    'vocab': {t: i for t, i in model['vocab'].items() if t in kept},
    'merges': [' '.join(merges[i]) for i in sorted(used)],
  }
  return {
    'sha256': hashlib.sha256(text.encode()).hexdigest(),
    'cases': [[x, whole.encode(x).tolist()] for x in texts()],
    'tokenizer': spec,
  }


def main(path: str) -> None:
  text = gzip.decompress(pathlib.Path(path).read_bytes()).decode()
  body = json.dumps(reduce(text), separators=(',', ':')).encode()
  FIXTURE.write_bytes(gzip.compress(body, mtime=0))


if __name__ == '__main__':
  main(sys.argv[1])
