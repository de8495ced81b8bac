"""Log-probabilities and adjusted tokens against NumPy and the full forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import engine, model_runner, sampling, scheduler
from dsv3_jax.inference import request as requests
from tests import nightly, settings
from tests.inference import sampling_arrays
from tests.nn import models

RNG = np.random.default_rng(5)


def log_softmax(logits_V):
  """In float64."""
  logits_V = np.asarray(logits_V, np.float64)
  shifted_V = logits_V - logits_V.max()
  return shifted_V - np.log(np.exp(shifted_V).sum())


@pytest.mark.parametrize('vocab', [7, 100])
def test_logprobs_are_those_of_float64(vocab):
  logits_BV = RNG.normal(0.0, 4.0, (3, vocab)).astype(np.float32)
  token_B = np.array([2, 0, 6])
  run = jax.jit(sampling.logprobs)
  got = run(logits_BV, token_B, np.array(True))
  count = min(vocab, sampling.TOP_LOGPROBS)
  assert got.top_ids_BK.shape == (3, count)
  for b in range(3):
    want_V = log_softmax(logits_BV[b])
    ids_K = np.argsort(-want_V, kind='stable')[:count]
    np.testing.assert_array_equal(got.top_ids_BK[b], ids_K)
    np.testing.assert_allclose(got.top_BK[b], want_V[ids_K], atol=2e-6)
    assert float(got.chosen_B[b]) == pytest.approx(want_V[token_B[b]], abs=2e-6)
    assert got.rank_B[b] == 1 + np.sum(want_V > want_V[token_B[b]])
  nothing = run(logits_BV, token_B, np.array(False))
  assert not any(np.any(x) for x in nothing)


@pytest.mark.parametrize('min_p', [0.0, 0.2, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough(min_p):
  """Relative to the likeliest, after the temperature, before top-k."""
  probs_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
  rows, keys = 4000, jax.random.split(jax.random.key(1), 4000)
  full = lambda x: jnp.full(rows, x)
  make = lambda top_k: sampling_arrays.make(
    jax.random.key_data(keys), full(0.5), full(top_k), full(1.0), min_p
  )
  logits_BV = jnp.log(jnp.broadcast_to(jnp.float32(probs_V), (rows, 5)))
  draw = jax.jit(sampling.sample)
  ids_B = np.asarray(draw(logits_BV, make(0), full(0)))
  sharper_V = probs_V**2
  kept_V = sharper_V >= min_p * sharper_V.max()
  assert set(ids_B) == set(np.flatnonzero(kept_V))
  counts_V = np.bincount(ids_B, minlength=5)
  want_V = np.where(kept_V, sharper_V, 0.0)
  want_V *= rows / want_V.sum()
  np.testing.assert_allclose(counts_V, want_V, atol=5 * np.sqrt(rows) / 2)
  top_two = np.asarray(draw(logits_BV, make(2), full(0)))
  assert set(top_two) == set(np.flatnonzero(kept_V)[:2])


@pytest.fixture(
  scope='module',
  params=nightly.daily([0, 2], '0'),
  ids=['plain', 'speculative'],
)
def runner(request):
  cfg = settings.small(model__num_layers=2, model__max_seq_len=600)
  params, router_biases = map(models.f32, models.random_params(cfg))
  return model_runner.ModelRunner(cfg, params, router_biases, request.param)


@pytest.fixture(scope='module')
def log_probs_of(logits_of):
  """Log-probabilities at all positions of a row, in float64."""
  return lambda tokens: np.array([log_softmax(x) for x in logits_of(tokens)])


@pytest.fixture(scope='module')
def logits_of(runner):
  """Logits at all positions of a row, from the training forward."""
  forward = jax.jit(models.model.build(runner.cfg).apply)
  variables = {'params': runner.params}

  def of(tokens):
    # What follows in the row changes nothing before it.
    tokens_BT = jnp.asarray([tokens + [0] * (192 - len(tokens))], jnp.int32)
    ones_BT, at_BT = jnp.ones_like(tokens_BT), jnp.arange(192)[None]
    batch = models.model.Batch(
      tokens_BT, tokens_BT, at_BT, ones_BT, ones_BT.astype(jnp.float32)
    )
    logits_BTV, _ = forward(variables, batch, runner.router_biases)
    return np.asarray(logits_BTV[0, : len(tokens)])

  return of


def make_engine(runner, num_blocks=40):
  # One size of a step and of block tables: fewer programs to compile.
  options = {'max_rows': 4, 'min_rows': 4, 'min_blocks': 4, 'chunk': 64}
  return engine.Engine(runner, num_blocks=num_blocks, **options)


def run(runner, *submitted):
  """Requests after all of their tokens; None waits for those before."""
  model_engine = make_engine(runner)
  all_of_them = []
  for args in submitted:
    if args is None:
      while not model_engine.is_idle:
        model_engine.step()
    else:
      all_of_them.append(model_engine.submit(*args))
  while not model_engine.is_idle:
    model_engine.step()
  return all_of_them


def assert_logprobs(got, want_V, token, count):
  assert got.logprob == pytest.approx(want_V[token], abs=2e-4)
  likelier = [np.sum(want_V > want_V[token] + x) for x in (2e-4, -2e-4)]
  assert likelier[0] < got.rank <= 1 + likelier[1]
  assert len(got.top) == count
  values = [value for _, value in got.top]
  np.testing.assert_allclose(values, np.sort(want_V)[::-1][:count], atol=2e-4)
  for v, value in got.top:
    assert value == pytest.approx(want_V[v], abs=2e-4)


def test_those_of_a_request_are_those_of_the_whole_forward(
  runner, log_probs_of, monkeypatch
):
  """Prompts longer than a scored chunk, beside others, and penalised draws."""
  monkeypatch.setattr(scheduler, 'SCORED_CHUNK', 64)
  vocab = runner.cfg.model.vocab_size
  prompt = RNG.integers(0, vocab, 150).tolist()
  params = requests.SamplingParams(
    temperature=1.0, seed=3, logprobs=4, prompt_logprobs=True
  )
  penal = requests.SamplingParams(
    temperature=0.7, seed=2, logprobs=0, presence_penalty=1.0
  )
  first, other, scored, penalised = run(
    runner,
    (prompt, 8),  # fills the prefix cache, which scoring must not use
    None,
    (prompt, 8),
    (prompt, 20, params),
    (prompt[:20], 20, penal),
  )
  assert not first.logprobs and not first.prompt_logprobs
  assert other.num_cached_tokens > 0 and scored.num_cached_tokens == 0
  want_TV = log_probs_of(scored.all_tokens)
  assert scored.prompt_logprobs[0] is None
  for t in range(1, 150):
    got = scored.prompt_logprobs[t]
    assert_logprobs(got, want_TV[t - 1], prompt[t], 4)
  for t, token in enumerate(scored.tokens):
    assert_logprobs(scored.logprobs[t], want_TV[149 + t], token, 4)
  want_TV = log_probs_of(penalised.all_tokens)
  for t, token in enumerate(penalised.tokens):
    assert_logprobs(penalised.logprobs[t], want_TV[19 + t], token, 0)


def greedy(log_probs_of, prompt, count, adjust):
  """Greedy tokens after `adjust(log_V, prompt, tokens)`, in float64."""
  tokens = []
  for _ in range(count):
    log_V = log_probs_of(prompt + tokens)[-1]
    tokens.append(int(np.argmax(adjust(log_V.copy(), prompt, tokens))))
  return tokens


@pytest.mark.parametrize(
  ('changes', 'adjust'),
  [
    (
      {'presence_penalty': 1.5, 'frequency_penalty': 0.4},
      lambda x_V, prompt, tokens: [
        x - 1.5 * (v in tokens) - 0.4 * tokens.count(v)
        for v, x in enumerate(x_V)
      ],
    ),
    (
      {'logit_bias': ((3, 2.5), (5, -100.0), (3, 1.0))},
      lambda x_V, prompt, tokens: [
        x + {3: 3.5, 5: -100.0}.get(v, 0.0) for v, x in enumerate(x_V)
      ],
    ),
  ],
  ids=['penalties', 'bias'],
)
def test_greedy_tokens_follow_the_adjusted_logits(
  runner, log_probs_of, changes, adjust
):
  prompt = RNG.integers(0, runner.cfg.model.vocab_size, 12).tolist()
  params = requests.SamplingParams(**changes)
  plain, got = run(runner, (prompt, 12), (prompt, 12, params))
  assert got.tokens == greedy(log_probs_of, prompt, 12, adjust)
  assert plain.tokens == greedy(log_probs_of, prompt, 12, lambda x, *_: x)
  assert plain.tokens != got.tokens


def test_the_repetition_penalty_counts_the_prompt(runner, logits_of):
  """Its formula is on logits, not log-probabilities."""
  prompt = np.random.default_rng(8).integers(0, 23, 12).tolist()
  params = requests.SamplingParams(repetition_penalty=1.7)
  got, plain = run(runner, (prompt, 12, params), (prompt, 12))
  want = []
  for _ in range(12):
    logits_V = logits_of(prompt + want)[-1].astype(np.float64)
    for v in {*prompt, *want}:
      logits_V[v] *= 1.7 ** -np.sign(logits_V[v])
    want.append(int(np.argmax(logits_V)))
  assert got.tokens == want != plain.tokens


def test_a_preempted_request_counts_its_tokens_anew(runner):
  prompt = RNG.integers(0, runner.cfg.model.vocab_size, 100).tolist()
  params = requests.SamplingParams(
    frequency_penalty=0.5, temperature=1.0, seed=1, logprobs=1
  )
  (alone,) = run(runner, (prompt, 60, params))
  model_engine = make_engine(runner, num_blocks=4)
  other = model_engine.submit(prompt[:70], 90)
  again = model_engine.submit(prompt, 60, params)
  while not model_engine.is_idle:
    model_engine.step()
  assert model_engine.stats().preempted > 0 and other.done
  assert again.tokens == alone.tokens
  np.testing.assert_allclose(
    [x.logprob for x in again.logprobs],
    [x.logprob for x in alone.logprobs],
    atol=1e-4,
  )
