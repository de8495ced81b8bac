"""Head loss, MTP targets and balance losses: oracles and literal cases."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import balance_loss as balance_losses
from dsv3_jax.ops import cross_entropy, mtp_loss, routing
from tests import gradients, reference, settings, tolerances
from tests.oracles import losses as oracle

DIM, VOCAB = 6, 11


def draw(seed, batch, length):
  rng = np.random.default_rng(seed)
  values = {
    'h': rng.normal(size=(batch, length, DIM)),
    'head': rng.normal(size=(DIM, VOCAB)),
  }
  targets_BT = rng.integers(0, VOCAB, (batch, length))
  weights_BT = rng.uniform(0.0, 1.0, (batch, length))
  weights_BT[:, ::3] = 0.0
  return values, targets_BT, weights_BT


def f32(tree):
  return jax.tree.map(jnp.float32, tree)


def head_loss(v, targets_BT, weights_BT):
  rest = (jnp.asarray(targets_BT), jnp.float32(weights_BT))
  return cross_entropy.head_loss(v['h'], v['head'], *rest)


def plain_loss(v, targets_BT, weights_BT):
  log_p = jax.nn.log_softmax(v['h'] @ v['head'])
  chosen = jnp.take_along_axis(log_p, jnp.asarray(targets_BT)[..., None], -1)
  return -jnp.sum(chosen[..., 0] * jnp.float32(weights_BT))


def oracle_loss(v, targets_BT, weights_BT):
  logits_MV = (v['h'] @ v['head']).reshape(-1, VOCAB)
  nats_M = oracle.cross_entropy(logits_MV, targets_BT.reshape(-1))
  return np.sum(nats_M * weights_BT.reshape(-1))


def test_token_losses_match_the_oracle_at_any_magnitude():
  logits = np.random.default_rng(0).normal(size=(2, 3, VOCAB))
  logits[0, 0] *= 1e4
  targets = np.arange(6).reshape(2, 3)
  got = cross_entropy.token_losses(jnp.float32(logits), jnp.asarray(targets))
  want = oracle.cross_entropy(
    np.float32(logits).reshape(-1, VOCAB), targets.reshape(-1)
  )
  np.testing.assert_allclose(np.ravel(got), want, rtol=1e-5, atol=1e-6)


def test_head_loss_matches_the_oracle_with_its_gradients():
  values, *rest = draw(1, 2, 7)
  got, grads = jax.value_and_grad(head_loss)(f32(values), *rest)
  assert float(got) == pytest.approx(oracle_loss(values, *rest), rel=1e-6)
  assert float(head_loss(f32(values), *rest)) == float(got)
  gradients.assert_matches(grads, lambda v: oracle_loss(v, *rest), values)


@pytest.mark.parametrize(
  ('at_once', 'batch', 'length'),
  [
    (1, 1, 1),
    (4, 2, 13),
    (2048, 3, 8),
    *(
      pytest.param(at_once, *shape, marks=pytest.mark.nightly)
      for at_once in (1, 4, 2048)
      for shape in ((1, 1), (3, 8), (2, 13), (9, 6))
    ),
  ],
)
def test_head_loss_is_the_plain_formula_however_cut(
  monkeypatch, at_once, batch, length
):
  monkeypatch.setattr(cross_entropy, 'TOKENS_AT_ONCE', at_once)
  values, *rest = draw(2, batch, length)
  # Seven times the loss: the backward pass scales what the forward pass saved.
  grad = lambda f: jax.value_and_grad(lambda v: 7.0 * f(v, *rest))(f32(values))
  (got, grads), (want, want_grads) = grad(head_loss), grad(plain_loss)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  tolerances.assert_trees_close(grads, want_grads)


def test_head_loss_ignores_targets_of_weight_0():
  values, targets_BT, weights_BT = draw(3, 2, 6)
  other_BT = np.where(weights_BT == 0.0, (targets_BT + 1) % VOCAB, targets_BT)
  grads = [
    jax.grad(head_loss)(f32(values), t, weights_BT)
    for t in (targets_BT, other_BT)
  ]
  np.testing.assert_array_equal(grads[0]['head'], grads[1]['head'])
  assert not np.any(np.asarray(grads[0]['h'])[weights_BT == 0.0])
  value, grad = jax.value_and_grad(head_loss)(
    f32(values), targets_BT, 0.0 * weights_BT
  )
  assert float(value) == 0.0
  assert not any(np.any(g) for g in jax.tree.leaves(grad))


def test_head_loss_in_bf16_stays_near_f32():
  values, *rest = draw(4, 2, 16)
  lower = jax.tree.map(jnp.bfloat16, values)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), lower)
  got, grads = jax.value_and_grad(head_loss)(lower, *rest)
  want, want_grads = jax.value_and_grad(plain_loss)(exact, *rest)
  assert got.dtype == jnp.float32
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  for name, grad in grads.items():
    assert grad.dtype == jnp.bfloat16
    tolerances.assert_close(np.float32(grad), want_grads[name], 'bfloat16')


def test_mtp_shift_literal():
  x_BT = jnp.array([[1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(mtp_loss.mtp_shift(x_BT, 0), x_BT)
  np.testing.assert_array_equal(mtp_loss.mtp_shift(x_BT, 1), [[2, 3, 4, 5, 0]])
  np.testing.assert_array_equal(mtp_loss.mtp_shift(x_BT, 4), [[5, 0, 0, 0, 0]])


@pytest.mark.parametrize(
  ('depth', 'isolated', 'want'),
  [
    (1, False, [1, 1, 1, 1, 1, 0, 0, 0]),
    (2, False, [1, 1, 1, 1, 0, 0, 0, 0]),
    # Two samples of 4 and 2 tokens, then padding; each sample's last token has
    # no target of its own.
    (1, True, [1, 1, 0, 0, 0, 0, 0, 0]),
    (2, True, [1, 0, 0, 0, 0, 0, 0, 0]),
  ],
)
def test_mtp_weights_literal(depth, isolated, want):
  segments_BT = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
  weights = [1, 1, 1, 0, 1, 0, 0, 0] if isolated else [1, 1, 1, 1, 1, 1, 0, 0]
  weights_BT = jnp.float32([weights])
  got = mtp_loss.mtp_weights(weights_BT, segments_BT, depth, isolated)
  np.testing.assert_array_equal(got, [want])


def test_lambda_keeps_its_weight_where_few_targets_are_learned():
  """A chat of 12 tokens of which 3 are learned, and a row of padding.

  Every token costs log 13 nats at both depths, and so do both losses.
  """
  cfg = settings.small(data__isolate_samples=True).model.mtp
  weights_BT = jnp.float32([[0] * 8 + [1, 1, 1, 0], [0] * 12])
  segments_BT = jnp.int32([[1] * 11 + [0], [0] * 12])
  scales = mtp_loss.loss_scales(cfg, weights_BT, segments_BT, True)
  assert scales['main'] == scales['mtp'][0] == jnp.float32(1 / 3)
  counted = mtp_loss.mtp_weights(weights_BT, segments_BT, 1, True)
  targets, mtp_weights = oracle.mtp_targets(
    np.arange(13), 1, [0] * 9 + [1, 1, 1, 0], [1] * 12 + [0]
  )
  np.testing.assert_array_equal(counted[0, :-1], mtp_weights)
  logits_MV = np.zeros((len(targets), 13))
  args = (logits_MV, targets, mtp_weights, 'T', 3.0)
  want = oracle.mtp_depth_loss(*args)
  got = np.log(13) * float(jnp.sum(counted) * scales['mtp'][0])
  assert got == pytest.approx(want, rel=1e-6)
  assert got == pytest.approx(np.log(13), rel=1e-6)  # nothing is lost


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
  lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
  depth=st.integers(1, 4),
  isolated=st.booleans(),
  seed=st.integers(0, 99),
)
def test_mtp_targets_and_weights_match_the_oracle(
  lengths, depth, isolated, seed
):
  segments_Z = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  segments_Z = np.pad(segments_Z, (0, 31 - len(segments_Z)))
  rng, num_inputs = np.random.default_rng(seed), len(segments_Z) - 1
  tokens_Z = rng.integers(0, VOCAB, num_inputs + 1)
  counts_Z = (segments_Z > 0) * rng.integers(0, 2, num_inputs + 1).astype(float)
  main = functools.partial(oracle.mtp_targets, tokens_Z, weights_Z=counts_Z)
  borders_Z = segments_Z if isolated else None
  targets_T, weights_T = main(0, segments_Z=borders_Z)
  targets_J, weights_J = main(depth, segments_Z=borders_Z)
  got_targets = mtp_loss.mtp_shift(jnp.array(targets_T)[None], depth)[0]
  rows = (jnp.float32(weights_T)[None], jnp.array(segments_Z[:-1])[None])
  got_weights = mtp_loss.mtp_weights(*rows, depth, isolated)[0]
  count = num_inputs - depth
  np.testing.assert_array_equal(got_targets[:count], targets_J)
  np.testing.assert_array_equal(got_weights[:count], weights_J)
  assert not np.any(got_weights[count:])


def balance_case(kind):
  changes = {'v2_expert_alpha': 0.3, 'v2_device_alpha': 0.5}
  changes |= {'v2_comm_alpha': 0.2, 'kind': kind}
  keys = {f'balance__{key}': value for key, value in changes.items()}
  return settings.small(**keys)


@pytest.mark.parametrize('kind', ['sequence', 'batch', 'v2', 'none'])
@pytest.mark.parametrize('padding', ['full', 'ragged', 'empty_row'])
def test_balance_losses_match_the_oracle(kind, padding):
  cfg = balance_case(kind)
  rng = np.random.default_rng(5)
  scores_BTE = rng.uniform(0.05, 1.0, (3, 7, 8))
  ids_BTK = np.argsort(-scores_BTE + rng.normal(0, 0.3, (3, 7, 8)))[..., :3]
  valid_BT = np.ones((3, 7))
  if padding != 'full':
    valid_BT[0, 4:] = 0.0
    valid_BT[2, :3] = 0.0
  if padding == 'empty_row':
    valid_BT[1] = 0.0
  rest = (jnp.asarray(ids_BTK, jnp.int32), jnp.float32(valid_BT))

  def loss(scores_BTE):
    return balance_losses.balance_loss(
      scores_BTE, *rest, cfg.balance, cfg.model.moe
    )

  got, grad = jax.value_and_grad(loss)(jnp.float32(scores_BTE))
  exact = lambda s: reference.balance_loss(s, ids_BTK, valid_BT, cfg)
  assert float(got) == pytest.approx(exact(scores_BTE), rel=1e-5)
  # f is piecewise constant: the oracle's slope is that through P alone.
  gradients.assert_matches(
    {'scores': grad}, lambda v: exact(v['scores']), {'scores': scores_BTE}
  )
  assert not np.any(np.asarray(grad)[valid_BT == 0.0])
  assert np.any(grad) == (kind != 'none')


@pytest.mark.parametrize('kind', ['sequence', 'batch'])
def test_perfect_balance_costs_alpha(kind):
  cfg = balance_case(kind)
  # Token t prefers experts t, t + 1, t + 2: each expert 3 times in 8 tokens.
  rows = [np.roll([0.9, 0.9, 0.9] + [0.1] * 5, t) for t in range(8)]
  scores_BTE = jnp.float32(np.array(rows)[None])
  _, ids_BTK = jax.lax.top_k(scores_BTE, 3)
  args = (scores_BTE, ids_BTK, jnp.ones((1, 8)), cfg.balance, cfg.model.moe)
  assert float(balance_losses.balance_loss(*args)) == pytest.approx(
    cfg.balance.alpha
  )


def test_sequence_balance_ignores_bias_and_groups():
  # eq. 18 takes the top K of the plain scores: the ids chosen do not matter.
  cfg = balance_case('sequence')
  scores_BTE = jnp.float32(np.random.default_rng(6).uniform(size=(1, 5, 8)))
  loss = lambda ids: balance_losses.balance_loss(
    scores_BTE, ids, jnp.ones((1, 5)), cfg.balance, cfg.model.moe
  )
  chosen = jax.lax.top_k(scores_BTE, 3)[1]
  assert float(loss(chosen)) == float(loss(7 - chosen))


def test_balance_gradient_pushes_scores_together():
  # Minimising the loss along its gradient evens the load of a skewed gate.
  cfg = balance_case('sequence')
  logits = jnp.float32(np.random.default_rng(7).normal(size=(1, 64, 8)))
  logits += jnp.linspace(1.0, -1.0, 8)
  ids, ones = jnp.zeros((1, 64, 3), jnp.int32), jnp.ones((1, 64))
  rest = (ids, ones, cfg.balance, cfg.model.moe)
  loss = lambda x: balance_losses.balance_loss(jax.nn.sigmoid(x), *rest)
  spread = lambda x: float(
    jnp.std(routing.count_load(jax.lax.top_k(x, 3)[1], 8, ones))
  )
  before, step = spread(logits), jax.jit(jax.grad(loss))
  for _ in range(50):
    # One bias for all tokens, as a gate's weights would give.
    logits -= 20.0 * jnp.sum(step(logits), axis=(0, 1))
  assert spread(logits) < 0.5 * before
