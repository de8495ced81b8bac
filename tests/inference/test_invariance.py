"""Batch invariance: other requests do not change a bit of a request."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.inference import engine, model_runner
from dsv3_jax.inference import request as requests
from tests import nightly, settings
from tests.inference import counting
from tests.nn import models

pytestmark = pytest.mark.usefixtures('optimized')
ROOM = 200
# Wide enough that products of other sizes would round differently.
CONFIG = settings.small(
  precision='f32',
  model__max_seq_len=ROOM,
  model__rope__original_seq_len=ROOM,
  model__num_layers=2,
  model__d_model=96,
  model__d_ff=200,
  model__moe__d_ff=72,
  model__moe__block_size=64,
  model__mla__kv_lora_rank=48,
)


@dataclasses.dataclass(frozen=True)
class Kept:
  """Tokens of a request, and its latents when it ended."""

  tokens: list[int]
  latents: list[np.ndarray]


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


DRAW = requests.SamplingParams(temperature=1.0, top_p=0.95, seed=3)
MINE = (prompt(0, 100), 60, DRAW)


@pytest.fixture(
  scope='module',
  params=nightly.daily([0, 1], '1'),
  ids=['plain', 'speculative'],
)
def runner(request):
  params, router_biases = map(models.f32, models.random_params(CONFIG))
  return model_runner.ModelRunner(CONFIG, params, router_biases, request.param)


def make_engine(runner):
  # One size of the cache: each is compiled.
  options = {'num_blocks': 10, 'max_rows': 4, 'chunk': 128}
  return engine.Engine(runner, **options, batch_invariant=True)


def run_until_done(model_engine, request):
  """Runs until a request ends; its latents in the two main stacks."""
  while not request.done:
    if request.block_table:
      blocks = list(request.block_table.blocks)
      length = request.block_table.length
      caches = model_engine._caches[:2]
      rows = [
        np.asarray(x)[:, blocks].reshape(x.shape[0], -1, x.shape[-1])[
          :, :length
        ]
        for cache in caches
        for x in cache
      ]
    model_engine.step()
  return Kept(request.tokens, rows)


def assert_same_bits(got, want):
  assert got.tokens == want.tokens
  for x, y in zip(got.latents, want.latents, strict=True):
    length = min(x.shape[1], y.shape[1])
    assert length > 150
    np.testing.assert_array_equal(x[:, :length], y[:, :length])


@pytest.fixture(scope='module')
def alone(runner):
  model_engine = make_engine(runner)
  return run_until_done(model_engine, model_engine.submit(*MINE))


def test_others_beside_it(runner, alone):
  model_engine = make_engine(runner)
  for seed, size in ((1, 5), (2, 130), (3, 64)):
    model_engine.submit(
      prompt(seed, size), 40, requests.SamplingParams(temperature=1.0)
    )
    model_engine.step()
  assert_same_bits(
    run_until_done(model_engine, model_engine.submit(*MINE)), alone
  )


def test_a_beginning_that_others_left_in_the_cache(runner, alone):
  model_engine = make_engine(runner)
  first = model_engine.submit(MINE[0][:80], 30)
  while not first.done:
    model_engine.step()
  request = model_engine.submit(*MINE)
  assert_same_bits(run_until_done(model_engine, request), alone)
  assert request.num_cached_tokens == 64


def test_preemption_by_older_requests(runner, alone):
  model_engine = make_engine(runner)
  for seed in (5, 6, 7):
    model_engine.submit(prompt(seed, 120), 70)
  request = model_engine.submit(*MINE)
  assert_same_bits(run_until_done(model_engine, request), alone)
  assert model_engine.stats().preempted > 0


def test_any_traffic_has_the_same_sizes(runner, alone):
  counts = lambda: [
    f._cache_size() for f in (runner._prefill, runner._extend, runner._decode)
  ]
  known, model_engine = counts(), make_engine(runner)
  for seed, size in ((1, 5), (2, 130), (3, 64), (4, 1), (5, 198)):
    model_engine.submit(
      prompt(seed, size), 1 + seed % 2, requests.SamplingParams(seed=seed)
    )
    model_engine.step()
  while not model_engine.is_idle:
    model_engine.step()
  assert counts() == known and known[0] == 0


def test_recomputed_tokens_are_reported_once():
  runner = counting.Runner(num_speculative_tokens=1)
  model_engine = engine.Engine(
    runner, num_blocks=4, max_rows=2, batch_invariant=True
  )
  submitted = [model_engine.submit([i] * 60, 130) for i in (3, 4)]
  reported = {request: [] for request in submitted}
  while not model_engine.is_idle:
    for output in model_engine.step():
      tokens = reported[output.request]
      tokens.append(output.token)
      assert output.is_last == (len(tokens) == 130)
  assert model_engine.stats().preempted > 0
  for i, request in zip((3, 4), submitted, strict=True):
    assert reported[request] == request.tokens
    assert request.tokens == counting.continued([i] * 60, 130)


def test_generated_tokens_do_not_enter_the_prefix_cache():
  runner = counting.Runner()
  model_engine = engine.Engine(
    runner, num_blocks=20, max_rows=2, batch_invariant=True
  )
  first = model_engine.submit([5] * 100, 100)
  while not first.done:
    model_engine.step()
  later = model_engine.submit([5] * 100 + first.tokens, 1)
  while not later.done:
    model_engine.step()
  assert later.num_cached_tokens == 64
