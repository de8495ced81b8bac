"""Generation over long prompts, in BF16, at random, and until all have ended.

`test_engine.py` has the plain cases.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax import errors
from dsv3_jax.inference import generate, model_runner
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

VOCAB, ROOM = 23, 160
CONFIG = settings.small(  # scanned, as by default
  model__max_seq_len=ROOM,
  model__rope__original_seq_len=ROOM,
  model__num_layers=2,
)


@pytest.fixture(scope='module')
def weights():
  """Random ones, with heads so sharp and loud that what is seen decides."""
  params, router_biases = models.random_params(CONFIG)
  for stack in ('dense_layers', 'moe_layers'):
    attention = params[stack]['layers']['attention']
    attention['w_uk'] *= 4.0
    attention['w_o'] *= 20.0
  return models.f32(params), models.f32(router_biases)


@pytest.fixture(scope='module')
def net(weights):
  return model_runner.ModelRunner(CONFIG, *weights)


def full_logits(cfg, params, router_biases, rows):
  """Logits of rows of any lengths, without a cache: [rows, T, V]."""
  length = max(map(len, rows))
  padded = [row + [0] * (length - len(row)) for row in rows]
  tokens_BT = jnp.array(padded, jnp.int32)
  ones_BT = jnp.ones_like(tokens_BT)
  positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
  batch = model.Batch(
    tokens_BT, tokens_BT, positions_BT, ones_BT, ones_BT.astype(jnp.float32)
  )
  return models.logits(cfg)(params, router_biases, batch)[0]


@pytest.mark.parametrize(
  'sizes',
  [
    (63, 64, 65, 128),
    *(
      pytest.param(sizes, marks=pytest.mark.nightly)
      for sizes in [(1, 63, 64), (65, 2, 128, 100)]
    ),
  ],
)
@pytest.mark.nightly
def test_greedy_across_the_borders_of_padding(net, weights, sizes):
  # 64 is what prompts and caches are padded to multiples of.
  rng = np.random.default_rng(sizes[0])
  prompts = [rng.integers(0, VOCAB, size).tolist() for size in sizes]
  output = generate.generate(net, prompts, 20).tokens
  rows = [p + new for p, new in zip(prompts, output, strict=True)]
  best_BT = np.argmax(full_logits(CONFIG, *weights, rows), axis=-1)
  for best_T, prompt, new in zip(best_BT, prompts, output, strict=True):
    start = len(prompt) - 1
    assert new == best_T[start : start + 20].tolist()
  assert generate.generate(net, prompts[1:2], 20).tokens == output[1:2]


def test_the_last_place_of_the_sequence_can_be_filled(net):
  prompt = [5] * (ROOM - 20)
  assert len(generate.generate(net, [prompt], 20).tokens[0]) == 20
  with pytest.raises(errors.InputError, match=f'has {ROOM - 19} .*most 140'):
    generate.generate(net, [[5], prompt + [5]], 20)


def test_ends_with_the_last_row(net):
  prompts, options = [[3, 1, 4], [7]], {'temperature': 3.0, 'seed': 1}
  free = generate.generate(net, prompts, 30, **options).tokens
  ends = {t: [row.index(t) for row in free if t in row] for t in range(VOCAB)}
  stop = min((t for t in ends if len(ends[t]) == 2), key=lambda t: max(ends[t]))
  output = generate.generate(net, prompts, 30, stop_id=stop, **options)
  assert output.tokens == [row[: row.index(stop) + 1] for row in free]
  assert output.decoded == sum(ends[stop]) - 2
  assert ends[stop][0] != ends[stop][1]


def test_ends_at_once_if_prefill_stops(net):
  [[first]] = generate.generate(net, [[3, 1, 4]], 1).tokens
  output = generate.generate(net, [[3, 1, 4]], 30, stop_id=first)
  assert (output.tokens, output.decoded) == ([[first]], 0)
  assert output.tokens_per_second == 0.0 and output.prefill_seconds > 0.0


@pytest.mark.nightly
def test_casting_once_is_casting_at_every_use():
  # Products take BF16; norms and the router's choice are f32 as in training.
  cfg = settings.small(precision='bf16', model__num_layers=2)
  params, router_biases = map(models.f32, models.random_params(cfg))
  cast = model_runner.ModelRunner(cfg, params, router_biases).params
  assert cast['head']['w'].dtype == jnp.bfloat16
  rows = np.random.default_rng(0).integers(0, VOCAB, (4, 12)).tolist()
  want_BTV = full_logits(cfg, params, router_biases, rows)
  np.testing.assert_array_equal(
    full_logits(cfg, cast, router_biases, rows), want_BTV
  )


def test_first_tokens_follow_the_distribution(net, weights):
  count, prompt, temperature = 1000, [3, 1, 4, 1, 5], 3.0
  options = {'temperature': temperature, 'seed': 11}
  output = generate.generate(net, [prompt] * count, 1, **options).tokens
  counts_V = np.bincount([new for [new] in output], minlength=VOCAB)
  logits_V = np.float64(full_logits(CONFIG, *weights, [prompt])[0, -1])
  probs_V = np.exp((logits_V - logits_V.max()) / temperature)
  probs_V /= probs_V.sum()
  assert count * probs_V.min() > 4  # or the test would not hold
  assert stats.chisquare(counts_V, count * probs_V).pvalue > 1e-3


@pytest.mark.nightly
def test_draws_of_rows_and_of_steps_are_independent(weights):
  # Where all tokens are as likely, so are all pairs: of neighbours in a row,
  # and of two rows at one place.
  params, router_biases = weights
  flat = params | {'head': {'w': jnp.zeros_like(params['head']['w'])}}
  rows, steps = 400, 31
  uniform = model_runner.ModelRunner(CONFIG, flat, router_biases)
  output = generate.generate(
    uniform, [[1]] * rows, steps, temperature=1.0, seed=3
  )
  ids = np.array(output.tokens)
  for first, second in ((ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:])):
    pairs = np.bincount(np.ravel(first * VOCAB + second), minlength=VOCAB**2)
    assert stats.chisquare(pairs).pvalue > 1e-3
  assert len(np.unique(ids, axis=0)) == rows


def test_a_seed_is_the_row_s_alone_at_any_length(net):
  # Neither padding nor how many tokens are asked for changes a draw.
  options = {'temperature': 2.0, 'seed': 5}
  short = generate.generate(net, [[3, 1, 4]], 8, **options).tokens[0]
  beside = generate.generate(net, [[3, 1, 4], [2] * 90], 30, **options).tokens[
    0
  ]
  assert short == beside[:8]
  other = generate.generate(
    net, [[3, 1, 4]], 8, **(options | {'seed': 6})
  ).tokens[0]
  assert other != short


def test_parameters_are_not_consumed(net, weights):
  # Caches are donated; weights must survive any number of calls.
  first, second = (generate.generate(net, [[3]], 4).tokens for _ in range(2))
  assert first == second
  assert not any(x.is_deleted() for x in jax.tree.leaves(weights))
