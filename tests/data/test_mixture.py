"""Several sources: their shares, their order, and what is refused."""

import itertools
import json

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import (
  corpus,
  loader,
  mixture,
  prepare,
  selection,
  shards,
  tokenizer,
)
from tests import settings
from tests.data import test_prepare as prepared

# Words that no other source has; sizes that differ by far.
_WORDS = {'short': ('alpha', 3), 'long': ('omega', 40), 'rare': ('theta', 10)}
_SHARES = {'short': 0.5, 'long': 0.3, 'rare': 0.2}
_COUNTS = {'short': 360, 'long': 50, 'rare': 48}

DRAWS = 2000


def texts(name):
  word, length = _WORDS[name]
  return [
    f'{word} {i} ' + f'{word} ' * (length + i % 3) for i in range(_COUNTS[name])
  ]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sources')
  for name in _WORDS:
    lines = [json.dumps({'text': text}) for text in texts(name)]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  everything = [text for name in _WORDS for text in texts(name)]
  tokenizer.train(everything, 300).save(folder / 'tokenizer.json')
  return folder


def make(source, **changes):
  """A `Config` that mixes the three sources."""
  entries = tuple(
    f'{name}={share}:{source / name}.jsonl' for name, share in _SHARES.items()
  )
  fixed = {'data__source': '', 'data__mixture': entries}
  fixed |= {'model__vocab_size': 300, 'data__fim_rate': 0.0}
  fixed |= {'data__shuffle_window': 512}
  return prepared.make(source, **(fixed | changes))


def test_shares_are_those_of_bytes(source):
  """Documents of a source are drawn by share / mean bytes, evenly."""
  cfg = make(source)
  train = corpus.open_corpus(cfg.data).train
  data = loader.shuffled(train, seed=0)
  drawn = [data[i] for i in range(DRAWS)]
  sizes = dict.fromkeys(range(3), 0)
  for record in drawn:
    sizes[record['source']] += len(record['text'])
  total = sum(sizes.values())
  for size, share in zip(sizes.values(), _SHARES.values(), strict=True):
    assert abs(size / total - share) < 0.02
  # Each document of a source once before any comes again.
  for i, name in enumerate(_SHARES):
    mine = [record['name'] for record in drawn if record['source'] == i]
    count = len(train.sources[i].documents)
    assert len(mine) > 2 * count, name
    first, second = mine[:count], mine[count : 2 * count]
    assert len(set(first)) == count and sorted(first) == sorted(second)
    assert first != second
  # Evenly: a stretch has the shares of the whole, within a document or two.
  for start in range(0, DRAWS, 200):
    stretch = [record['source'] for record in drawn[start : start + 200]]
    for i in range(3):
      share = sum(record['source'] == i for record in drawn) / DRAWS
      assert abs(stretch.count(i) - 200 * share) < 3


def test_prepared_rows_are_those_of_the_stream(source, tmp_path):
  """The same code, on the fly and prepared; tokens are counted by source."""
  cfg, output = make(source), tmp_path / 'a'
  run = lambda rows: prepare.prepare(cfg, output, rows=rows, rows_per_shard=99)
  run(50)
  summary = run(400)
  want = prepared.stream(cfg, 400)
  for row, got in zip(
    want, prepared.prepared(cfg, output, range(400)), strict=True
  ):
    assert got.keys() == row.keys()
    for name, x in row.items():
      np.testing.assert_array_equal(got[name], x)
  rows = shards.Folder(output).read(range(400))
  bpe = tokenizer.Tokenizer.from_file(cfg.data.tokenizer)
  pieces = ' '.join(
    bpe.decode(row['tokens'][row['tokens_segment_ids'] == segment])
    for row in rows
    for segment in range(1, row['tokens_segment_ids'].max() + 1)
  )
  counts = summary['sources']
  assert list(counts) == list(_WORDS)
  assert sum(x['tokens'] for x in counts.values()) == summary['tokens']
  opened = corpus.open_corpus(cfg.data).train
  for (name, count), part in zip(counts.items(), opened.sources, strict=True):
    # A document's first word is followed by its number.
    word = _WORDS[name][0]
    assert count['tokens'] >= pieces.count(word) > 0
    assert count['epochs'] == count['documents'] / len(part.documents)
  heads = sum(x['documents'] for x in counts.values())
  assert heads == sum(prepared.num_heads(row, bpe.bos_id) for row in rows)


def test_too_many_epochs_are_refused(source, tmp_path):
  """When a shard shows it; what is written stays, and the limit may rise."""
  cfg, output = make(source, data__max_epochs=1.5), tmp_path / 'a'
  run = lambda cfg: prepare.prepare(cfg, output, rows=1800, rows_per_shard=150)
  with pytest.raises(
    errors.InputError,
    match=r'rare has been read 1\.\d+ times after \d+ rows, .*max_epochs=1\.5',
  ):
    run(cfg)
  with pytest.raises(errors.InputError, match='rare has been read'):
    run(cfg)
  before = prepared.contents(output)
  done = sum(name.startswith('rows-') for name in before)
  assert 0 < done < 12
  summary = run(make(source, data__max_epochs=0.0))
  assert summary['rows'] == 1800
  assert summary['written_rows'] == 1800 - 150 * done
  after = prepared.contents(output)
  assert before.items() - after.items() == {
    ('shards.jsonl', before['shards.jsonl'])
  }


