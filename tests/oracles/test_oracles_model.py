"""Losses, MTP and the whole network: what may depend on what."""

import math

import numpy as np
import pytest

from . import cases, losses, mla, model, weights


def test_cross_entropy_is_log_v_when_uniform_and_survives_large_logits():
  got = losses.cross_entropy(np.full((2, 7), 1e4), [0, 6])
  np.testing.assert_allclose(got, math.log(7), rtol=1e-11)
  got = losses.cross_entropy(np.array([[1000.0, 0.0]]), [1])
  np.testing.assert_allclose(got, 1000.0, rtol=cases.EXACT)


def test_main_loss_is_the_mean_over_weighted_targets():
  logits_MV = np.random.default_rng(8).normal(size=(3, 5))
  nats = losses.cross_entropy(logits_MV, [0, 1, 2])
  got = losses.main_loss(logits_MV, [0, 1, 2], np.array([1.0, 0.0, 1.0]))
  assert got == pytest.approx((nats[0] + nats[2]) / 2, rel=cases.EXACT)


def test_depth_k_predicts_token_i_plus_k_plus_1():
  row = np.arange(10, 17)  # t_1..t_7, so T = 6
  for depth in range(3):
    targets_J, weights_J = losses.mtp_targets(row, depth)
    np.testing.assert_array_equal(targets_J, row[depth + 1 :])
    assert len(targets_J) == 6 - depth
    np.testing.assert_array_equal(weights_J, 1.0)


