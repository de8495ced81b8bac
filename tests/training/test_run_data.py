"""A corpus that was repaired or extended: refused, or a run goes on with it."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import prepare
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.training import loop, run_data
from tests import tiny_run


def make(folder, steps, **changes):
  """A run on one JSONL file with a record for each text of the tiny corpus."""
  source = folder / 'records.jsonl'
  fixed = {'data__source': str(source), 'sample__prompts': ()}
  cfg = tiny_run.make(folder, **(fixed | changes))
  if not source.exists():
    texts = [p.read_text() for p in sorted((folder / 'corpus').glob('*.txt'))]
    body = [json.dumps({'text': text}) for text in texts]
    source.write_text('\n'.join(body), encoding='utf-8')
  return tiny_run.until(cfg, steps), source


@pytest.mark.slow
def test_a_run_leaves_out_bad_records_and_goes_on_when_they_are_repaired(
  tmp_path, capsys
):
  """From that step on, a new stream; the same bits each time; it resumes."""
  cfg, source = make(tmp_path, 2)
  first, whole = tmp_path / 'first', source.read_text()
  broken = whole.replace('{"text": ', '{"text"; ', 1)  # as long
  source.write_text(broken + '\n{"text": "\\ud800"}')
  with pytest.raises(
    errors.InputError, match=r'has 2 bad .*:1: not JSON: .*:41'
  ):
    loop.run(cfg, first)
  assert not first.exists()
  cfg, _ = make(tmp_path, 2, data__bad_records='skip')
  loop.run(cfg, first)
  path = first / 'skipped_records.txt'
  faults = path.read_text().splitlines()
  assert faults[0].startswith(f'{source}:1: not JSON: ')
  reason = 'text has a lone surrogate at character 0'
  assert faults[1] == f'{source}:41: {reason}'
  line = f'left out 2 bad records of data.source, listed in {path}; the first: '
  assert line + faults[0] in capsys.readouterr().out

  source.write_text(whole)
  with pytest.raises(errors.InputError) as caught:
    loop.run(make(tmp_path, 5)[0], first)
  message = str(caught.value)
  assert re.match('the corpus is .* but .* was trained with ', message)
  assert "go on with the new one after step 2 by data.on_change='con" in message
  ends = []
  for name, stops in (('a', (5,)), ('b', (3, 5))):
    workdir = shutil.copytree(first, tmp_path / name)
    for i, stop in enumerate(stops):
      cfg, _ = make(tmp_path, stop, data__on_change='continue')
      loop.run(cfg, workdir)
      log = 'the corpus changed: from step 3 on, the run reads the new one'
      assert (log in capsys.readouterr().out) == (i == 0)
    ends.append(tiny_run.committed(cfg, workdir, 5))
    steps = [line['step'] for line in tiny_run.read_metrics(workdir)]
    assert steps == [1, 2, 3, 4, 5]
    assert not (workdir / 'skipped_records.txt').exists()
  (want, documents), (got, same) = ends
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert same == documents and documents['loader_seed'] != cfg.seed
  opened = corpora.open_corpus(cfg.data)
  assert documents['data']['corpus'] == opened.fingerprint


def take(feed, count=3, close=True):
  """The next tokens of a feed, which ends."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tokens = feed.take(count, (count, 2, 32), one)['tokens_BT']
  if close:
    feed.close()
  return np.array(tokens)


def test_the_stream_of_a_checkpoint_or_of_another_corpus(tmp_path):
  """Release 0.2 wrote names and sizes, and no seed: it goes on, too."""
  cfg, source = make(tmp_path, 1, data__on_change='continue')
  corpus, tokenizer, _ = run_data.open_data(cfg, tmp_path)
  open_feed = lambda corpus, extras, cfg=cfg: run_data.open_feed(
    cfg, corpus, tokenizer, extras, tmp_path
  )
  stream = open_feed(corpus, {})
  take(stream, 2, close=False)
  extras = {
    'data': run_data.fingerprint(corpus, tokenizer),
    'progress': {'step': 2, 'tokens': 9},
    'loader': stream.get_state(),
    'loader_seed': stream.seed,
  }
  want = take(stream)
  np.testing.assert_array_equal(take(open_feed(corpus, extras)), want)
  old = {k: x for k, x in extras.items() if k != 'loader_seed'}
  old['data'] = extras['data'] | {'corpus': corpus.size_fingerprint}
  np.testing.assert_array_equal(take(open_feed(corpus, old)), want)

  # Another corpus: from its start, by a seed that the step decides.
  source.write_text(source.read_text() + '\n{"text": "one more"}')
  longer, _, _ = run_data.open_data(cfg, tmp_path)
  after = [open_feed(longer, extras) for _ in range(2)]
  later = open_feed(longer, extras | {'progress': {'step': 3, 'tokens': 9}})
  seed = after[0].seed
  assert len({seed, later.seed, cfg.seed}) == 3
  fresh = open_feed(longer, {}, dataclasses.replace(cfg, seed=seed))
  want = take(fresh)
  for stream in after:
    np.testing.assert_array_equal(take(stream), want)
  assert np.any(take(later) != want)


