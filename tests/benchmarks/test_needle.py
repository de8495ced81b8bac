"""The needle benchmark: what rows ask for, and that the phase runs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from benchmarks import needle
from dsv3_jax.training import step as steps

TEXT = np.arange(4000, dtype=np.int32) % 256


@pytest.mark.parametrize('length', [32, 256, 2048])
def test_a_weight_of_one_is_on_answers_that_can_be_known(length):
  tokens, weights = needle.training_row(np.random.default_rng(0), TEXT, length)
  assert len(tokens) == length + 1 and len(weights) == length
  value_of, counted = {}, 0
  for token, before, weight in zip(
    tokens[1:], tokens[:-1], weights, strict=True
  ):
    if before >= needle.NEEDLE and before < needle.QUESTION:
      key, value = divmod(before - needle.NEEDLE, needle.KINDS)
      value_of[key] = value
    if token >= needle.ANSWER:
      key, value = before - needle.QUESTION, token - needle.ANSWER
      assert 0 <= key < needle.KINDS
      assert weight == (key in value_of)
      assert value_of.get(key, value) == value
      counted += weight
    else:
      assert weight == (0.1 if token < needle.NEEDLE else 0.0)
  assert counted >= length // 32


@pytest.mark.parametrize('depth', needle.DEPTHS)
def test_the_needle_is_where_it_should_be(depth):
  length = 512
  rng = np.random.default_rng(1)
  tokens, answer = needle.test_row(rng, TEXT, length, depth)
  assert len(tokens) == length
  is_needle = (tokens >= needle.NEEDLE) & (tokens < needle.QUESTION)
  assert np.sum(is_needle) == needle.KINDS
  key, value = tokens[-1] - needle.QUESTION, answer - needle.ANSWER
  at = np.flatnonzero(tokens == needle.spell(np.array([[key, value]])))
  assert len(at) == 1 and abs(at[0] / length - depth) < 0.05


def test_samples_in_a_row_stand_alone():
  cfg = needle.make_config(needle.SHORT, yarn=False)
  batch = needle.training_batch(np.random.default_rng(0), TEXT, cfg, 64)
  assert batch.tokens_BT.shape == (1, needle.TOKENS // 256, 256)
  np.testing.assert_array_equal(batch.positions_BT[0, 0], np.arange(256) % 64)
  ids, counts = np.unique(batch.segments_BT, return_counts=True)
  assert len(ids) == needle.TOKENS // 64 and set(counts) == {64}
  assert batch.weights_BT.dtype == np.float32
  assert [needle.sample_length(x, cfg) for x in (0.0, 0.2, 0.5)] == [
    32,
    64,
    256,
  ]


@pytest.mark.nightly
@pytest.mark.parametrize('layers', [1, 3])
def test_the_phase_runs_over_context(layers, monkeypatch, tmp_path):
  """Weights go on into rows twice as long, sharded over two devices."""
  full = needle.make_config

  def make_config(*args, **options):
    cfg = full(*args, **options)
    net = dataclasses.replace(cfg.model, num_layers=1, num_dense_layers=1)
    return dataclasses.replace(cfg, model=net) if layers == 1 else cfg

  monkeypatch.setattr(needle, 'make_config', make_config)
  for name, value in {
    'SHORT': 64, 'LONG': 128, 'TOKENS': 256, 'LENGTHS': (128,),
    'DEPTHS': (0.0, 1.0), 'SAMPLE_LENGTHS': ((1.0, 64),),
  }.items():  # fmt: skip
    monkeypatch.setattr(needle, name, value)
  monkeypatch.setattr(needle, 'read_text', lambda cfg: TEXT)
  real = needle.train

  def train(cfg, start, *rest):
    if start is not None:
      return real(cfg, start, *rest)
    init = jax.jit(functools.partial(steps.init_state, cfg))
    state = init(jax.random.key(0))
    return needle.Weights(state['params'], state['router'])

  monkeypatch.setattr(needle, 'train', train)  # a fresh model is enough
  output = tmp_path / 'needle.md'
  flags = ['--steps=1', '--extension=1', '--context=2', '--count=2']
  assert needle.main([*flags, f'--output={output}']) == 0
  text = output.read_text()
  for model in ('before', 'yarn', 'after'):
    assert f'| {model} | 100% | ' in text
  assert output.with_suffix('.png').stat().st_size > 10_000


def test_bad_flags_are_one_line(capsys):
  with pytest.raises(SystemExit) as stopped:
    needle.main(['--count=0'])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == 'dsv3: --count=0 must be at least 1\n'
