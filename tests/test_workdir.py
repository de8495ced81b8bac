"""A run's folder: who may train in it, and with what."""

import dataclasses
import json

import pytest

from dsv3_jax import errors, workdir
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import tokenizer as tokenizers
from tests import tiny_run


def test_what_a_run_may_not_change(tmp_path):
  cfg = tiny_run.make(tmp_path)
  workdir.check(cfg, tmp_path)
  workdir.write_config(cfg, tmp_path)
  path = tmp_path / 'config.json'
  body = path.read_text()
  other = tiny_run.make(tmp_path, optim__lr__peak=0.5)
  with pytest.raises(
    errors.InputError, match=r'optim\.lr\.peak=0\.5 diff'
  ) as e:
    workdir.check(other, tmp_path)
  assert '--workdir' in str(e.value)
  assert path.read_text() == body
  longer = tiny_run.make(tmp_path, train__total_tokens=6400)
  assert workdir.check(longer, tmp_path) == -1
  workdir.check(tiny_run.make(tmp_path, train__microbatch_size=1), tmp_path)
  workdir.write_config(longer, tmp_path)
  assert json.loads(path.read_text())['train']['total_tokens'] == 6400
  assert workdir.read_config(tmp_path) == longer
  path.write_text(body[:100])
  for read in (lambda: workdir.check(cfg, tmp_path),
               lambda: workdir.read_config(tmp_path)):  # fmt: skip
    with pytest.raises(errors.InputError, match=r'config\.json is not JSON'):
      read()


def test_a_batch_wise_loss_keeps_its_micro_batches(tmp_path):
  kind = {'balance__kind': 'batch'}
  workdir.write_config(tiny_run.make(tmp_path, **kind), tmp_path)
  other = tiny_run.make(tmp_path, train__microbatch_size=1, **kind)
  with pytest.raises(errors.InputError, match=r'train\.microbatch_size=1 diff'):
    workdir.check(other, tmp_path)


def test_one_process_at_a_time(tmp_path):
  with workdir.held(tmp_path / 'a' / 'b'):
    second = workdir.held(tmp_path / 'a' / 'b')
    with pytest.raises(errors.InputError, match='in use by another process'):
      second.__enter__()
  with workdir.held(tmp_path / 'a' / 'b'):
    pass  # free again


@pytest.mark.parametrize('below', ['', 'deeper'])
def test_a_file_is_no_workdir(tmp_path, below):
  (tmp_path / 'file').write_text('x')
  refused = workdir.held(tmp_path / 'file' / below)
  with pytest.raises(errors.InputError, match='cannot be written'):
    refused.__enter__()


def test_a_run_keeps_its_tokenizer(tmp_path):
  texts = ['one text about texts, and another text'] * 4
  first = tokenizers.train(texts, 280)
  second = tokenizers.train(['quite other words in other words'] * 4, 280)
  for name, tokenizer in (('first', first), ('second', second)):
    tokenizer.save(tmp_path / f'{name}.json')
  run = tmp_path / 'run'
  run.mkdir()
  cfg = tiny_run.make(tmp_path).data
  given = dataclasses.replace(cfg, tokenizer=str(tmp_path / 'first.json'))
  corpus = corpora.Corpus([], [], 'mark')
  assert workdir.tokenizer(given, corpus, run).text == first.text
  first.save(run / 'tokenizer.json')
  assert workdir.tokenizer(cfg, corpus, run).text == first.text
  assert workdir.tokenizer(given, corpus, run).text == first.text
  other = dataclasses.replace(cfg, tokenizer=str(tmp_path / 'second.json'))
  with pytest.raises(errors.InputError, match=r'data\.tokenizer=.*second'):
    workdir.tokenizer(other, corpus, run)

  then = workdir.fingerprint(corpus, first)
  workdir.check_fingerprint(then, then, run)
  for name, now in (
    ('corpus', workdir.fingerprint(corpora.Corpus([], [], 'new'), first)),
    ('tokenizer', workdir.fingerprint(corpus, second)),
  ):
    with pytest.raises(errors.InputError, match=f'the {name} is'):
      workdir.check_fingerprint(now, then, run)