def test_prepared_rows_of_a_checkpoint_or_of_another_corpus(tmp_path):
  """From the row that the run had come to; or from 0, by that step's seed."""
  cfg, source = make(tmp_path, 4, data__on_change='continue')
  corpus, tokenizer, _ = run_data.open_data(cfg, tmp_path)
  open_feed = lambda corpus, extras, cfg=cfg: run_data.open_feed(
    cfg, corpus, tokenizer, extras, tmp_path
  )
  output = tmp_path / 'rows'
  there = lambda output: dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, prepared=str(output))
  )
  prepare.prepare(cfg, output)
  stream = open_feed(corpus, {})
  take(stream, 2, close=False)
  extras = {
    'data': run_data.fingerprint(corpus, tokenizer) | {'kept': ''},
    'progress': {'step': 2, 'tokens': 2 * 2 * 32},
    'loader': stream.get_state(),
    'loader_seed': stream.seed,
  }
  want = take(stream, 2)
  # Release 0.2 did not count rows; after a change they are not all tokens'.
  for rows in ({}, {'rows': 4}):
    feed = open_feed(corpus, extras | rows, there(output))
    assert feed.row == 4
    np.testing.assert_array_equal(take(feed, 2), want)
  feed = open_feed(corpus, extras | {'rows': 2}, there(output))
  assert feed.row == 2
  feed.close()
  other = extras | {'data': extras['data'] | {'kept': 'other'}}
  for changed in (cfg, there(output)):
    with pytest.raises(
      errors.InputError, match='keeps other documents than th'
    ):
      open_feed(corpus, other, changed)

  source.write_text(source.read_text() + '\n{"text": "one more"}')
  longer, _, _ = run_data.open_data(cfg, tmp_path)
  fresh = open_feed(longer, extras)
  match = rf'seed=0, but here it is {fresh.seed}: '
  again = tmp_path / 'again'
  prepare.prepare(cfg, again)
  with pytest.raises(errors.InputError, match=match):
    open_feed(longer, extras, there(again))
  shutil.rmtree(again)
  prepare.prepare(dataclasses.replace(cfg, seed=fresh.seed), again)
  feed = open_feed(longer, extras, there(again))
  assert (feed.row, feed.seed) == (0, fresh.seed)
  np.testing.assert_array_equal(take(feed, 2), take(fresh, 2))


@pytest.fixture
def marks(tmp_path):
  """A corpus' fingerprint, and the extras of a checkpoint after step 5."""
  tokenizer = tokenizers.train(['one text about texts, and another'] * 4, 280)
  corpus = corpora.Corpus([], [], 'content:new', size_fingerprint='old')
  data = run_data.fingerprint(corpus, tokenizer)
  return data, {'data': data, 'progress': {'step': 5, 'tokens': 9}}


@pytest.mark.parametrize('changes', [{}, {'data__on_change': 'continue'}])
def test_which_corpus_is_the_same(tmp_path, marks, changes):
  """The content; or, of a run of release 0.2, names and sizes."""
  now, extras = marks
  cfg = tiny_run.make(tmp_path, **changes)
  is_same = lambda then, sizes: run_data.is_same(
    cfg, now, extras | {'data': now | then}, sizes, tmp_path
  )
  assert is_same({}, '') and is_same({'corpus': 'old'}, 'old')
  for then, sizes in (('other', 'old'), ('old', ''), ('', '')):
    if changes:
      assert not is_same({'corpus': then}, sizes)
      continue
    with pytest.raises(errors.InputError, match=r"content:new', but .*step 5 "):
      is_same({'corpus': then}, sizes)
  with pytest.raises(errors.InputError, match=r'^the tokenizer is .*restore'):
    is_same({'tokenizer': 'other'}, '')


def test_turns_of_tools_need_a_tokenizer_with_them(tmp_path):
  cfg, source = make(tmp_path, 1)
  texts = [p.read_text() for p in (tmp_path / 'corpus').glob('*.txt')]
  tokenizers.train(texts, 512).save(tmp_path / 'plain.json')
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'tool', 'content': 'b'}]
  line = json.dumps({'messages': turns})
  source.write_text(source.read_text() + '\n' + line)
  cfg, _ = make(tmp_path, 1, data__tokenizer=str(tmp_path / 'plain.json'))
  expected = r'records\.jsonl:41 has turns of tools, but the tokenizer lacks'
  with pytest.raises(errors.InputError, match=expected):
    run_data.open_data(cfg, tmp_path / 'run')
  cfg, _ = make(tmp_path, 1)
  _, tokenizer, _ = run_data.open_data(cfg, tmp_path / 'run')
  tokenizer.check_tools('')
  assert tokenizer.vocab_size == cfg.data.tokenizer_vocab
