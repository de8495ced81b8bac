"""Requests that share steps get the tokens that each would get alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import block_pool, engine, generate, model_runner
from dsv3_jax.inference import request as requests
from tests import settings
from tests.inference import counting
from tests.nn import models

ROOM = 400
CONFIG = settings.small(
  precision='f32',
  model__max_seq_len=ROOM,
  model__rope__original_seq_len=ROOM,
  model__num_layers=2,
)


@pytest.fixture(scope='module')
def runner():
  params, router_biases = map(models.f32, models.random_params(CONFIG))
  for stack in ('dense_layers', 'moe_layers'):  # what is seen decides
    attention = params[stack]['layers']['attention']
    attention['w_uk'] *= 4.0
    attention['w_o'] *= 20.0
  return model_runner.ModelRunner(CONFIG, params, router_biases)


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


def run(model_engine):
  turns = 0
  while not model_engine.is_idle:
    model_engine.step()
    turns += 1
    assert turns < 1000
  return turns


def make_engine(runner, **options):
  # One size of the cache, as each is compiled: too few blocks for all.
  return engine.Engine(
    runner, **({'num_blocks': 7, 'max_rows': 4, 'min_blocks': 8} | options)
  )


def alone(runner, tokens, count, draw):
  model_engine = make_engine(runner)
  request = model_engine.submit(tokens, count, draw)
  run(model_engine)
  return request.tokens


CASES = [
  (prompt(1, 5), 20, requests.GREEDY),
  (prompt(2, 130), 9, requests.SamplingParams(temperature=1.5, seed=3)),
  (prompt(3, 1), 30, requests.SamplingParams(temperature=1.0, top_k=3)),
  (
    prompt(4, 64),
    5,
    requests.SamplingParams(temperature=2.0, top_p=0.8, seed=9),
  ),
  (prompt(5, 200), 3, requests.GREEDY),
]


@pytest.fixture(scope='module')
def expected(runner):
  return [alone(runner, *case) for case in CASES]


def test_requests_with_one_prompt_compute_it_once(runner, expected):
  """Each with its own draws, as if it were alone."""
  model_engine = make_engine(runner, chunk=64)
  tokens, count, _ = CASES[1]
  draws = [
    requests.GREEDY,
    CASES[1][2],
    requests.SamplingParams(temperature=1.0),
  ]
  first = model_engine.submit(tokens, count, draws[0])
  others = [
    model_engine.submit(tokens, count, draw, shares_prompt_with=first)
    for draw in draws[1:]
  ]
  run(model_engine)
  assert [r.num_cached_tokens for r in others] == [len(tokens) - 1] * 2
  assert first.tokens == alone(runner, tokens, count, draws[0])
  assert others[0].tokens == expected[1]


@pytest.mark.parametrize(
  ('chunk', 'num_blocks'),
  [
    (128, 7),
    pytest.param(64, 30, marks=pytest.mark.nightly),
    pytest.param(1024, 30, marks=pytest.mark.nightly),
  ],
)
def test_whoever_shares_the_steps(runner, expected, chunk, num_blocks):
  """They come at different times, to fewer rows than they are."""
  options = {'chunk': chunk, 'num_blocks': num_blocks}
  model_engine = make_engine(runner, max_rows=3, **options)
  submitted = []
  for case in CASES:
    submitted.append(model_engine.submit(*case))
    model_engine.step()
  run(model_engine)
  assert [r.tokens for r in submitted] == expected
  assert all(r.done for r in submitted)
  assert model_engine.stats().blocks_in_use == 0


def test_too_few_blocks_only_take_more_steps(runner, expected):
  model_engine = make_engine(runner)
  submitted = [model_engine.submit(*case) for case in CASES]
  grows = model_engine.submit(prompt(6, 62), 80)
  run(model_engine)
  assert [r.tokens for r in submitted] == expected
  assert grows.tokens == alone(runner, prompt(6, 62), 80, requests.GREEDY)
  assert model_engine.stats().blocks_in_use == 0


def test_the_youngest_is_computed_anew_with_the_same_draws(runner):
  draw = requests.SamplingParams(temperature=1.0, seed=4)
  sizes = {7: (50, 100), 8: (60, 90), 9: (40, 110)}
  cases = [(prompt(s, size), n, draw) for s, (size, n) in sizes.items()]
  model_engine = make_engine(runner)
  submitted = [model_engine.submit(*case) for case in cases]
  run(model_engine)
  assert model_engine.stats().preempted >= 1
  for request, case in zip(submitted, cases, strict=True):
    assert request.tokens == alone(runner, *case)


def test_a_known_prompt_is_read_from_the_cache(runner):
  model_engine = make_engine(runner)
  first = model_engine.submit(prompt(9, 200), 4)
  run(model_engine)
  again = model_engine.submit(prompt(9, 200), 4)
  other = model_engine.submit([*prompt(9, 200)[:150], 1, 2, 3], 4)
  turns = run(model_engine)
  assert (
    first.num_cached_tokens,
    again.num_cached_tokens,
    other.num_cached_tokens,
  ) == (0, 192, 128)
  assert again.tokens == first.tokens
  want = alone(runner, [*prompt(9, 200)[:150], 1, 2, 3], 4, requests.GREEDY)
  assert other.tokens == want
  assert turns == 3


def test_a_request_that_is_cancelled_leaves_nothing(runner, expected):
  model_engine = make_engine(runner)
  waits = [model_engine.submit(*case) for case in CASES]
  model_engine.step()
  model_engine.step()
  for request in waits[1:]:
    model_engine.cancel(request)
    model_engine.cancel(request)
  run(model_engine)
  assert waits[0].tokens == expected[0]
  assert model_engine.stats().blocks_in_use == 0 and model_engine.is_idle


def test_a_stop_token_ends_a_request(runner, expected):
  model_engine = make_engine(runner)
  tokens, count, draw = CASES[0]
  stop = expected[0][7]
  request = model_engine.submit(tokens, count, draw, [stop, 10**6])
  run(model_engine)
  end = expected[0].index(stop) + 1
  assert request.tokens == expected[0][:end]


def test_traffic_compiles_nothing_anew(runner):
  """Sizes are rounded up: then any traffic has been seen."""

  def traffic(seed):
    rng = np.random.default_rng(seed)
    model_engine = make_engine(runner, chunk=128)
    for _ in range(12):
      model_engine.submit(prompt(rng.integers(1e6), rng.integers(1, 300)), 20)
      model_engine.step()
    run(model_engine)

  counts = lambda: [
    f._cache_size()
    for f in (runner._prefill, runner._extend, runner._decode, runner._copy)
  ]
  for seed in range(4):
    traffic(seed)
  known = counts()
  for seed in range(4, 8):
    traffic(seed)
  assert counts() == known


@pytest.mark.parametrize('size', [1023, 1024, 1025, 2049])
def test_a_prompt_of_any_length_is_generated_from(size):
  """At the borders of a chunk too, where one token is left."""
  runner = counting.Runner(room=2100)
  prompts = [[size % 23] * size, [3, 1, 4]]
  want = [counting.continued(prompt, 4) for prompt in prompts]
  assert generate.generate(runner, prompts, 4).tokens == want


def test_idle_rows_do_not_matter(runner):
  """Three of four rows work; the fourth has no tokens and no blocks."""
  model_engine = make_engine(runner)
  submitted = [model_engine.submit(prompt(s, 10), 5) for s in (20, 21, 22)]
  run(model_engine)
  for s, request in zip((20, 21, 22), submitted, strict=True):
    assert request.tokens == alone(runner, prompt(s, 10), 5, requests.GREEDY)


@pytest.mark.parametrize(
  ('tokens', 'count', 'message'),
  [
    ([], 1, 'the prompt is empty'),
    ([1], 0, 'max_new_tokens=0 must be >= 1'),
    ([1] * 399, 2, 'at most 398 fit'),
    ([1, 10**6], 2, 'ids outside'),
    ([1] * 200, 60, 'needs 260 places in the cache, which has 256'),
  ],
)
def test_bad_requests_change_nothing(runner, tokens, count, message):
  model_engine = make_engine(runner, num_blocks=4)
  with pytest.raises(errors.InputError, match=message):
    model_engine.submit(tokens, count)
  assert model_engine.is_idle and model_engine.stats().waiting == 0


def test_whole_blocks_are_copied(runner):
  caches = runner.empty_caches(4, engine.BLOCK_SIZE)
  fill = lambda x: x + jnp.arange(4.0)[:, None, None]
  caches = runner.copy_blocks(
    [block_pool.BlockCopy(3, 0), block_pool.BlockCopy(0, 1)],
    jax.tree.map(fill, caches),
  )
  for leaf in jax.tree.leaves(caches):
    assert np.all(np.asarray(leaf) == np.array([3, 3, 2, 3])[:, None, None])
