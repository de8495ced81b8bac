"""The endless stream: deterministic and resumable."""

import dataclasses
import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax import errors
from dsv3_jax.data import loader, tokenizer
from tests import settings

_DOCUMENTS = [
  {'name': f'{i}', 'text': f'document {i}: ' + 'alpha beta; ' * (3 * i % 17)}
  for i in range(24)
]


@pytest.fixture(scope='module')
def bpe():
  return tokenizer.train([d['text'] for d in _DOCUMENTS], 280)


def test_a_broken_record_ends_the_stream_with_its_own_error(bpe):
  """Through Grain's threads: one line, and not a fault of ours."""

  class Broken(list):
    reads = 0

    def __getitem__(self, i):
      self.reads += 1
      if self.reads > 3:
        raise errors.InputError(f'records.jsonl:{i} is not JSON')
      return super().__getitem__(i)

  stream = loader.Loader(Broken(_DOCUMENTS), bpe, data_config(), seed=0, rows=2)
  try:
    with pytest.raises(errors.InputError, match=r'records\.jsonl:\d+ is'):
      next(stream)
  finally:
    stream.close()


def data_config(**changes):
  fixed = {'data__fim_rate': 0.3, 'data__split_rate': 0.3}
  fixed |= {'data__shuffle_window': 8, 'data__packing_bins': 4}
  named = {f'data__{name}': value for name, value in changes.items()}
  return settings.small(**(fixed | named)).data


def open_loader(bpe, cfg, **options):
  options = {'seed': 3, 'rows': 2} | options
  return loader.Loader(_DOCUMENTS, bpe, cfg, **options)


def take(stream, count):
  return list(itertools.islice(stream, count))


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize('isolated', [False, True])
@pytest.mark.parametrize('stop', [0, 1, 4, 17, 30])
def test_goes_on_from_a_state_in_json(bpe, isolated, stop):
  cfg = data_config(isolate_samples=isolated)
  first = open_loader(bpe, cfg)
  take(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  want = take(first, 12)
  first.close()
  again = open_loader(bpe, cfg)
  again.set_state(state)
  same(take(again, 12), want)
  again.close()


def test_seed_decides(bpe):
  runs = []
  for seed in (3, 3, 4):
    stream = open_loader(bpe, data_config(), seed=seed)
    runs.append(take(stream, 6))
    stream.close()
  same(runs[0], runs[1])
  assert any(
    not np.array_equal(a['tokens_BT'], b['tokens_BT'])
    for a, b in zip(runs[0], runs[2], strict=True)
  )


def test_shapes_and_dtypes(bpe):
  stream = open_loader(bpe, data_config(), rows=3)
  (batch,) = take(stream, 1)
  stream.close()
  assert {x.shape for x in batch.values()} == {(3, 12)}
  kinds = {name: x.dtype for name, x in batch.items()}
  assert kinds.pop('weights_BT') == np.float32
  assert set(kinds.values()) == {np.dtype(np.int32)}


def test_rows_of_a_long_document_are_spread(bpe):
  """With a window, neighbours in a document are not neighbours in a batch."""
  book = [{'name': 'book', 'text': ' '.join(str(i) for i in range(4000))}]
  tokens = [bpe.bos_id, *bpe.encode(book[0]['text']).tolist()]
  number = {tuple(tokens[at : at + 12]): at // 13 for at in range(0, 2600, 13)}
  shares = {}
  for window in (1, 64):
    cfg = data_config(
      shuffle_window=window, packing_bins=1, fim_rate=0.0, split_rate=0.0
    )
    stream = loader.Loader(book, bpe, cfg, seed=0, rows=1)
    rows = [b['tokens_BT'][0].tolist() for b in take(stream, 64)]
    stream.close()
    places = [number[tuple(row)] for row in rows]
    assert sorted(places) == list(range(64))
    shares[window] = np.mean(np.diff(places) == 1)
  assert shares[1] > 0.9
  assert shares[64] < 0.2


@hypothesis.given(
  lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
  length=st.integers(4, 16),
  stride=st.integers(1, 16),
)
def test_every_token_is_scored_once(bpe, lengths, length, stride):
  stride = min(stride, length)
  documents = [
    {'name': f'{i}', 'text': 'x y;' * size} for i, size in enumerate(lengths)
  ]
  cfg = data_config(seq_len=12)
  cfg = dataclasses.replace(cfg, seq_len=length)
  windows = loader.eval_windows(documents, bpe, cfg, 10**6, stride)
  assert windows['num_bytes'] == sum(len(d['text']) for d in documents)
  weights = windows['weights_BT'] > 0
  scored = windows['targets_BT'][weights].tolist()
  want = [t for text in windows['texts'] for t in bpe.encode(text).tolist()]
  assert scored == want
  # A scored token saw all of its window before it, and the one just before.
  for w, row in enumerate(weights):
    for t in np.flatnonzero(row):
      assert windows['segments_BT'][w, : t + 1].all()
      if t:
        before = windows['targets_BT'][w, t - 1]
        assert windows['tokens_BT'][w, t] == before


def test_at_most_so_many_bytes_but_one_document(bpe):
  cfg = data_config()
  one = loader.eval_windows(_DOCUMENTS, bpe, cfg, 1, 4)
  assert len(one['texts']) == 1
  some = loader.eval_windows(_DOCUMENTS, bpe, cfg, 500, 4)
  assert 1 < len(some['texts']) < len(_DOCUMENTS)
  assert some['num_bytes'] <= 500
