"""Speculative tokens change how many a step gives, never which."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax import errors
from dsv3_jax.inference import engine, forward, generate, model_runner
from dsv3_jax.inference import request as requests
from dsv3_jax.nn import model
from tests import settings
from tests.inference import counting, sampling_arrays
from tests.nn import models

ROOM = 200
HIDDEN = ('post_norm', 'pre_norm')


def small(**changes):
  return settings.small(
    precision='f32',
    model__max_seq_len=ROOM,
    model__rope__original_seq_len=ROOM,
    model__num_layers=2,
    **changes,
  )


CONFIG = small()


def weights(cfg):
  return tuple(map(models.f32, models.random_params(cfg)))


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


@pytest.mark.parametrize('num_speculative_tokens', [1, 2, 3])
@pytest.mark.parametrize('num_blocks', [8, 40])
def test_counted_traffic_gets_the_same_tokens(
  num_speculative_tokens, num_blocks
):
  """Tokens are rejected, blocks run out, clients go away, requests stop."""
  rng = np.random.default_rng(num_speculative_tokens)
  runner = counting.Runner(num_speculative_tokens=num_speculative_tokens)
  model_engine = engine.Engine(
    runner, num_blocks=num_blocks, max_rows=5, chunk=64
  )
  wanted, gone = [], []
  for number in range(60):
    tokens = rng.integers(0, 23, rng.integers(1, 150)).tolist()
    count = int(rng.integers(1, 90))
    want = counting.continued(tokens, count)
    stop = want[-1] if number % 3 == 0 else -1
    want = want[: want.index(stop) + 1] if stop >= 0 else want
    wanted.append((model_engine.submit(tokens, count, stop_ids=[stop]), want))
    for _ in range(rng.integers(0, 9)):
      model_engine.step()
    if number % 7 == 0:
      gone.append(wanted.pop(rng.integers(len(wanted)))[0])
      model_engine.cancel(gone[-1])
  while not model_engine.is_idle:
    model_engine.step()
  assert all(request.tokens == want for request, want in wanted)
  assert model_engine.stats().blocks_in_use == 0
  assert (model_engine.stats().preempted > 0) == (num_blocks == 8)
  counts_seen = model_engine.stats()
  assert 0.3 < counts_seen.acceptance < 0.8
  assert 1.3 < counts_seen.tokens_per_step <= 1 + num_speculative_tokens


def test_speculative_tokens_save_steps():
  calls = []
  for num_speculative_tokens in (0, 1, 2):
    runner = counting.Runner(num_speculative_tokens=num_speculative_tokens)
    model_engine = engine.Engine(runner, num_blocks=8, max_rows=1)
    model_engine.submit([3, 1, 4], 200)
    while not model_engine.is_idle:
      model_engine.step()
    assert runner.calls == 1 + model_engine.stats().decoded_rows
    assert model_engine.stats().decoded_tokens == 199
    calls.append(runner.calls)
  assert calls[0] == 200
  assert calls[1] < 0.75 * calls[0] and calls[2] < 0.85 * calls[1]


@pytest.mark.parametrize(
  ('num_speculative_tokens', 'hidden'),
  [(1, 'post_norm'), pytest.param(3, 'pre_norm', marks=pytest.mark.nightly)],
)
def test_tokens_are_those_of_plain_decoding(num_speculative_tokens, hidden):
  cfg = small(model__mtp__hidden=hidden)
  params, router_biases = weights(cfg)
  plain = model_runner.ModelRunner(cfg, params, router_biases)
  drafting = model_runner.ModelRunner(
    cfg, params, router_biases, num_speculative_tokens
  )
  prompts = [prompt(1, 5), prompt(2, 130), prompt(3, 1), prompt(4, 64)]
  for options in ({}, {'temperature': 1.0, 'top_p': 0.9, 'seed': 3}):
    want = generate.generate(plain, prompts, 40, **options)
    output = generate.generate(drafting, prompts, 40, **options)
    assert output.tokens == want.tokens
    assert want.stats.tokens_per_step == 1
    assert output.stats.tokens_per_step > 1


@pytest.mark.nightly
def test_right_speculative_tokens_are_all_accepted():
  # Where all tokens are as likely, only the noise decides, which is the same.
  params, router_biases = weights(CONFIG)
  flat = params | {'head': {'w': jnp.zeros_like(params['head']['w'])}}
  drafting = model_runner.ModelRunner(CONFIG, flat, router_biases, 3)
  options = {'temperature': 1.0, 'seed': 2}
  output = generate.generate(drafting, [[1, 2], [3]], 41, **options)
  assert output.stats.acceptance == 1.0
  assert output.stats.tokens_per_step == 4.0
  runner = model_runner.ModelRunner(CONFIG, flat, router_biases)
  plain = generate.generate(runner, [[1, 2], [3]], 41, **options)
  assert output.tokens == plain.tokens
  assert len(set(output.tokens[0])) > 5


@pytest.mark.parametrize(
  'hidden', [pytest.param(HIDDEN[0], marks=pytest.mark.nightly), HIDDEN[1]]
)
def test_first_speculative_tokens_are_the_mtp_module_s_choice(hidden):
  """However the latents came there: chunks, prefix cache, verified tokens."""
  cfg = small(model__mtp__hidden=hidden)
  params, router_biases = weights(cfg)
  runner = model_runner.ModelRunner(cfg, params, router_biases, 2)
  sizes = {'num_blocks': 20, 'max_rows': 3, 'chunk': 64, 'min_blocks': 4}
  model_engine = engine.Engine(runner, **sizes)
  seen = []
  for tokens in (prompt(5, 150), prompt(6, 3), prompt(5, 150)[:140] + [1, 2]):
    request = model_engine.submit(tokens, 20)
    while not request.done:
      model_engine.step()
      seen.append((list(request.all_tokens), list(request.speculative_tokens)))
  assert request.num_cached_tokens == 128
  drafted = [(tokens, tail[0]) for tokens, tail in seen if tail]
  assert len(drafted) > 30
  for tokens, draft in drafted[::3]:
    # The block that another's continuation filled ends with a latent of it.
    logits_V = mtp_logits(cfg, params, router_biases, tokens)
    assert logits_V.max() - logits_V[draft] < 1e-4


def mtp_logits(cfg, params, router_biases, tokens):
  """Of the token behind the last, by the full forward pass."""
  padded = jnp.array(tokens + [0] * (ROOM - len(tokens)), jnp.int32)[None]
  ones = jnp.ones_like(padded)
  batch = model.Batch(
    padded[:, :-1],
    padded[:, 1:],
    jnp.arange(ROOM - 1)[None],
    ones[:, 1:],
    ones[:, 1:].astype(jnp.float32),
  )
  _, deeper = models.logits(cfg)(params, router_biases, batch)
  return np.asarray(deeper[0][0, len(tokens) - 2])


@pytest.mark.nightly
def test_drawn_tokens_have_the_model_s_distribution():
  """10^5 rows of three tokens each, two of them behind speculative tokens."""
  vocab, start, rows, rounds = 5, 2, 10_000, 10
  cfg = small(model__vocab_size=vocab)
  params, router_biases = weights(cfg)
  params['head']['w'] *= 0.5  # or some triples would be too rare to count
  runner = model_runner.ModelRunner(cfg, params, router_biases, 1)
  counts, kept = np.zeros(vocab**3), 0
  for seed in range(rounds):
    tokens_B3, kept_B = triples(runner, start, rows, seed)
    counts += np.bincount(tokens_B3 @ [vocab**2, vocab, 1], minlength=vocab**3)
    kept += np.sum(kept_B)
  expected = (
    rows * rounds * triple_probabilities(cfg, params, router_biases, start)
  )
  assert expected.min() > 5
  assert stats.chisquare(counts, expected).pvalue > 1e-3
  assert 0.1 < kept / (rows * rounds) < 0.95  # both kinds were there


def triples(runner, start, rows, seed):
  """Three tokens of each row, and whether its second step gave two."""
  keys_B = jax.random.split(jax.random.key(seed), rows)
  ones_B = np.ones(rows, np.float32)
  draws = sampling_arrays.make(
    *(np.asarray(jax.random.key_data(keys_B)), ones_B),
    *(np.zeros(rows, np.int32), ones_B),
  )
  caches = runner.empty_caches(rows, engine.BLOCK_SIZE)
  table_B1 = np.arange(rows, dtype=np.int32)[:, None]
  zeros_B, none_B = np.zeros((2, rows), np.int32)
  at = lambda x_BT, t_B: np.take_along_axis(x_BT, t_B[:, None], 1)[:, 0]

  def step(last_B, draft_B, place_B, has_draft, caches):
    index_B2 = np.stack([place_B, place_B + 1], axis=1)
    if not has_draft:
      index_B2[:, 1] = -1
    tokens_B2 = np.stack([last_B, draft_B], axis=1)
    arrays = (tokens_B2, index_B2, zeros_B, none_B, table_B1)
    rows = forward.StepInput(*(x.astype(np.int32) for x in arrays))
    output, caches = runner.decode(rows, caches, draws)
    return *map(np.asarray, output), caches

  start_B = np.full(rows, start)
  first_B2, _, draft_B1, caches = step(start_B, zeros_B, zeros_B, False, caches)
  first_B = first_B2[:, 0]
  args = (first_B, draft_B1[:, 0], zeros_B + 1, True, caches)
  second_B2, count_B, draft_B1, caches = step(*args)
  last_B = at(second_B2, count_B - 1)
  args = (last_B, draft_B1[:, 0], count_B + 1, True, caches)
  third_B2, _, _, _ = step(*args)
  third_B = np.where(count_B == 2, second_B2[:, 1], third_B2[:, 0])
  return np.stack([first_B, second_B2[:, 0], third_B], axis=1), count_B == 2


def triple_probabilities(cfg, params, router_biases, start):
  """Of all triples behind one token, by the full forward pass, in float64."""
  vocab = cfg.model.vocab_size
  every = list(itertools.product(range(vocab), repeat=3))
  tokens_BT = jnp.array([[start, *triple] for triple in every], jnp.int32)
  ones_BT = jnp.ones_like(tokens_BT)
  places_BT = jnp.broadcast_to(jnp.arange(4), tokens_BT.shape)
  batch = model.Batch(
    *(tokens_BT, tokens_BT, places_BT, ones_BT), ones_BT.astype(jnp.float32)
  )
  logits_BTV, _ = models.logits(cfg)(params, router_biases, batch)
  logits_BTV = np.asarray(logits_BTV, np.float64)
  logits_BTV -= logits_BTV.max(axis=-1, keepdims=True)
  probs_BTV = np.exp(logits_BTV)
  probs_BTV /= probs_BTV.sum(axis=-1, keepdims=True)
  chosen = np.take_along_axis(probs_BTV[:, :3], np.array(every)[:, :, None], 2)
  return np.prod(chosen[:, :, 0], axis=1)


def test_a_model_without_mtp_cannot_draft():
  cfg = small(model__mtp__depth=0)
  with pytest.raises(errors.InputError, match='needs a model with an MTP mod'):
    model_runner.ModelRunner(cfg, {}, {}, 1)
  with pytest.raises(
    errors.InputError, match='num_speculative_tokens=-1 must be >= 0'
  ):
    model_runner.ModelRunner(CONFIG, {}, {}, -1)


@pytest.mark.nightly
@pytest.mark.parametrize(
  ('num_speculative_tokens', 'size'),
  [(1, 63), (2, 62)],
)
def test_answers_to_one_prompt_have_their_own_speculative_tokens(
  num_speculative_tokens, size
):
  """No other sees those of the first, where they pass the end of a block."""
  params, router_biases = weights(CONFIG)
  flat = params | {'head': {'w': 0.5 * params['head']['w']}}
  tokens, draws = (
    prompt(7, size),
    [requests.SamplingParams(temperature=1.0, rng_stream=i) for i in (0, 1, 2)],
  )
  plain, want = model_runner.ModelRunner(CONFIG, flat, router_biases), []
  for draw in draws:
    model_engine = engine.Engine(plain, num_blocks=8, max_rows=3)
    request = model_engine.submit(tokens, 20, draw)
    while not request.done:
      model_engine.step()
    want.append(request.tokens)
  runner = model_runner.ModelRunner(
    CONFIG, flat, router_biases, num_speculative_tokens
  )
  model_engine = engine.Engine(runner, num_blocks=8, max_rows=3)
  first = model_engine.submit(tokens, 20, draws[0])
  rest = [
    model_engine.submit(tokens, 20, draw, shares_prompt_with=first)
    for draw in draws[1:]
  ]
  while not model_engine.is_idle:
    model_engine.step()
  assert [request.tokens for request in (first, *rest)] == want
  assert (
    model_engine.stats().accepted_tokens > 0
    and model_engine.stats().blocks_in_use == 0
  )
  assert [request.num_cached_tokens for request in rest] == [size - 1] * 2
