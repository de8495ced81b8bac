"""Router, experts and balance losses against cases solved by hand."""

import itertools

import numpy as np
import pytest

from . import balance, cases, moe


def routing_case(**changes):
  """x_MD, w_DE, bias_E and the router's settings as keywords."""
  rng = np.random.default_rng(4)
  x_MD, w_DE, bias_E = (
    rng.normal(size=shape) for shape in [(40, 5), (5, 16), (16,)]
  )
  options = {
    'num_groups': 4,
    'top_groups': 2,
    'top_k': 4,
    'score_func': 'sigmoid',
    'norm_topk': True,
    'route_scale': 2.5,
  }
  return x_MD, w_DE, bias_E, options | changes


def test_route_maximises_the_biased_score_within_the_best_groups():
  x_MD, w_DE, bias_E, options = routing_case()
  ids_MK, gates_MK, load_E = moe.route(x_MD, w_DE, bias_E, **options)
  scores_ME = 1.0 / (1.0 + np.exp(-x_MD @ w_DE))
  for m, ids in enumerate(ids_MK):
    c_GE = (scores_ME[m] + bias_E).reshape(4, 4)
    pair_G = np.sort(c_GE, axis=1)[:, -2:].sum(axis=1)
    groups = max(
      itertools.combinations(range(4), 2), key=lambda g: sum(pair_G[list(g)])
    )
    allowed = [e for e in range(16) if e // 4 in groups]
    c_E = c_GE.reshape(-1)
    best = max(
      itertools.combinations(allowed, 4), key=lambda s: sum(c_E[list(s)])
    )
    assert set(ids) == set(best)
    assert np.all(np.diff(c_E[ids]) <= 0)
    own = scores_ME[m, ids]
    np.testing.assert_allclose(
      gates_MK[m], 2.5 * own / own.sum(), rtol=cases.EXACT
    )
  np.testing.assert_allclose(gates_MK.sum(axis=1), 2.5, rtol=cases.EXACT)
  np.testing.assert_array_equal(load_E, np.bincount(ids_MK.ravel(), None, 16))


def test_bias_moves_the_choice_and_not_the_gates():
  x_MD, w_DE, bias_E, options = routing_case(norm_topk=False, route_scale=1.0)
  scores_ME = moe.scores(x_MD, w_DE, 'sigmoid')
  ids_MK, gates_MK, _ = moe.route(x_MD, w_DE, bias_E, **options)
  free_MK, _, _ = moe.route(x_MD, w_DE, None, **options)
  assert np.any(ids_MK != free_MK)
  np.testing.assert_array_equal(
    gates_MK, np.take_along_axis(scores_ME, ids_MK, axis=1)
  )
  shifted_MK, _, _ = moe.route(x_MD, w_DE, bias_E + 0.25, **options)
  np.testing.assert_array_equal(shifted_MK, ids_MK)


def test_other_groups_are_out_even_when_the_rest_is_negative():
  scores_E = np.array([0.9, 0.1, 0.8, 0.1])
  bias_E = np.array([-0.1, -0.9, -0.2, -0.9])
  ids = moe.choose(scores_E, bias_E, 2, 1, 2, 'sigmoid')
  assert ids == [0, 1]  # a mask of zero would have taken 0 and 2


def test_sigmoid_groups_take_two_and_softmax_groups_one():
  scores_E = np.array([0.9, 0.0, 0.6, 0.5])
  assert moe.choose(scores_E, np.zeros(4), 2, 1, 1, 'sigmoid') == [2]
  assert moe.choose(scores_E, np.zeros(4), 2, 1, 1, 'softmax') == [0]


def test_ties_go_to_the_lower_index():
  ids_MK, _, load_E = moe.route(
    np.zeros((3, 2)), np.zeros((2, 8)), None, 4, 2, 3, 'sigmoid', True, 1.0
  )
  np.testing.assert_array_equal(ids_MK, [[0, 1, 2]] * 3)
  np.testing.assert_array_equal(load_E, [3, 3, 3, 0, 0, 0, 0, 0])


def test_softmax_gates_are_not_renormalised():
  x_MD, w_DE, _, options = routing_case(
    score_func='softmax', norm_topk=False, route_scale=16.0
  )
  ids_MK, gates_MK, _ = moe.route(x_MD, w_DE, None, **options)
  powers_ME = np.exp(x_MD @ w_DE)
  probs_ME = powers_ME / powers_ME.sum(axis=1, keepdims=True)
  expected_MK = 16.0 * np.take_along_axis(probs_ME, ids_MK, axis=1)
  np.testing.assert_allclose(gates_MK, expected_MK, rtol=cases.EXACT)


def test_moe_of_equal_experts_is_one_expert_times_the_gates():
  rng = np.random.default_rng(5)
  one = {
    'w_gate_DF': rng.normal(size=(5, 7)),
    'w_up_DF': rng.normal(size=(5, 7)),
    'w_down_FD': rng.normal(size=(7, 5)),
  }
  experts = {
    'w_gate_EDF': np.stack([one['w_gate_DF']] * 16),
    'w_up_EDF': np.stack([one['w_up_DF']] * 16),
    'w_down_EFD': np.stack([one['w_down_FD']] * 16),
  }
  x_MD, w_DE, bias_E, options = routing_case()
  ids_MK, gates_MK, _ = moe.route(x_MD, w_DE, bias_E, **options)
  y_MD = moe.swiglu(x_MD, *one.values())
  routed_MD = moe.moe_ffn(x_MD, ids_MK, gates_MK, experts, None)
  np.testing.assert_allclose(routed_MD, 2.5 * y_MD, rtol=1e-10)
  both_MD = moe.moe_ffn(x_MD, ids_MK, gates_MK, experts, one)
  np.testing.assert_allclose(both_MD, 3.5 * y_MD, rtol=1e-10)


def test_bias_rule_follows_the_sign_of_the_load_error():
  got = moe.bias_update([0.5, 0.0, -0.5, 0.0], [9, 5, 1, 5], 0.001)
  np.testing.assert_allclose(got, [0.499, 0.0, -0.499, 0.0], rtol=cases.EXACT)
  assert moe.max_violation([9, 5, 1, 5]) == pytest.approx(0.8, rel=cases.EXACT)
  assert moe.max_violation([3, 3, 3]) == 0.0


def test_bias_rule_balances_a_skewed_router():
  rng = np.random.default_rng(6)
  x_MD = rng.normal(size=(128, 6)) + 1.0
  w_DE = rng.normal(size=(6, 8))
  bias_E = np.zeros(8)
  violations = []
  for rate in [0.01] * 60 + [0.001] * 40:
    _, _, load_E = moe.route(x_MD, w_DE, bias_E, 1, 1, 2, 'sigmoid', True, 1.0)
    violations.append(moe.max_violation(load_E))
    bias_E = moe.bias_update(bias_E, load_E, rate)
  assert violations[0] > 0.5
  assert np.mean(violations[-10:]) < 0.1


def rotated_scores(num_experts, top_k):
  """Scores [E, E] under which every expert is chosen equally often."""
  row = np.linspace(0.1, 0.9, num_experts)
  return np.array([np.roll(row, t) for t in range(num_experts)])


def test_balanced_router_costs_alpha():
  """f_i = 1 for all i, and the P_i sum to 1, so L = alpha * 1."""
  loss = balance.sequence_balance_loss(rotated_scores(8, 3), 3, 1e-4)
  assert loss == pytest.approx(1e-4, rel=cases.EXACT)


def test_uniform_scores_cost_alpha_whatever_is_chosen():
  """P_i = 1/E, and the f_i sum to E (here all on the first K by ties)."""
  loss = balance.sequence_balance_loss(np.full((5, 8), 0.3), 3, 1e-4)
  assert loss == pytest.approx(1e-4, rel=cases.EXACT)


def test_collapsed_router_costs_alpha_times_experts_over_k():
  """All on K experts of full weight: f_i = E/K there, P_i = 1/K."""
  scores_TE = np.full((6, 8), 1e-15)
  scores_TE[:, 2:4] = 1.0
  loss = balance.sequence_balance_loss(scores_TE, 2, 1.0)
  assert loss == pytest.approx(4.0, rel=1e-10)


def test_balance_loss_by_hand():
  """E=2, K=1: f = (4/3, 2/3), P = (0.55, 0.45) from rows of sum 1."""
  scores_TE = np.array([[0.6, 0.4], [0.75, 0.25], [0.3, 0.7]])
  loss = balance.sequence_balance_loss(scores_TE * 0.5, 1, 1.0)
  expected = 4 / 3 * 0.55 + 2 / 3 * 0.45
  assert loss == pytest.approx(expected, rel=cases.EXACT)


def test_padding_does_not_count():
  scores_TE = np.random.default_rng(7).uniform(size=(6, 8))
  padded = np.concatenate([scores_TE[:2], np.eye(8)[:3] + 0.1, scores_TE[2:]])
  valid_T = [1, 1, 0, 0, 0, 1, 1, 1, 1]
  plain = balance.sequence_balance_loss(scores_TE, 3, 1.0)
  masked = balance.sequence_balance_loss(padded, 3, 1.0, valid_T)
  assert masked == pytest.approx(plain, rel=cases.EXACT)
  assert balance.sequence_balance_loss(scores_TE, 3, 1.0, [0] * 6) == 0.0


def test_batch_wise_loss_forgives_what_sequence_wise_does_not():
  """Two sequences, each collapsed, balanced together: E/K against 1."""
  scores_BTE = np.full((2, 3, 4), 1e-15)
  scores_BTE[0, :, :2] = 1.0
  scores_BTE[1, :, 2:] = 1.0
  batch_loss = balance.batch_balance_loss(scores_BTE, 2, 1.0)
  loss = balance.mean_sequence_balance_loss(scores_BTE, 2, 1.0)
  assert batch_loss == pytest.approx(1.0, rel=1e-10)
  assert loss == pytest.approx(2.0, rel=1e-10)


def test_v2_losses_of_a_balanced_router_are_their_alphas():
  """Experts 4 a device on 4 devices; token t uses 2 devices, one expert each.

  f = f' = f'' = 1, and P, P' and P'' sum to 1.
  """
  scores_ME = rotated_scores(16, 2)
  ids_MK = np.array([[t, (t + 4) % 16] for t in range(16)])
  expert = balance.v2_expert_loss(scores_ME, ids_MK, 0.003)
  device = balance.v2_device_loss(scores_ME, ids_MK, 0.05, 4)
  communication = balance.v2_communication_loss(scores_ME, ids_MK, 0.02, 4, 2)
  assert expert == pytest.approx(0.003, rel=cases.EXACT)
  assert device == pytest.approx(0.05, rel=cases.EXACT)
  assert communication == pytest.approx(0.02, rel=cases.EXACT)


def test_v2_losses_by_hand():
  """E=4, K=2, two devices, one token on experts 0 and 1, limit 1."""
  scores_ME = np.array([[0.4, 0.3, 0.2, 0.1]])
  ids_MK = np.array([[0, 1]])
  args = scores_ME, ids_MK, 1.0
  assert balance.v2_expert_loss(*args) == pytest.approx(
    2 * 0.7, rel=cases.EXACT
  )
  assert balance.v2_device_loss(*args, 2) == pytest.approx(1.4, rel=cases.EXACT)
  got = balance.v2_communication_loss(*args, 2, 1)
  assert got == pytest.approx(2 * 0.7, rel=cases.EXACT)
  got = balance.v2_communication_loss(*args, 2, 2)
  assert got == pytest.approx(0.7, rel=cases.EXACT)
