"""`dsv3_jax.load` of a run that was really trained."""

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import train
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from dsv3_jax.nn import model
from tests import tiny_run
from tests.nn import models


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loaded')
  cfg = tiny_run.make(folder)
  cfg = tiny_run.make(folder, train__total_tokens=tiny_run.tokens_after(6))
  train.run(cfg, folder / 'run')
  return cfg, folder / 'run'


def test_logits_are_the_trained_states(run):
  cfg, workdir = run
  loaded = dsv3_jax.load(workdir)
  kept = store.Store(workdir / 'checkpoints', keep=1)
  like = jax.eval_shape(lambda: steps.init_state(cfg, jax.random.key(0)))
  like = {'train': {name: like[name] for name in ('params', 'router')}}
  state = kept.restore(6, like, partial=True)[0]['train']
  kept.close()
  tokens_BT = np.arange(24, dtype=np.int32).reshape(2, 12) + 40
  shape, ones = tokens_BT.shape, np.ones((2, 12), np.int32)
  ahead_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
  places = np.broadcast_to(np.arange(12, dtype=np.int32), shape)
  batch = model.Batch(tokens_BT, ahead_BT, places, ones, np.float32(ones))
  main, (mtp,) = models.logits(cfg)(state['params'], state['router'], batch)
  np.testing.assert_array_equal(loaded.logits(tokens_BT), main)
  np.testing.assert_array_equal(loaded.mtp_logits(tokens_BT), mtp)
  assert main.shape == (2, 12, cfg.model.vocab_size)
  assert loaded.config.model == cfg.model


def test_generate_returns_text(run):
  loaded = dsv3_jax.load(run[1])
  texts = loaded.generate(['def ', ''], 6, temperature=0.0)
  assert len(texts) == 2
  assert all(isinstance(text, str) and text for text in texts)
  assert texts == loaded.generate(['def ', ''], 6, temperature=0.0)


def test_bfloat16_stays_near(run):
  tokens_BT = np.full((1, 8), 50, np.int32)
  low, high = (
    np.asarray(dsv3_jax.load(run[1], dtype).logits(tokens_BT))
    for dtype in ('bfloat16', 'float32')
  )
  assert 0 < np.abs(low - high).max() < 0.05 * np.abs(high).max()


def test_refusals(run, tmp_path):
  with pytest.raises(ValueError, match="dtype='int8' must be"):
    dsv3_jax.load(run[1], 'int8')
  with pytest.raises(ValueError, match=r'config\.json cannot be read'):
    dsv3_jax.load(tmp_path)
  for name in ('config.json', 'tokenizer.json'):
    (tmp_path / name).write_bytes((run[1] / name).read_bytes())
  with pytest.raises(ValueError, match='holds no committed step'):
    dsv3_jax.load(tmp_path)