def test_a_mixture_has_the_parts_of_its_sources(source):
  cfg = make(source)
  opened = corpus.open_corpus(cfg.data)
  names = {}
  for part in (opened.train, opened.valid):
    for i in range(len(part)):
      names.setdefault(part.place(i), part[i]['text'])
  assert len(names) == sum(_COUNTS.values())
  assert len(opened.train) + len(opened.valid) == len(names)
  alone = corpus.open_corpus(prepared.make(source, data__source=str(
    source / 'long.jsonl')).data)  # fmt: skip
  assert list(opened.valid.sources[1].documents) == list(alone.valid)
  with pytest.raises(IndexError):
    opened.train[len(opened.train)]


def test_a_source_may_have_no_held_out_document(source, tmp_path):
  """If another has some; each needs documents to train on."""
  path = tmp_path / 'one.jsonl'
  path.write_text('{"text": "one"}')
  long = f'long=1:{source / "long.jsonl"}'
  opened = corpus.open_corpus(
    make(source, data__mixture=(f'one=1:{path}', long)).data
  )
  assert len(opened.train.sources[0].documents) == 1
  assert len(opened.valid.sources[0].documents) == 0
  assert opened.valid[0] == opened.valid.sources[1].documents[0]
  alone = make(source, data__mixture=(f'one=1:{path}',))
  with pytest.raises(
    errors.InputError, match=r'^data\.mixture has no valid doc'
  ):
    corpus.open_corpus(alone.data)
  path.write_text('\n')
  with pytest.raises(
    errors.InputError, match=r"one\.jsonl' has no train docum"
  ):
    corpus.open_corpus(make(source, data__mixture=(f'one=1:{path}', long)).data)


def test_the_fingerprint_has_shares_and_contents(source, tmp_path):
  marks = set()
  for names in (('short', 'long'), ('long', 'short'), ('short',)):
    for share in (1.0, 2.0):
      entries = [f'{name}=1:{source / name}.jsonl' for name in names[1:]]
      entries.insert(0, f'{names[0]}={share}:{source / names[0]}.jsonl')
      cfg = make(source, data__mixture=tuple(entries))
      marks.add(corpus.open_corpus(cfg.data).fingerprint)
  assert len(marks) == 6
  moved = tmp_path / 'short.jsonl'
  moved.write_bytes((source / 'short.jsonl').read_bytes())
  there = make(source, data__mixture=(f'short=1:{moved}',))
  assert corpus.open_corpus(there.data).fingerprint in marks


def test_rules_choose_in_every_source(source):
  cfg = make(source, data__filters__max_chars=200)
  opened = corpus.open_corpus(cfg.data)
  chosen = selection.select(cfg.data, opened, say=print)
  counts = chosen.report['sources']
  assert list(counts) == list(_SHARES)
  for (name, count), part in zip(
    counts.items(), opened.train.sources, strict=True
  ):
    sizes = [len(record['text']) for record in part.documents]
    small = [size for size in sizes if size <= 200]
    assert count['documents'] == len(sizes) and count['bytes'] == sum(sizes)
    assert count['kept_documents'] == len(small), name
    assert count['kept_bytes'] == sum(small)
  with pytest.raises(errors.InputError, match="leave no document of 'long': "):
    mixture.subset(opened.train, chosen.kept)
  kept = np.arange(0, len(opened.train), 3)
  part = mixture.subset(opened.train, kept)
  assert list(part) == [opened.train[i] for i in kept.tolist()]
  assert [s.name for s in part.sources] == list(_SHARES)


def test_sizes_of_many_documents_are_sampled(monkeypatch):
  monkeypatch.setattr(mixture, 'SAMPLE', 3)
  documents = [{'text': 'x' * size} for size in (10, 1, 1, 40, 1, 1, 70)]
  messages = [{'role': 'assistant', 'content': 'ab'}, {'role': 'assistant'}]
  parts = [mixture.Source('a', 4.0, documents)]
  parts.append(mixture.Source('b', 1.0, [{'messages': messages}]))
  assert mixture.Mixture(parts).document_weights == [4 / 40, 1 / 2]


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    (
      {'mixture': ('web',)},
      r"'web' must be NAME=SHARE:SOURCE with a share > 0",
    ),
    ({'mixture': ('web=0:a',)}, "'web=0:a' must be NAME"),
    ({'mixture': ('web=1e999:a',)}, 'must be NAME'),
    ({'mixture': ('web=1-2:a',)}, 'must be NAME'),
    ({'mixture': ('=1:a',)}, 'must be NAME'),
    ({'mixture': ('a=1:x', 'b=1:x', 'a=2:y')}, "names 'a' more than once"),
    ({'mixture': ('a=1:/nowhere/*.txt',)}, "'/nowhere/.*' matches no file"),
    (
      {'source': 'stdlib'},
      r"data\.source='stdlib' must be '' if data\.mixture",
    ),
  ],
)
def test_bad_mixtures_are_one_line(source, changes, expected):
  named = {f'data__{name}': value for name, value in changes.items()}
  with pytest.raises(errors.InputError, match=expected):
    corpus.open_corpus(make(source, **named).data)


def test_any_share_is_normalised():
  """Shares are relative: 7 and 3 are 0.7 and 0.3."""
  parts = [
    mixture.Source(str(i), share, [{'text': 'x' * 10}])
    for i, share in enumerate((7.0, 3.0))
  ]
  data = loader.shuffled(mixture.Mixture(parts), seed=0)
  drawn = [record['source'] for record in itertools.islice(iter(data), 100)]
  assert drawn.count(0) == 70
  assert settings.small().data.mixture == ()
