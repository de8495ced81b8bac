"""In an invariant session nothing that others do changes a bit of a request."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.inference import engine, model_runner
from dsv3_jax.inference import request as requests
from tests import settings
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


@pytest.fixture(scope='module', params=[0, 1], ids=['plain', 'drafts'])
def runner(request):
  params, router = map(models.f32, models.random_params(CONFIG))
  return model_runner.ModelRunner(CONFIG, params, router, request.param)


def session(runner, num_blocks=24):
  options = {'num_blocks': num_blocks, 'max_rows': 4, 'chunk': 128}
  return engine.Engine(runner, **options, batch_invariant=True)


def watched(session, request):
  """Runs until a request ends; its latents in the two main stacks."""
  while not request.done:
    pages, length = (
      list(request.block_table.blocks if request.block_table else []),
      None,
    )
    if request.block_table:
      length = request.block_table.length
      caches = session._caches[:2]
      rows = [
        np.asarray(x)[:, pages].reshape(x.shape[0], -1, x.shape[-1])[:, :length]
        for cache in caches
        for x in cache
      ]
    session.step()
  return Kept(request.tokens, rows)


def assert_same_bits(got, want):
  assert got.tokens == want.tokens
  for x, y in zip(got.latents, want.latents, strict=True):
    length = min(x.shape[1], y.shape[1])
    assert length > 150
    np.testing.assert_array_equal(x[:, :length], y[:, :length])


@pytest.fixture(scope='module')
def alone(runner):
  mine = session(runner)
  return watched(mine, mine.submit(*MINE))


def test_others_beside_it(runner, alone):
  mine = session(runner)
  for seed, size in ((1, 5), (2, 130), (3, 64)):
    mine.submit(
      prompt(seed, size), 40, requests.SamplingParams(temperature=1.0)
    )
    mine.step()
  assert_same_bits(watched(mine, mine.submit(*MINE)), alone)


def test_a_beginning_that_others_left_in_the_cache(runner, alone):
  mine = session(runner)
  first = mine.submit(MINE[0][:80], 30)
  while not first.done:
    mine.step()
  request = mine.submit(*MINE)
  assert_same_bits(watched(mine, request), alone)
  assert request.num_cached_tokens == 64


def test_giving_way_to_an_older_one(runner, alone):
  mine = session(runner, num_blocks=4)
  mine.submit(prompt(5, 60), 130)
  request = mine.submit(*MINE)
  assert_same_bits(watched(mine, request), alone)
  assert mine.stats().preempted > 0


def test_any_traffic_has_the_same_sizes(runner, alone):
  counts = lambda: [
    f._cache_size() for f in (runner._prefill, runner._extend, runner._decode)
  ]
  known, mine = counts(), session(runner)
  for seed, size in ((1, 5), (2, 130), (3, 64), (4, 1), (5, 198)):
    mine.submit(
      prompt(seed, size), 1 + seed % 2, requests.SamplingParams(seed=seed)
    )
    mine.step()
  while not mine.is_idle:
    mine.step()
  assert counts() == known and known[0] == 0


def test_tokens_are_told_once_though_they_are_made_twice():
  runner = counting.Runner(num_speculative_tokens=1)
  mine = engine.Engine(runner, num_blocks=4, max_rows=2, batch_invariant=True)
  submitted = [mine.submit([i] * 60, 130) for i in (3, 4)]
  reported = {request: [] for request in submitted}
  while not mine.is_idle:
    for output in mine.step():
      tokens = reported[output.request]
      tokens.append(output.token)
      assert output.is_last == (len(tokens) == 130)
  assert mine.stats().preempted > 0
  for i, request in zip((3, 4), submitted, strict=True):
    assert reported[request] == request.tokens
    assert request.tokens == counting.continued([i] * 60, 130)


def test_what_was_generated_is_not_found_by_others():
  runner = counting.Runner()
  mine = engine.Engine(runner, num_blocks=20, max_rows=2, batch_invariant=True)
  first = mine.submit([5] * 100, 100)
  while not first.done:
    mine.step()
  later = mine.submit([5] * 100 + first.tokens, 1)
  while not later.done:
    mine.step()
  assert later.num_cached_tokens == 64