def test_isolated_segments_mask_every_span_over_a_border():
  segments_Z = [0, 0, 0, 1, 0, 0, 0]  # t_4 is foreign; then 0 comes again
  _, main_J = losses.mtp_targets(np.arange(7), 0, None, segments_Z)
  _, first_J = losses.mtp_targets(np.arange(7), 1, None, segments_Z)
  np.testing.assert_array_equal(main_J, [1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(first_J, [1, 0, 0, 0, 1])


def test_loss_mask_follows_the_target():
  weights_Z = [1, 1, 1, 0, 1, 1]
  _, main_J = losses.mtp_targets(np.arange(6), 0, weights_Z)
  _, first_J = losses.mtp_targets(np.arange(6), 1, weights_Z)
  np.testing.assert_array_equal(main_J, [1, 1, 0, 1, 1])
  np.testing.assert_array_equal(first_J, [1, 0, 1, 1])


def test_normalizers_differ_by_the_missing_positions():
  logits_JV = np.zeros((5, 4))  # T = 6, k = 1
  args = logits_JV, np.zeros(5, np.int64), np.ones(5)
  by_length = losses.mtp_depth_loss(*args, 'T', 6.0)
  by_valid = losses.mtp_depth_loss(*args, 'valid', 6.0)
  assert by_length == pytest.approx(math.log(4) * 5 / 6, rel=cases.EXACT)
  assert by_valid == pytest.approx(math.log(4), rel=cases.EXACT)
  total = losses.mtp_loss([by_valid, 3 * by_valid], 0.3)
  assert total == pytest.approx(0.6 * math.log(4), rel=cases.EXACT)


TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


def run(config, tokens_T=TOKENS, segments_T=None, tree=None):
  if tree is None:
    tree = weights.random_weights(config, seed=9)
  return model.forward(
    tree, tokens_T, model.settings_of(config), None, segments_T
  )


def unit(x):
  """x over its root mean square."""
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def test_block_is_two_residual_branches_with_their_own_norms():
  config = cases.small()
  settings = model.settings_of(config)
  tree = weights.random_weights(config, seed=13)['layers'][0]
  x_TD = np.random.default_rng(14).normal(size=(5, 8))
  got_TD, routing = model.block(x_TD, tree, settings, np.arange(5), None)
  attended_TD, _ = mla.mla_naive(
    unit(x_TD) * tree['attn_norm_D'],
    tree['mla'],
    np.arange(5),
    None,
    settings.freqs,
    settings.scale,
    settings.latent_eps,
  )
  middle_TD = x_TD + attended_TD
  normed_TD = unit(middle_TD) * tree['ffn_norm_D']
  gate_TF = normed_TD @ tree['ffn']['w_gate_DF']
  inner_TF = gate_TF / (1 + np.exp(-gate_TF))
  inner_TF = inner_TF * (normed_TD @ tree['ffn']['w_up_DF'])
  expected_TD = middle_TD + inner_TF @ tree['ffn']['w_down_FD']
  np.testing.assert_allclose(got_TD, expected_TD, rtol=0, atol=cases.EXACT)
  assert routing is None


def test_heads_by_hand_when_every_block_is_the_identity():
  tree = weights.random_weights(cases.small(), seed=15)
  for block in tree['layers'] + [module['block'] for module in tree['mtp']]:
    block['mla']['w_o_NUD'] = np.zeros_like(block['mla']['w_o_NUD'])
    block['ffn'] = {
      'w_gate_DF': np.ones((8, 1)),
      'w_up_DF': np.ones((8, 1)),
      'w_down_FD': np.zeros((1, 8)),
    }
  logits_TV, mtp_logits, _ = run(cases.small(), tree=tree)
  hidden_TD = unit(tree['embed_VD'][TOKENS]) * tree['final_norm_D']
  heads = [hidden_TD @ tree['head_DV']]
  for k, module in enumerate(tree['mtp'], start=1):
    left = unit(tree['embed_VD'][TOKENS[k:]]) * module['enorm_D']
    right = unit(hidden_TD[: len(TOKENS) - k]) * module['hnorm_D']
    joined_TD = np.concatenate([left, right], axis=1) @ module['eh_proj_2DD']
    hidden_TD = unit(joined_TD) * module['norm_D']
    heads.append(hidden_TD @ tree['head_DV'])
  for got, expected in zip([logits_TV, *mtp_logits], heads, strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=cases.EXACT)


def test_forward_returns_one_routing_per_moe_block():
  config = cases.small()
  logits_TV, mtp_logits, routings = run(config)
  assert logits_TV.shape == (8, 11)
  assert [x.shape for x in mtp_logits] == [(7, 11), (6, 11)]
  assert [r['layer'] for r in routings] == [1, 2, 3, 4]
  assert [r['load_E'].sum() for r in routings] == [24, 24, 21, 18]
  assert [r['scores_TE'].shape for r in routings] == [
    (8, 8),
    (8, 8),
    (7, 8),
    (6, 8),
  ]


@pytest.mark.parametrize('hidden', ['post_norm', 'pre_norm'])
def test_what_each_head_may_see(hidden):
  """Changing token j: main logits change from j on, module k's from j - k."""
  config = cases.small(mtp__hidden=hidden)
  before = run(config)
  for j in range(len(TOKENS)):
    tokens_T = TOKENS.copy()
    tokens_T[j] = 10
    after = run(config, tokens_T)
    heads = zip([before[0], *before[1]], [after[0], *after[1]], strict=True)
    for k, (old, new) in enumerate(heads):
      first = max(j - k, 0)
      np.testing.assert_array_equal(new[:first], old[:first])
      if first < len(old):
        assert np.abs(new[first] - old[first]).max() > 1e-9


def test_hidden_switch_touches_the_modules_only():
  post = run(cases.small(mtp__hidden='post_norm'))
  pre = run(cases.small(mtp__hidden='pre_norm'))
  np.testing.assert_array_equal(post[0], pre[0])
  for a, b in zip(post[1], pre[1], strict=True):
    assert np.abs(a - b).max() > 1e-3


def test_hidden_switch_is_idle_when_the_norms_have_unit_weight():
  """RMSNorm of an RMSNorm is itself, up to eps."""
  tree = weights.random_weights(cases.small(), seed=9)
  tree['final_norm_D'] = np.ones(8)
  for module in tree['mtp']:
    module['norm_D'] = np.ones(8)
  post = run(cases.small(mtp__hidden='post_norm', norm_eps=1e-14), tree=tree)
  pre = run(cases.small(mtp__hidden='pre_norm', norm_eps=1e-14), tree=tree)
  for a, b in zip(post[1], pre[1], strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_embedding_comes_first_in_the_concatenation():
  config = cases.small()
  tree = weights.random_weights(config, seed=9)
  for module in tree['mtp']:
    module['eh_proj_2DD'][8:] = 0.0  # cut the hidden half
  _, (first, _), _ = run(config, tree=tree)
  _, (other, _), _ = run(config, np.array([7, *TOKENS[1:]]), tree=tree)
  np.testing.assert_array_equal(first, other)  # t_1 enters through h only
  tree['mtp'][0]['eh_proj_2DD'][:8] = 0.0
  _, (silent, _), _ = run(config, tree=tree)
  np.testing.assert_array_equal(silent, 0.0)  # all-zero input stays zero


def test_packed_row_equals_its_samples_apart():
  """With isolation and shifted positions (RoPE is relative)."""
  config = cases.small(mtp__depth=0)
  packed_TV, _, _ = run(config, TOKENS, [0] * 3 + [1] * 5)
  first_TV, _, _ = run(config, TOKENS[:3])
  second_TV, _, _ = run(config, TOKENS[3:])
  expected_TV = np.concatenate([first_TV, second_TV])
  np.testing.assert_allclose(packed_TV, expected_TV, rtol=0, atol=1e-11)


def test_permuting_experts_within_groups_changes_nothing():
  config = cases.small(mtp__depth=0, moe__num_groups=1, moe__top_groups=1)
  tree = weights.random_weights(config, seed=10)
  before_TV, _, _ = run(config, tree=tree)
  order = np.random.default_rng(11).permutation(8)
  for layer in tree['layers'][1:]:
    ffn = layer['ffn']
    ffn['router_DE'] = ffn['router_DE'][:, order]
    ffn['bias_E'] = ffn['bias_E'][order]
    ffn['experts'] = {name: w[order] for name, w in ffn['experts'].items()}
  after_TV, _, _ = run(config, tree=tree)
  np.testing.assert_allclose(after_TV, before_TV, rtol=0, atol=cases.EXACT)


def test_v2_shape_runs():
  config = cases.small(
    mla__q_lora_rank=0,
    moe__score_func='softmax',
    moe__norm_topk=False,
    mtp__depth=0,
  )
  logits_TV, mtp_logits, routings = run(config)
  assert np.all(np.isfinite(logits_TV)) and mtp_logits == []
  np.testing.assert_allclose(
    routings[0]['scores_TE'].sum(axis=1), 1.0, rtol=cases.EXACT
  )
