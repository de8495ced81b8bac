"""A run's folder: who may train in it, and with what."""

import dataclasses
import json

import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import source
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import output_folder
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.training import run_dir
from tests import tiny_run


def test_what_a_run_may_not_change(tmp_path):
  cfg = tiny_run.make(tmp_path)
  run_dir.check(cfg, tmp_path)
  run_dir.write_config(cfg, tmp_path)
  path = tmp_path / 'config.json'
  body = path.read_text()
  other = tiny_run.make(tmp_path, optim__lr__peak=0.5)
  with pytest.raises(
    errors.InputError, match=r'optim\.lr\.peak=0\.5 diff'
  ) as e:
    run_dir.check(other, tmp_path)
  assert '--workdir' in str(e.value)
  assert path.read_text() == body
  skip = tiny_run.make(tmp_path, data__bad_records='skip')
  assert run_dir.check(skip, tmp_path) == -1
  changed = tiny_run.make(tmp_path, data__on_change='continue')
  assert run_dir.check(changed, tmp_path) == -1
  longer = tiny_run.make(tmp_path, train__total_tokens=6400)
  assert run_dir.check(longer, tmp_path) == -1
  run_dir.check(tiny_run.make(tmp_path, train__microbatch_size=1), tmp_path)
  roomy = tiny_run.make(tmp_path, model__moe__buffer_factor=2.0)
  run_dir.check(roomy, tmp_path)
  run_dir.write_config(longer, tmp_path)
  assert json.loads(path.read_text())['train']['total_tokens'] == 6400
  assert source.read_config(tmp_path) == longer
  # Release 0.2 did not have these.
  old = json.loads(path.read_text())
  del old['data']['bad_records'], old['data']['on_change']
  path.write_text(json.dumps(old))
  assert source.read_config(tmp_path) == longer
  assert run_dir.check(longer, tmp_path) == -1
  path.write_text('{"model": {"norm_eps": 1e-6}}')
  with pytest.raises(errors.InputError, match=r'config\.json: seed is missing'):
    source.read_config(tmp_path)
  path.write_text(body[:100])
  for read in (lambda: run_dir.check(cfg, tmp_path),
               lambda: source.read_config(tmp_path)):  # fmt: skip
    with pytest.raises(errors.InputError, match=r'config\.json is not JSON'):
      read()


def test_runs_from_before_there_were_two_eps(tmp_path):
  """Version 0.2.0 had one: they still compute what they computed."""
  eps = {'model__norm_eps': 1e-5, 'model__latent_norm_eps': 1e-5}
  cfg = tiny_run.make(tmp_path, **eps)
  body = json.loads(config.to_json(cfg))
  del body['model']['latent_norm_eps']
  (tmp_path / 'config.json').write_text(json.dumps(body))
  assert source.read_config(tmp_path) == cfg
  run_dir.check(cfg, tmp_path)
  other = tiny_run.make(tmp_path, model__norm_eps=1e-5)
  with pytest.raises(errors.InputError, match=r'latent_norm_eps=1e-06 differs'):
    run_dir.check(other, tmp_path)


def test_a_batch_wise_loss_keeps_its_micro_batches(tmp_path):
  kind = {'balance__kind': 'batch'}
  run_dir.write_config(tiny_run.make(tmp_path, **kind), tmp_path)
  other = tiny_run.make(tmp_path, train__microbatch_size=1, **kind)
  with pytest.raises(errors.InputError, match=r'train\.microbatch_size=1 diff'):
    run_dir.check(other, tmp_path)


def test_one_process_at_a_time(tmp_path):
  with output_folder.held(tmp_path / 'a' / 'b', 'workdir'):
    second = output_folder.held(tmp_path / 'a' / 'b', 'workdir')
    with pytest.raises(errors.InputError, match='in use by another process'):
      second.__enter__()
  with output_folder.held(tmp_path / 'a' / 'b', 'workdir'):
    pass  # free again


@pytest.mark.parametrize('below', ['', 'deeper'])
def test_a_file_is_no_workdir(tmp_path, below):
  (tmp_path / 'file').write_text('x')
  refused = output_folder.held(tmp_path / 'file' / below, 'workdir')
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
  assert run_dir.tokenizer(given, corpus, run).text == first.text
  first.save(run / 'tokenizer.json')
  assert run_dir.tokenizer(cfg, corpus, run).text == first.text
  assert run_dir.tokenizer(given, corpus, run).text == first.text
  other = dataclasses.replace(cfg, tokenizer=str(tmp_path / 'second.json'))
  with pytest.raises(errors.InputError, match=r'data\.tokenizer=.*second'):
    run_dir.tokenizer(other, corpus, run)


def test_processes_of_a_job_have_the_same_settings():
  first = {'train': {'seed': 1, 'steps': 2}, 'data': {'source': 'a'}}
  run_dir.check_same(first, first)
  mine = first | {'train': {'seed': 3, 'steps': 2}}
  with pytest.raises(
    errors.InputError, match=r'train\.seed=3 differs from 1 in process 0'
  ):
    run_dir.check_same(mine, first)
