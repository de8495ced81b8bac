"""The gate: which experts, how much of each, and the bias that steers."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.ops import routing
from tests import gradients, settings, tolerances
from tests.oracles import moe as oracle


def make(**changes) -> config.MoeConfig:
  """Router settings with 12 experts, top 3."""
  sizes = {'num_experts': 12, 'num_groups': 1, 'top_groups': 1} | changes
  keys = {f'model__moe__{key}': value for key, value in sizes.items()}
  return settings.small(**keys).model.moe


@functools.partial(jax.jit, static_argnames='cfg')
def route(x_MD, w_DE, bias_E, cfg):
  return routing.route(x_MD, w_DE, bias_E, cfg)


def by_scores(scores_ME, bias_E, cfg):
  """Routing of tokens whose sigmoid scores are given."""
  scores_ME = np.atleast_2d(np.asarray(scores_ME, np.float64))
  logits_ME = np.log(scores_ME) - np.log1p(-scores_ME)
  return route(jnp.float32(logits_ME), jnp.eye(scores_ME.shape[1]), bias_E, cfg)


def oracle_route(x_MD, w_DE, bias_E, cfg):
  limits = (cfg.num_groups, cfg.top_groups, cfg.top_k)
  rest = (cfg.score_func, cfg.norm_topk, cfg.route_scale)
  return oracle.route(x_MD, w_DE, bias_E, *limits, *rest)


def draw(seed, tokens=40, dim=6, experts=12):
  rng = np.random.default_rng(seed)
  x_MD, w_DE = rng.normal(size=(tokens, dim)), rng.normal(size=(dim, experts))
  return x_MD, w_DE, 0.3 * rng.normal(size=experts)


@pytest.mark.parametrize('groups', [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize(
  ('score_func', 'norm_topk', 'scale'),
  [('sigmoid', True, 2.5), ('softmax', False, 16.0), ('softmax', True, 1.0)],
)
def test_matches_the_oracle(groups, score_func, norm_topk, scale):
  cfg = make(
    num_groups=groups[0],
    top_groups=groups[1],
    score_func=score_func,
    norm_topk=norm_topk,
    route_scale=scale,
  )
  x_MD, w_DE, bias_E = draw(0)
  got = route(*map(jnp.float32, (x_MD, w_DE, bias_E)), cfg)
  ids_MK, gates_MK, load_E = oracle_route(x_MD, w_DE, bias_E, cfg)
  np.testing.assert_array_equal(got.ids_MK, ids_MK)
  tolerances.assert_close(got.gates_MK, gates_MK)
  scores_ME = oracle.scores(x_MD, w_DE, score_func)
  tolerances.assert_close(got.scores_ME, scores_ME)
  ones = jnp.ones((1, len(x_MD)))
  got_load_E = routing.count_load(got.ids_MK[None], 12, ones)
  np.testing.assert_array_equal(got_load_E, load_E)


@pytest.mark.parametrize('score_func', ['sigmoid', 'softmax'])
def test_gradients_match_the_oracle_and_the_bias_gets_none(score_func):
  cfg = make(num_groups=4, top_groups=2, score_func=score_func)
  x_MD, w_DE, bias_E = draw(1, tokens=5)
  rng = np.random.default_rng(2)
  d_gates, d_scores = rng.normal(size=(5, 3)), rng.normal(size=(5, 12))

  def loss(v, bias_E):
    got = route(v['x'], v['w'], bias_E, cfg)
    return jnp.sum(got.gates_MK * d_gates) + jnp.sum(got.scores_ME * d_scores)

  def oracle_loss(v):
    gates_MK = oracle_route(v['x'], v['w'], bias_E, cfg)[1]
    scores_ME = oracle.scores(v['x'], v['w'], score_func)
    return np.sum(gates_MK * d_gates) + np.sum(scores_ME * d_scores)

  values = {'x': x_MD, 'w': w_DE}
  grads, d_bias_E = jax.grad(loss, argnums=(0, 1))(
    jax.tree.map(jnp.float32, values), jnp.float32(bias_E)
  )
  gradients.assert_matches(grads, oracle_loss, values)
  assert not np.any(d_bias_E)


@pytest.mark.parametrize('groups', [1, 4])
@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6), size=st.floats(0.0, 5.0))
def test_the_bias_moves_the_choice_and_not_the_gates(groups, seed, size):
  cfg = make(num_groups=groups, top_groups=(groups + 1) // 2)
  x_MD, w_DE, bias_E = draw(seed)
  got = route(*map(jnp.float32, (x_MD, w_DE, size * bias_E)), cfg)
  chosen = np.take_along_axis(np.asarray(got.scores_ME), got.ids_MK, axis=1)
  want = 2.5 * chosen / chosen.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got.gates_MK, want, rtol=1e-5)
  np.testing.assert_allclose(np.sum(got.gates_MK, axis=1), 2.5, rtol=1e-5)
  for ids_K in np.asarray(got.ids_MK):  # distinct, within the best groups
    assert len(set(ids_K)) == 3
    assert len({e // (12 // groups) for e in ids_K}) <= cfg.top_groups


def test_a_large_bias_brings_in_and_keeps_out():
  x_MD, w_DE, _ = map(jnp.float32, draw(3))
  bias_E = jnp.zeros(12).at[5].set(10.0).at[2].set(-10.0)
  ids_MK = np.asarray(route(x_MD, w_DE, bias_E, make()).ids_MK)
  assert np.all(ids_MK[:, 0] == 5)
  assert not np.any(ids_MK == 2)


def test_groups_out_of_reach_are_masked_with_minus_infinity():
  # All biased scores are negative. With 0.0 in the place of -inf the masked
  # experts of the second half would be the best.
  cfg = make(num_experts=8, num_groups=2)
  scores = [0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2]
  got = by_scores(scores, jnp.full(8, -1.0), cfg)
  np.testing.assert_array_equal(got.ids_MK, [[0, 1, 2]])
  want = 2.5 * np.array([[0.6, 0.5, 0.4]]) / 1.5
  np.testing.assert_allclose(got.gates_MK, want, rtol=1e-6)


def test_a_group_is_scored_by_its_best_two_or_in_v2_by_its_best():
  scores = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.5, 0.1]
  cfg = make(num_experts=8, num_groups=2)
  got = by_scores(scores, jnp.zeros(8), cfg)
  np.testing.assert_array_equal(got.ids_MK, [[4, 5, 6]])
  cfg = make(num_experts=8, num_groups=2, score_func='softmax')
  got = by_scores(scores, jnp.zeros(8), cfg)
  assert np.all(np.asarray(got.ids_MK) < 4)


def test_groups_are_chosen_by_biased_scores():
  cfg = make(num_experts=8, num_groups=2)
  scores = [0.6, 0.6, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5]
  bias_E = jnp.zeros(8).at[7].set(0.5)
  got = by_scores(scores, bias_E, cfg)
  np.testing.assert_array_equal(got.ids_MK, [[7, 4, 5]])


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_ties_go_to_the_lower_index(groups):
  cfg = make(num_groups=groups)
  x_MD, w_DE = jnp.zeros((2, 6)), jnp.zeros((6, 12))
  got = route(x_MD, w_DE, jnp.zeros(12), cfg)
  want = oracle_route(np.zeros((2, 6)), np.zeros((6, 12)), None, cfg)[0]
  np.testing.assert_array_equal(got.ids_MK, [[0, 1, 2]] * 2)
  np.testing.assert_array_equal(got.ids_MK, want)


def test_logits_are_f32_for_bf16_tokens():
  x_MD, w_DE, bias_E = map(jnp.float32, draw(4))
  x_bf16 = x_MD.astype(jnp.bfloat16)
  got = route(x_bf16, w_DE, bias_E, make())
  want = route(x_bf16.astype(jnp.float32), w_DE, bias_E, make())
  assert got.gates_MK.dtype == jnp.float32
  np.testing.assert_array_equal(got.ids_MK, want.ids_MK)
  np.testing.assert_array_equal(got.scores_ME, want.scores_ME)


def test_load_counts_valid_tokens_only():
  ids_BTK = jnp.array([[[0, 1], [1, 2], [3, 0]], [[1, 3], [1, 0], [2, 3]]])
  valid_BT = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
  per_row = routing.count_per_sequence(ids_BTK, 5, valid_BT)
  np.testing.assert_array_equal(per_row, [[1, 2, 1, 0, 0], [0, 1, 0, 1, 0]])
  load_E = routing.count_load(ids_BTK, 5, valid_BT)
  np.testing.assert_array_equal(load_E, [1, 3, 1, 1, 0])


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
  loads=st.lists(st.integers(0, 60_000), min_size=12, max_size=12)
)
def test_bias_update_matches_the_oracle(loads):
  bias_E = np.linspace(-0.1, 0.1, 12)
  args = (jnp.float32(bias_E), jnp.float32(loads), 0.001)
  got = jax.jit(routing.update_bias)(*args)
  want = oracle.bias_update(bias_E, loads, 0.001)
  # A step in the wrong direction, or none, is an error of at least 1e-3.
  np.testing.assert_allclose(got, want, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize('experts', [3, 7, 28, 60, 64, 160, 255, 256])
@pytest.mark.parametrize('load', [0, 7, 97, 62_001, 1_966_081])
def test_equal_loads_leave_the_bias_alone(experts, load):
  bias_E = jnp.linspace(0.0, 1.0, experts)
  got = routing.update_bias(bias_E, jnp.full(experts, float(load)), 0.001)
  np.testing.assert_array_equal(got, bias_E)


def test_each_layer_is_updated_for_itself():
  load_LE = jnp.array([[3.0, 1.0, 2.0], [200.0, 400.0, 300.0]])
  got = routing.update_bias(jnp.zeros((2, 3)), load_LE, jnp.float32(0.5))
  np.testing.assert_array_equal(got, [[-0.5, 0.5, 0.0], [0.5, -0.5, 0.0]])


def test_the_rule_balances_a_skewed_router():
  rng = np.random.default_rng(5)
  x_MD, w_DE = rng.normal(size=(512, 6)), rng.normal(size=(6, 12))
  x_MD, w_DE = jnp.float32(x_MD + 0.5), jnp.float32(w_DE)
  violations, bias_E, cfg = [], jnp.zeros(12), make()
  for _ in range(80):
    ids_MK = route(x_MD, w_DE, bias_E, cfg).ids_MK
    load_E = routing.count_load(ids_MK[None], 12, jnp.ones((1, 512)))
    violations.append(oracle.max_violation(np.asarray(load_E)))
    bias_E = routing.update_bias(bias_E, load_E, 0.01)
  assert violations[0] > 0.5
  assert violations[-1] < 0.15


def test_max_violation_by_hand():
  """(5 - 2) / 2 and (2 - 2) / 2; the mean of both."""
  load_LE = jnp.float32([[5, 1, 1, 1], [2, 2, 2, 2]])
  assert routing.max_violation(load_LE) == 0.75
  assert routing.max_violation(jnp.zeros((2, 4))) == 0.0


loads = st.lists(
  st.lists(st.integers(0, 10**6), min_size=4, max_size=4).filter(any),
  min_size=1,
  max_size=5,
)


@hypothesis.given(loads, st.integers(2, 9))
def test_max_violation_is_a_mean_over_layers_and_has_no_unit(loads, factor):
  load_LE = np.array(loads, np.float64)
  mean_L = load_LE.mean(axis=1)
  want = np.mean((load_LE.max(axis=1) - mean_L) / mean_L)
  got = float(routing.max_violation(jnp.float32(load_LE)))
  assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
  assert -1e-6 <= got <= 4 - 1 + 1e-6  # even, and all on one of four
  more = float(routing.max_violation(jnp.float32(factor * load_LE)))
  assert more == pytest.approx(got, rel=1e-5, abs=1e-5)
