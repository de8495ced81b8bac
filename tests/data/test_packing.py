"""FIM, random splits of tokens, splitting of documents, examples."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.data import packing, tokenizer
from tests import settings

_TEXT = 'if (a):\n  b();\n\nelse:\n  c("x");\n\n\n' * 30


@pytest.fixture(scope='module')
def bpe():
  return tokenizer.train([_TEXT], 275)


@hypothesis.given(text=st.text(max_size=60), seed=st.integers(0, 99))
def test_fim_parts_make_the_text(bpe, text, seed):
  """begin prefix hole suffix end middle (PSM)."""
  ids = packing.fim_tokens(text, bpe, np.random.default_rng(seed)).tolist()
  assert ids[0] == bpe.fim_begin_id
  hole, end = ids.index(bpe.fim_hole_id), ids.index(bpe.fim_end_id)
  prefix, suffix = ids[1:hole], ids[hole + 1 : end]
  middle = ids[end + 1 :]
  assert ''.join(map(bpe.decode, (prefix, middle, suffix))) == text


@pytest.mark.parametrize('rate', [0.0, 0.1, 1.0])
def test_fim_rate(bpe, rate):
  cfg = settings.small(data__fim_rate=rate, data__split_rate=0.0).data
  rng, count = np.random.default_rng(0), 2000
  record = {'text': 'a b c'}
  is_fim = [
    bpe.fim_begin_id in packing.encode_document(record, bpe, cfg, rng)['tokens']
    for _ in range(count)
  ]
  spread = 4 * (rate * (1 - rate) / count) ** 0.5
  assert abs(np.mean(is_fim) - rate) <= spread


def test_documents_have_both_ends(bpe):
  cfg = settings.small(data__fim_rate=0.5, data__split_rate=0.5).data
  document = packing.encode_document(
    {'text': _TEXT}, bpe, cfg, np.random.default_rng(1)
  )
  assert document['tokens'][0] == bpe.bos_id
  assert document['tokens'][-1] == bpe.eos_id
  assert document['learned'].all()
  assert document['tokens'].shape == document['learned'].shape


def test_random_splits_keep_the_text(bpe):
  """Rate 0 changes nothing; rate 1 leaves no such token; between, some."""
  ids = bpe.encode(_TEXT)
  kinds = set(bpe.splittable_ids.tolist())
  count = np.isin(ids, bpe.splittable_ids).sum()
  assert count > 50
  left = {}
  for rate in (0.0, 0.3, 1.0):
    rng = np.random.default_rng(0)
    split = packing.split_at_random(ids, bpe, rate, rng)
    assert bpe.decode(split) == _TEXT
    left[rate] = sum(int(t) in kinds for t in split)
  assert left[0.0] == count
  assert left[1.0] == 0
  assert 0.5 * count < left[0.3] < 0.9 * count


@hypothesis.given(total=st.integers(1, 50), length=st.integers(1, 12))
def test_splitting_loses_nothing_and_isolated_keeps_the_start(total, length):
  document = {'tokens': np.arange(total), 'learned': np.ones(total)}
  pieces = packing.split_document(document, length, isolated=False)
  tokens = np.concatenate([p['tokens'] for p in pieces])
  np.testing.assert_array_equal(tokens, np.arange(total))
  assert max(p['tokens'].size for p in pieces) <= length
  (only,) = packing.split_document(document, length, isolated=True)
  np.testing.assert_array_equal(only['tokens'], np.arange(min(total, length)))


def row():
  """Two samples of 4 and 3 tokens and one of padding, T = 7."""
  return {
    'tokens': np.array([10, 11, 12, 13, 20, 21, 22, 0]),
    'learned': np.array([1, 1, 1, 1, 0, 1, 1, 0]),
    'tokens_segment_ids': np.array([1, 1, 1, 1, 2, 2, 2, 0]),
    'tokens_positions': np.array([0, 1, 2, 3, 0, 1, 2, 0]),
  }


def test_example_of_pre_training():
  """Samples see each other; the border's target counts, padding does not."""
  example = packing.to_example(row(), isolated=False)
  assert example['targets_BT'].tolist() == [11, 12, 13, 20, 21, 22, 0]
  assert example['weights_BT'].tolist() == [
    1,
    1,
    1,
    0,
    1,
    1,
    0,
  ]  # 20 not learned
  assert example['positions_BT'].tolist() == list(range(7))
  assert example['segments_BT'].tolist() == [1, 1, 1, 1, 2, 2, 2]


def test_example_of_isolated_samples():
  """No target across a border; positions begin anew."""
  given = row() | {'learned': np.array([1, 1, 1, 1, 1, 1, 1, 0])}
  example = packing.to_example(given, isolated=True)
  assert example['weights_BT'].tolist() == [1, 1, 1, 0, 1, 1, 0]
  assert example['positions_BT'].tolist() == [0, 1, 2, 3, 0, 1, 2]
  open_ = packing.to_example(given, isolated=False)
  assert open_['weights_BT'].tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_counts_by_kind(bpe):
  """A chat's prompt is read but not learned."""
  chat = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
  ]
  cfg = settings.small().data
  document = packing.encode_document(
    {'messages': chat}, bpe, cfg, np.random.default_rng(0)
  )
  kinds = collections.Counter(document['learned'].tolist())
  assert kinds[1] == bpe.encode('b').size + 1
  assert document['learned'].dtype == np.int32
