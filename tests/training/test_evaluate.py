"""Scores against the float64 oracle; figures recomputed by plain means."""

import collections
import dataclasses
import itertools
import lzma
import math
import zlib

import jax
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.nn import model
from dsv3_jax.training import evaluate
from tests import reference, settings
from tests.nn import models

LENGTH = 12
TEXTS = [  # 285 bytes are enough letters and merges for a tiny vocabulary
  'a tiny text about tiny texts; tiny texts are texts',
  'gr\u00fc\u00dfe, gr\u00fc\u00dfe: a text with letters of two bytes',
  'x',
  'texts about nothing but texts about texts about nothing\n' * 3,
]
VOCAB = 285


@pytest.fixture(scope='module')
def about():
  cfg = settings.small(model__vocab_size=VOCAB, model__num_layers=2)
  records = [{'name': str(i), 'text': text} for i, text in enumerate(TEXTS)]
  params, router_biases = models.random_params(cfg)
  corpus = corpora.Corpus(records[::-1], records, '')
  tokenizer = tokenizers.train(TEXTS, VOCAB)
  return evaluate.Evaluation(
    cfg=cfg,
    params=models.f32(params),
    router_biases=models.f32(router_biases),
    corpus=corpus,
    tokenizer=tokenizer,
    windows=evaluate.open_windows(cfg, corpus, tokenizer),
  )


def with_eval(e, **changes):
  options = dataclasses.replace(e.cfg.eval, **changes)
  cfg = dataclasses.replace(e.cfg, eval=options)
  windows = evaluate.open_windows(cfg, e.corpus, e.tokenizer)
  return dataclasses.replace(e, cfg=cfg, windows=windows)


def windows(rows, seed=0):
  """Windows of random tokens of which random ones are scored."""
  rng = np.random.default_rng(seed)
  row_tokens = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
  lengths_B = rng.integers(1, LENGTH + 1, rows)
  index_T = np.arange(LENGTH, dtype=np.int32)
  inside_BT = index_T < lengths_B[:, None]
  return {
    'tokens_BT': row_tokens[:, :-1] * inside_BT,
    'targets_BT': row_tokens[:, 1:] * inside_BT,
    'positions_BT': np.tile(index_T, (rows, 1)),
    'segments_BT': inside_BT.astype(np.int32),
    'weights_BT': np.float32(inside_BT & (rng.random((rows, LENGTH)) < 0.7)),
  }


def oracle_nats(e, given):
  """Sum of the scored tokens' cross-entropies, all of it in float64."""
  fields = {n: given[n] for n in model.Batch._fields}
  batch = model.Batch(**fields)
  last = (batch.targets_BT[:, -1],) * 3
  exact = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  weights = (exact(e.params), exact(e.router_biases))
  rows = reference.forward(*weights, e.cfg, batch, last, False)
  total = 0.0
  for logits_ZV, targets_T, scored_T in zip(
    (row[0] for row in rows), batch.targets_BT, batch.weights_BT, strict=True
  ):
    for i in np.flatnonzero(scored_T):
      total += np.log(np.sum(np.exp(logits_ZV[i]))) - logits_ZV[i, targets_T[i]]
  return total


def test_score_is_the_oracle_s_at_any_batch_size(about):
  given = windows(7)
  want = oracle_nats(about, given)
  for size in (1, 3, 7, 32):
    e = with_eval(about, batch_size=size)
    nats, tokens = evaluate.score(e.cfg, e.params, e.router_biases, given)
    assert tokens == np.sum(given['weights_BT'])
    assert nats == pytest.approx(want, rel=1e-6)


def test_targets_that_are_not_scored_do_not_count(about):
  given = windows(4)
  other = np.where(given['weights_BT'] > 0, given['targets_BT'], 17)
  args = (about.cfg, about.params, about.router_biases)
  want = evaluate.score(*args, given)
  assert evaluate.score(*args, given | {'targets_BT': other}) == want
  none = given | {'weights_BT': np.zeros((4, LENGTH), np.float32)}
  assert evaluate.score(*args, none) == (0.0, 0)


@pytest.mark.parametrize('stride', [1, 4, LENGTH])
def test_every_token_after_bos_is_scored_once_at_any_stride(about, stride):
  e = with_eval(about, stride=stride)
  head = e.params['head']['w']
  e = dataclasses.replace(e, params=e.params | {'head': {'w': 0.0 * head}})
  scores = evaluate.heldout(e)
  sizes = [len(e.tokenizer.encode(text)) for text in TEXTS]
  assert max(sizes) > 2 * LENGTH and min(sizes) == 1
  num_bytes = sum(len(text.encode()) for text in TEXTS)
  assert (scores['scored_tokens'], scores['scored_bytes']) == (
    sum(sizes),
    num_bytes,
  )
  assert num_bytes > sum(map(len, TEXTS))  # bytes are not letters
  # Where all tokens are as likely, each costs log2 V bits.
  bits = math.log2(VOCAB) * sum(sizes) / num_bytes
  assert scores['bits_per_byte'] == pytest.approx(bits, rel=1e-6)


def test_baselines_are_counted_on_the_same_bytes(about):
  encode = about.tokenizer.encode
  documents = [encode(text, add_bos=True).tolist() for text in TEXTS]
  single = collections.Counter(sum(documents, []))
  total = sum(single.values())
  after = collections.defaultdict(collections.Counter)
  for ids in documents:
    for head, tail in itertools.pairwise(ids):
      after[head][tail] += 1
  # Held-out and train texts are the same here, so that every head was seen.
  p = lambda w: (single[w] + 1) / (total + VOCAB)
  bits = collections.Counter()
  for ids in documents:
    for head, tail in itertools.pairwise(ids):
      seen = after[head]
      mixed = (seen[tail] + len(seen) * p(tail)) / (seen.total() + len(seen))
      bits['unigram'] -= math.log2(p(tail))
      bits['bigram'] -= math.log2(mixed)
  for text in TEXTS:
    bits['zlib'] += 8 * len(zlib.compress(text.encode(), 9))
    extreme = lzma.PRESET_EXTREME | 9
    bits['xz'] += 8 * len(lzma.compress(text.encode(), preset=extreme))
  num_bytes = sum(len(text.encode()) for text in TEXTS)
  want = {f'{k}_bits_per_byte': v / num_bytes for k, v in bits.items()}
  assert evaluate.compare(about) == pytest.approx(want, rel=1e-12)


def test_text_that_holds_nothing_is_refused(about):
  empty = corpora.Corpus([], [{'name': 'a', 'text': ''}], '')
  with pytest.raises(errors.InputError, match='hold no text'):
    evaluate.open_windows(about.cfg, empty, about.tokenizer)


def test_only_the_texts_within_the_limit_are_read(about):
  # In an order of their names' hashes, complete, and one at least.
  few = evaluate.heldout(with_eval(about, max_bytes=1))
  assert few['scored_bytes'] in [len(text.encode()) for text in TEXTS]
  baselines = evaluate.compare(with_eval(about, max_bytes=1))
  [text] = [t for t in TEXTS if len(t.encode()) == few['scored_bytes']]
  bits = 8 * len(zlib.compress(text.encode(), 9))
  assert baselines['zlib_bits_per_byte'] == pytest.approx(
    bits / few['scored_bytes']
  )
