"""Held-out figures against a direct sum in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import evaluate
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader
from dsv3_jax.nn import model
from tests import tiny_run
from tests.nn import models


@pytest.fixture(scope='module')
def about(tmp_path_factory):
  cfg = tiny_run.make(tmp_path_factory.mktemp('evaluate'))
  corpus = corpora.open_corpus(cfg.data)
  tokenizer = corpora.load_tokenizer(cfg.data, corpus)
  params, router = models.random_params(cfg)
  as_f32 = lambda tree: jax.tree.map(jnp.float32, tree)
  return evaluate.Evaluation(
    cfg=cfg,
    params=as_f32(params),
    router=as_f32(router),
    corpus=corpus,
    tokenizer=tokenizer,
  )


def windows_of(e):
  return loader.eval_windows(
    e.corpus.valid, e.tokenizer, e.cfg.data, e.cfg.eval.max_bytes,
    e.cfg.eval.stride,
  )  # fmt: skip


def test_score_is_the_sum_of_cross_entropies(about):
  windows = windows_of(about)
  names = model.Batch._fields
  rows = {n: jnp.asarray(windows[n[:-2] + 'WT']) for n in names}
  batch = model.Batch(**rows)
  logits, _ = models.logits(about.cfg)(about.params, about.router, batch)
  logits = np.asarray(logits, np.float64)
  peak = logits.max(-1)
  lse = peak + np.log(np.exp(logits - peak[..., None]).sum(-1))
  targets = windows['targets_WT'][..., None]
  nats = lse - np.take_along_axis(logits, targets, -1)[..., 0]
  want = float((nats * windows['weights_WT']).sum())
  args = (about.cfg, about.params, about.router, windows)
  got, tokens = evaluate.score(*args)
  assert tokens == windows['weights_WT'].sum()
  assert got == pytest.approx(want, rel=1e-6)
  told = evaluate.heldout(about)
  size = windows['num_bytes']
  assert told['bytes'] == size == sum(len(t.encode()) for t in windows['texts'])
  assert told['bits_per_byte'] == pytest.approx(want / math.log(2) / size)
  assert told['loss_nats_per_token'] == pytest.approx(want / tokens)


def test_batch_size_does_not_matter(about):
  windows, totals = windows_of(about), []
  for size in (1, 3, 64):
    how = dataclasses.replace(about.cfg.eval, batch_size=size)
    cfg = dataclasses.replace(about.cfg, eval=how)
    totals.append(evaluate.score(cfg, about.params, about.router, windows))
  assert len({tokens for _, tokens in totals}) == 1
  nats = [total for total, _ in totals]
  np.testing.assert_allclose(nats, nats[0], rtol=1e-6)


def test_a_model_that_knows_nothing_costs_log2_of_the_vocabulary(about):
  flat = about.params | {
    'head': {'w': jnp.zeros_like(about.params['head']['w'])}
  }
  told = evaluate.heldout(dataclasses.replace(about, params=flat))
  vocab = about.cfg.model.vocab_size
  assert told['loss_nats_per_token'] == pytest.approx(math.log(vocab), rel=1e-6)
  want = math.log2(vocab) * told['tokens'] / told['bytes']
  assert told['bits_per_byte'] == pytest.approx(want, rel=1e-6)


def test_baselines_are_ordered(about):
  told = evaluate.compare(about)
  assert told['bigram_bits_per_byte'] < told['unigram_bits_per_byte'] < 8
  assert told['zlib_bits_per_byte'] < 8
