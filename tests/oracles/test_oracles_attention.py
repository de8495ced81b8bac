"""Rotary positions and latent attention against figures and properties."""

import itertools
import math

import numpy as np
import pytest

from . import cases, mla, model, rope, weights


def test_yarn_bounds_are_10_and_23():
  assert rope.yarn_bounds(64, 10000.0, 4096, 32, 1) == (10, 23)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
  plain = rope.frequencies(64, 10000.0)
  yarn = rope.yarn_frequencies(64, 10000.0, 4096, 40.0, 32, 1)
  np.testing.assert_array_equal(yarn[:11], plain[:11])
  np.testing.assert_allclose(yarn[23:], plain[23:] / 40.0, rtol=cases.EXACT)
  between = plain[11:23] / yarn[11:23]
  assert np.all(np.diff(between) > 0) and np.all((between > 1) & (between < 40))


@pytest.mark.parametrize(
  ('mscale', 'active', 'expected'),
  [(1.0, True, 0.1352338), (0.707, True, 0.1147214), (1.0, False, 0.0721688)],
)
def test_softmax_scale_of_the_published_models(mscale, active, expected):
  scale, factor = rope.softmax_scale(192, 40.0, mscale, mscale, active)
  assert scale == pytest.approx(expected, abs=5e-8)
  assert factor == 1.0


def test_unequal_mscales_show_up_on_cos_and_sin():
  scale, factor = rope.softmax_scale(192, 40.0, 1.0, 0.0, True)
  assert scale == 192**-0.5
  assert factor == pytest.approx(0.1 * math.log(40) + 1, rel=cases.EXACT)


def test_rotation_is_a_real_two_by_two_matrix_on_neighbours():
  x_TR = np.random.default_rng(0).normal(size=(5, 6))
  freqs = rope.frequencies(6, 100.0)
  got_TR = rope.rotate_interleaved(x_TR, np.arange(5), freqs)
  for t, j in itertools.product(range(5), range(3)):
    c, s = math.cos(t * freqs[j]), math.sin(t * freqs[j])
    pair = np.array([[c, -s], [s, c]]) @ x_TR[t, 2 * j : 2 * j + 2]
    np.testing.assert_allclose(
      got_TR[t, 2 * j : 2 * j + 2], pair, rtol=cases.EXACT, atol=cases.EXACT
    )


def test_rotated_products_depend_on_distance_only():
  rng = np.random.default_rng(1)
  q_R, k_R = rng.normal(size=(2, 8))
  freqs = rope.frequencies(8, 10000.0)

  def product(i, j):
    return np.dot(
      rope.rotate_interleaved(q_R, i, freqs),
      rope.rotate_interleaved(k_R, j, freqs),
    )

  assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-10)
  assert abs(product(7, 3) - product(7, 4)) > 1e-3


def attention_case(**changes):
  """(weights, settings, x_TD) of the first layer of a tiny model."""
  config = cases.small(**changes)
  tree = weights.random_weights(config, seed=2, std=0.5)
  x_TD = np.random.default_rng(3).normal(size=(6, config.d_model))
  return tree['layers'][0]['mla'], model.settings_of(config), x_TD


def naive(tree, settings, x_TD, positions_T=None, segments_T=None):
  if positions_T is None:
    positions_T = np.arange(len(x_TD))
  return mla.mla_naive(
    x_TD,
    tree,
    positions_T,
    segments_T,
    settings.freqs,
    settings.scale,
    settings.latent_eps,
    settings.rope_factor,
  )


@pytest.mark.parametrize('q_lora_rank', [0, 6])
@pytest.mark.parametrize('mscale', [1.0, 0.5])
def test_absorbed_decoding_equals_naive_attention(q_lora_rank, mscale):
  tree, settings, x_TD = attention_case(
    mla__q_lora_rank=q_lora_rank, rope__mscale=mscale
  )
  assert (settings.rope_factor == 1.0) == (mscale == 1.0)
  expected_TD, (c_TC, k_rope_TR) = naive(tree, settings, x_TD)
  cache = np.zeros((0, c_TC.shape[1])), np.zeros((0, k_rope_TR.shape[1]))
  for t, x_D in enumerate(x_TD):
    out_D, cache = mla.mla_absorbed_step(
      x_D,
      tree,
      *cache,
      t,
      settings.freqs,
      settings.scale,
      settings.latent_eps,
      settings.rope_factor,
    )
    np.testing.assert_allclose(out_D, expected_TD[t], rtol=0, atol=cases.EXACT)
  np.testing.assert_allclose(cache[0], c_TC, rtol=0, atol=cases.EXACT)
  np.testing.assert_allclose(cache[1], k_rope_TR, rtol=0, atol=cases.EXACT)


def test_attention_is_causal_and_stays_in_its_segment():
  tree, settings, x_TD = attention_case()
  before_TD, _ = naive(tree, settings, x_TD)
  changed_TD = x_TD.copy()
  changed_TD[3] += 1.0
  after_TD, _ = naive(tree, settings, changed_TD)
  np.testing.assert_array_equal(after_TD[:3], before_TD[:3])
  assert np.all(np.abs(after_TD[3:] - before_TD[3:]).max(axis=1) > 1e-6)
  segments_T = [4, 4, 4, 4, 9, 9]
  packed_TD, _ = naive(tree, settings, x_TD, None, segments_T)
  np.testing.assert_array_equal(packed_TD[:4], before_TD[:4])
  alone_TD, _ = naive(tree, settings, x_TD[4:], np.array([4, 5]))
  np.testing.assert_allclose(packed_TD[4:], alone_TD, rtol=cases.EXACT)


def test_attention_ignores_a_common_shift_of_positions():
  tree, settings, x_TD = attention_case()
  here_TD, _ = naive(tree, settings, x_TD)
  there_TD, _ = naive(tree, settings, x_TD, np.arange(6) + 1000)
  np.testing.assert_allclose(there_TD, here_TD, rtol=1e-9, atol=1e-10)
  reversed_TD, _ = naive(tree, settings, x_TD, np.arange(6)[::-1])
  assert np.abs(reversed_TD - here_TD).max() > 1e-4


def test_scaling_one_token_leaves_latent_but_not_rope_key():
  tree, settings, x_TD = attention_case()
  _, (c_TC, k_rope_TR) = naive(tree, settings, x_TD)
  _, (c2_TC, k2_rope_TR) = naive(tree, settings, 2.0 * x_TD)
  np.testing.assert_allclose(c2_TC, c_TC, rtol=1e-5)  # eps is not scaled
  np.testing.assert_allclose(k2_rope_TR, 2.0 * k_rope_TR, rtol=cases.EXACT)
