"""Cached generation against the full forward pass, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import engine, generate, model_runner
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

_PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7]]
_CONFIG = settings.small(
  precision='f32',
  model__max_seq_len=40,  # YaRN is on
  model__scan_layers=False,
)


@pytest.fixture(scope='module')
def weights():
  as_f32 = lambda tree: jax.tree.map(jnp.float32, tree)
  return tuple(map(as_f32, models.random_params(_CONFIG)))


@pytest.fixture(scope='module')
def net(weights):
  return model_runner.ModelRunner(_CONFIG, *weights)


def next_tokens(weights, sequence):
  """Greedy choice after each position, without any cache."""
  tokens = jnp.asarray(sequence, jnp.int32)[None]
  ones = jnp.ones(tokens.shape, jnp.int32)
  places = jnp.arange(tokens.shape[1])[None]
  batch = model.Batch(tokens, tokens, places, ones, ones.astype(jnp.float32))
  logits, _ = models.logits(_CONFIG)(*weights, batch)
  return np.asarray(jnp.argmax(logits[0], -1))


def test_greedy_is_the_full_forwards_argmax(net, weights):
  output = generate.generate(net, _PROMPTS, 20)
  for prompt, row in zip(_PROMPTS, output.tokens, strict=True):
    assert len(row) == 20
    want = next_tokens(weights, prompt + row)
    assert row == want[len(prompt) - 1 : -1].tolist()
  assert len({tuple(row) for row in output.tokens}) == len(_PROMPTS)


@pytest.mark.nightly
@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(net, temperature):
  options = {'temperature': temperature, 'top_p': 0.9, 'seed': 5}
  batched = generate.generate(net, _PROMPTS, 12, **options).tokens
  first = generate.generate(net, _PROMPTS[:1], 12, **options).tokens
  swapped = generate.generate(
    net, [_PROMPTS[0], [8, 8, 8, 8]], 12, **options
  ).tokens
  assert batched[0] == first[0] == swapped[0]


def test_more_prompts_than_rows_join_as_others_end(net, monkeypatch):
  prompts = [*_PROMPTS, _PROMPTS[1][:2]]
  batched = generate.generate(net, prompts, 9)
  monkeypatch.setattr(generate, 'MAX_ROWS', 2)
  output = generate.generate(net, prompts, 9)
  assert output.tokens == batched.tokens
  assert (
    output.stats.decoded_rows == batched.stats.decoded_rows == len(prompts) * 8
  )
  assert (
    output.stats.decode_steps
    >= len(prompts) * 8 / 2
    > batched.stats.decode_steps
  )


def test_who_waits_hears_of_each_as_it_ends_in_order(net, monkeypatch):
  options = {'temperature': 2.0, 'seed': 3}
  first, second, third = generate.generate(net, _PROMPTS, 12, **options).tokens
  # The second ends by itself, before the first.
  stop_id = next(t for t in second[3:9] if t not in first + third)
  monkeypatch.setattr(generate, 'MAX_ROWS', 2)
  heard, running = [], []
  step = engine.Engine.step

  def watched(model_engine):
    running.append(len(heard))
    return step(model_engine)

  monkeypatch.setattr(engine.Engine, 'step', watched)
  output = generate.generate(
    net,
    _PROMPTS,
    12,
    stop_id=stop_id,
    on_finished=lambda *args: heard.append(args),
    **options,
  )
  assert heard == list(enumerate(output.tokens))
  assert len(output.tokens[1]) < 12 == len(output.tokens[0])
  assert 2 in running  # the third was still on its way


def test_seeds_repeat_and_differ(net):
  options = {'temperature': 2.0}
  runs = [
    generate.generate(net, _PROMPTS, 12, seed=s, **options).tokens
    for s in (1, 1, 2)
  ]
  assert runs[0] == runs[1] != runs[2]


def test_decode_compiles_once(weights):
  fresh = model_runner.ModelRunner(_CONFIG, *weights)
  for count in (9, 17, 30):
    output = generate.generate(
      fresh, _PROMPTS, count, temperature=count / 10, seed=count
    )
    assert output.decoded == 3 * (count - 2)
    assert output.tokens_per_second > 0
  generate.generate(
    fresh, [*_PROMPTS, [5]], 9
  )  # three rows have the size of four
  assert fresh._decode._cache_size() == 1
  assert fresh._prefill._cache_size() == 1


@pytest.mark.parametrize(
  ('prompts', 'count', 'message'),
  [
    ([], 4, 'at least one prompt'),
    ([[1], []], 4, 'prompt 1 is empty'),
    ([[1, 23]], 4, r'ids outside 0\.\.22'),
    ([[1, -1]], 4, r'ids outside 0\.\.22'),
    ([[1]], 0, 'max_new_tokens=0 must be >= 1'),
    ([[1] * 38], 4, 'at most 36 fit'),
    ([[1]], 40, 'must be below model.max_seq_len=40'),
  ],
)
def test_bad_requests(net, prompts, count, message):
  with pytest.raises(errors.InputError, match=message):
    generate.generate(net, prompts, count)
