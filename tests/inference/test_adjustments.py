"""Penalties, biases and masks against NumPy; they need no other program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import (
  engine,
  forward,
  model_runner,
  row_sampling,
  sampling,
  token_cache,
)
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.inference import request as requests
from dsv3_jax.nn import model
from tests import nightly
from tests.inference import counting, meshes
from tests.oracles import logit_adjustments as oracle

VOCAB = 40
RNG = np.random.default_rng(5)


class Allowing:
  """A matcher that allows some ids, whatever the tokens are."""

  failed = False

  def __init__(self, ids, vocab=VOCAB):
    bits_V = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits_V[list(ids)] = 1
    self._bits_v = np.packbits(bits_V, bitorder='little').view(np.uint32)

  def allowed(self, tokens):
    return self._bits_v


# Parameters, as the oracle names them.
CASES = [
  {},
  {'presence': 1.5},
  {'frequency': -0.4},
  {'repetition': 1.7},
  {'repetition': 0.8, 'presence': -0.3, 'frequency': 0.6},
  {'biases': ((3, 2.5), (39, -100.0))},
  {'allowed': [0, 7, 31, 32, 39]},
  {
    'repetition': 1.3,
    'presence': 1.0,
    'frequency': 0.5,
    'biases': ((7, 4.0),),
    'allowed': [3, 7, 38],
  },
]


def make_request(case, prompt, generated):
  params = requests.SamplingParams(
    presence_penalty=case.get('presence', 0.0),
    frequency_penalty=case.get('frequency', 0.0),
    repetition_penalty=case.get('repetition', 1.0),
    logit_bias=case.get('biases', ()),
  )
  request = requests.Request(prompt, 99, params)
  if 'allowed' in case:
    request.matcher = Allowing(case['allowed'])
  request.all_tokens += generated
  request.key_2 = np.zeros(2, np.uint32)
  return request


def adjusted(cases, logits_BV, texts, length=None):
  """What a step makes of logits, of which row b has the tokens `texts[b]`."""
  arrays = row_sampling.empty(len(cases), VOCAB)
  tokens_BS = RNG.integers(0, VOCAB, (len(cases), 20)).astype(np.int32)
  for b, (case, (prompt, generated)) in enumerate(
    zip(cases, texts, strict=True)
  ):
    row_sampling.fill(arrays, b, make_request(case, prompt, generated))
    tokens = prompt + generated
    tokens_BS[b, : len(tokens)] = tokens  # behind them, anything
  lengths = [len(prompt) + len(generated) for prompt, generated in texts]
  row_tokens = sampling.RowTokens(tokens_BS, np.array(lengths, np.int32))
  return jax.jit(sampling.adjust)(logits_BV, arrays.adjustments, row_tokens)


def test_adjusted_logits_are_those_of_the_formulas():
  logits_BV = RNG.normal(0.0, 2.0, (len(CASES), VOCAB)).astype(np.float32)
  texts = []
  for _ in CASES:
    size = RNG.integers(1, 8)
    prompt = RNG.integers(0, VOCAB, size).tolist()
    generated = RNG.integers(0, 10, RNG.integers(1, 10)).tolist()
    texts.append((prompt, [*generated, generated[0], prompt[0]]))
  got_BV = np.asarray(adjusted(CASES, logits_BV, texts))
  for b, case in enumerate(CASES):
    want_V = oracle.adjust(logits_BV[b], *texts[b], **case)
    np.testing.assert_allclose(got_BV[b], want_V, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(got_BV[0], logits_BV[0])  # to the bit


@pytest.mark.parametrize('case', CASES, ids=str)
def test_beside_a_row_that_needs_nothing(case):
  """Each kind of adjustment is found on its own."""
  logits_BV = RNG.normal(0.0, 2.0, (2, VOCAB)).astype(np.float32)
  texts = [([1, 2], [3, 3]), ([4], [5])]
  got_BV = np.asarray(adjusted([case, {}], logits_BV, texts))
  want_V = oracle.adjust(logits_BV[0], *texts[0], **case)
  np.testing.assert_allclose(got_BV[0], want_V, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(got_BV[1], logits_BV[1])


def test_biases_of_one_token_are_added_and_their_number_is_bounded():
  params = requests.SamplingParams(logit_bias=((3, 2.5), (5, 1.0), (3, 1.0)))
  ids_K, bias_K = params.bias_arrays
  assert (ids_K.tolist(), bias_K.tolist()) == ([3, 5], [3.5, 1.0])
  most = requests.MAX_LOGIT_BIASES
  requests.SamplingParams(logit_bias=tuple((i, 1.0) for i in range(most)))
  with pytest.raises(ValueError, match='more than 1024 ids'):
    requests.SamplingParams(logit_bias=tuple((i, 1.0) for i in range(most + 1)))


def test_tokens_are_cached_in_the_blocks_of_their_row():
  tokens_1ps1 = token_cache.empty(4, 8)
  table_Bb = np.array([[3, 1], [0, 4]], np.int32)  # 4: no block
  tokens_BT = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
  index_BT = np.array([[6, 7, 8, -1], [0, 1, -1, -1]], np.int32)
  write, read = jax.jit(token_cache.write), jax.jit(token_cache.read)
  tokens_1ps1 = write(tokens_1ps1, tokens_BT, index_BT, table_Bb)
  got_BS = np.asarray(read(tokens_1ps1, table_Bb))
  want_BS = np.zeros((2, 16), np.int32)
  want_BS[0, 6:9], want_BS[1, :2] = [1, 2, 3], [5, 6]
  np.testing.assert_array_equal(got_BS, want_BS)
  assert np.sum(np.asarray(tokens_1ps1) > 0) == 5  # nothing else is written


class _Net:
  """Has the same logits in every place."""

  def __init__(self, logits_V):
    self._logits_V = logits_V

  def apply(self, variables, tokens_BT, *args, method):
    caches = args[-1]
    shape = (*tokens_BT.shape, len(self._logits_V))
    logits_BTV = jnp.broadcast_to(jnp.asarray(self._logits_V), shape)
    return logits_BTV, jnp.zeros((*tokens_BT.shape, 1)), caches, None


def test_a_place_counts_the_tokens_up_to_it():
  """Of a step that verifies speculative tokens: not those behind it."""
  logits_V = np.float32(1.0 - 0.1 * np.arange(VOCAB))
  prompt, generated, case = [9, 9], [0, 1, 0], {'frequency': 0.15}
  arrays = row_sampling.empty(1, VOCAB)
  row_sampling.fill(arrays, 0, make_request(case, prompt, generated[:1]))
  table_Bb = np.array([[1, 0]], np.int32)
  tokens_1ps1 = jax.jit(token_cache.write)(
    token_cache.empty(2, 4),
    np.array([prompt], np.int32),
    np.arange(2)[None],
    table_Bb,
  )
  step_input = forward.StepInput(
    np.array([generated], np.int32),
    np.arange(2, 5)[None],
    np.array([2]),
    np.array([-1]),
    table_Bb,
  )
  caches = model.Caches(None, None, None, tokens_1ps1)
  net = _Net(logits_V)
  verify = jax.jit(forward.Forward(net, net, 0).verify)
  output, _, _ = verify({}, None, step_input, caches, arrays)
  want = [
    int(np.argmax(oracle.adjust(logits_V, prompt, generated[:end], **case)))
    for end in (1, 2, 3)
  ]
  assert want == [1, 0, 2]
  np.testing.assert_array_equal(output.tokens_Bt, [want])


def make_runner(num_speculative_tokens=0, **axes):
  return model_runner.ModelRunner(
    meshes.CONFIG,
    *meshes.weights(),
    num_speculative_tokens,
    inference_mesh.make_mesh(**axes) if axes else None,
  )


PARAMS = [
  requests.GREEDY,
  requests.SamplingParams(frequency_penalty=0.9, temperature=1.0, seed=3),
  requests.SamplingParams(repetition_penalty=1.8, presence_penalty=0.5),
  requests.SamplingParams(logit_bias=((3, 2.5), (5, -100.0))),
  requests.SamplingParams(logprobs=2, prompt_logprobs=True),
]
ALLOWED = [2, 3, 5, 7, 11, 13, 17, 19]


def answers(runner, all_params=PARAMS):
  """Tokens and log-probabilities of one request with each of the parameters.

  A further one may have some ids only; all have a part of their prompt in the
  prefix cache.
  """
  model_engine = engine.Engine(
    runner, num_blocks=32, max_rows=8, min_rows=8, min_blocks=4, chunk=64
  )
  head = meshes.prompt(1, 70)
  model_engine.submit(head, 1)
  while not model_engine.is_idle:
    model_engine.step()
  submitted = []
  for i, params in enumerate(all_params):
    prompt = head + meshes.prompt(10 + i, 3)
    submitted.append(requests.Request(prompt, 20, params))
  if all_params is PARAMS:
    submitted.append(requests.Request(head, 20))
    submitted[-1].matcher = Allowing(ALLOWED, runner.cfg.model.vocab_size)
  for request in submitted:
    model_engine.add(request)
  while not model_engine.is_idle:
    model_engine.step()
  return model_engine, submitted


@pytest.fixture(scope='module')
def on_one_device():
  runner = make_runner()
  return runner, answers(runner)[1]


def test_one_program_serves_all(on_one_device):
  runner, submitted = on_one_device
  known = meshes.compiled(runner)
  greedy = [requests.GREEDY] * 3
  _, plain = answers(runner, greedy)
  assert plain[0].tokens == submitted[0].tokens
  assert meshes.compiled(runner) == known
  assert all(token in ALLOWED for token in submitted[-1].tokens)
  tokens = [tuple(request.tokens) for request in submitted]
  assert len(set(tokens)) == len(tokens)
  # It was adjusted away, and would have been there.
  assert 5 not in submitted[3].tokens


@pytest.mark.parametrize(
  'axes', nightly.daily([{'data': 2}, {'node': 2, 'model': 2}], "{'data': 2}")
)
def test_a_mesh_adjusts_and_scores_as_one_device(on_one_device, axes):
  _, want = on_one_device
  _, got = answers(make_runner(**axes))
  for mine, theirs in zip(got, want, strict=True):
    assert mine.tokens == theirs.tokens
  assert None not in want[4].prompt_logprobs[1:]
  for kind in ('logprobs', 'prompt_logprobs'):
    for mine, theirs in zip(
      getattr(got[4], kind), getattr(want[4], kind), strict=True
    ):
      assert (mine is None) == (theirs is None)
      if mine is not None:
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [v for v, _ in mine.top] == [v for v, _ in theirs.top]


@pytest.mark.nightly
def test_speculation_counts_the_tokens_before_each_place(on_one_device):
  """Penalised requests speculate too; constrained ones do not."""
  _, want = on_one_device
  model_engine, got = answers(make_runner(2))
  for mine, theirs in zip(got, want, strict=True):
    assert mine.tokens == theirs.tokens
  assert model_engine.stats().accepted_tokens > 0


@pytest.mark.parametrize('is_constrained', [False, True])
def test_a_constrained_request_is_not_speculated(is_constrained):
  """What may come at a place depends on the token before it."""
  runner = counting.Runner(num_speculative_tokens=2)
  model_engine = engine.Engine(runner, num_blocks=4, max_rows=1)
  request = requests.Request([1, 2, 3], 20)
  if is_constrained:
    request.matcher = Allowing(ALLOWED, counting.VOCAB)
  model_engine.add(request)
  while not request.done:
    model_engine.step()
  assert (model_engine.stats().speculative_tokens == 0) == is_constrained


def test_a_step_sends_few_bytes_of_a_row():
  """Not two numbers for each id of the vocabulary."""
  arrays = row_sampling.empty(1, 129_280)
  sizes = [np.asarray(x).nbytes for x in jax.tree.leaves(arrays)]
  assert sum(sizes) < 129_280 // 5
