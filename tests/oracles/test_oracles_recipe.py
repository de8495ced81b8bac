"""Optimizer, schedules and counts against the report's own figures."""

import math

import numpy as np
import pytest

from . import cases, optim, params, weights

RECIPE = {
  'peak': 2.2e-4,
  'warmup_steps': 2000,
  'constant_tokens': 10_000 * 10**9,
  'decay_tokens': 4_300 * 10**9,
  'decay_lr': 2.2e-5,
  'hold_tokens': 333 * 10**9,
  'final_lr': 7.3e-6,
}


@pytest.mark.parametrize(
  ('step', 'tokens', 'expected'),
  [
    (0, 0, 0.0),
    (1000, 10**10, 1.1e-4),
    (2000, 28 * 10**9, 2.2e-4),
    (10**5, 9_999 * 10**9, 2.2e-4),
    (10**5, 11_075 * 10**9, 2.2e-5 + 1.98e-4 * (0.5 + 0.125**0.5)),
    (10**5, 12_150 * 10**9, 1.21e-4),
    (10**5, 14_300 * 10**9, 2.2e-5),
    (10**5, 14_632 * 10**9, 2.2e-5),
    (10**5, 14_633 * 10**9, 7.3e-6),
    (10**5, 14_800 * 10**9, 7.3e-6),
  ],
)
def test_learning_rate_of_the_report(step, tokens, expected):
  lr = optim.learning_rate(step, tokens, **RECIPE)
  assert lr == pytest.approx(expected, rel=1e-10, abs=1e-20)


def ramp(microbatch_size):
  """Tokens after every step until the full batch is reached."""
  tokens, trace, last = 0, [], 0
  while tokens < 469 * 10**9:
    size = optim.batch_size(tokens, 3072, 15360, 469 * 10**9, microbatch_size)
    assert last <= size <= 15360 and size % microbatch_size == 0
    tokens, last = tokens + size * 4096, size
    trace.append(tokens)
  args = tokens, 3072, 15360, 469 * 10**9, microbatch_size
  assert optim.batch_size(*args) == 15360
  return trace


def test_whole_run_takes_about_243_thousand_steps():
  trace = ramp(1)
  rest = (14_800 * 10**9 - trace[-1]) / (15360 * 4096)
  assert round(len(trace) / 1000, 1) == 15.0
  assert round(rest / 1000, 1) == 227.8
  assert round(trace[1999] / 1e9) == 28  # what the warm-up sees


def test_rounding_down_to_micro_batches_costs_about_one_percent():
  fine, coarse = len(ramp(1)), len(ramp(128))
  assert 1.0 < coarse / fine < 1.015


def test_step_schedules_change_at_their_token():
  first = optim.step_schedule(10**13 - 1, 0.3, 10**13, 0.1)
  assert (first, optim.step_schedule(10**13, 0.3, 10**13, 0.1)) == (0.3, 0.1)


def adamw_run(grads, decayed, decay=0.1):
  tree = {'w': np.array([1.0, -2.0])}
  mean = square = {'w': np.zeros(2)}
  for count, grad in enumerate(grads, start=1):
    tree, mean, square = optim.adamw_step(
      tree,
      {'w': np.asarray(grad)},
      mean,
      square,
      count,
      0.01,
      0.9,
      0.95,
      1e-8,
      decay,
      {'w': decayed},
    )
  return tree['w']


def test_adamw_steps_by_lr_under_a_constant_gradient():
  moved = adamw_run([[3.0, -0.5]] * 4, False)
  np.testing.assert_allclose(moved, [1.0 - 0.04, -2.0 + 0.04], rtol=1e-7)
  decayed = adamw_run([[0.0, 0.0]] * 3, True)
  np.testing.assert_allclose(
    decayed, [0.999**3, -2 * 0.999**3], rtol=cases.EXACT
  )


def test_adamw_second_step_by_hand():
  grads = [[1.0, 0.0], [2.0, 0.0]]
  m_hat = (0.9 * 0.1 + 0.1 * 2.0) / (1 - 0.81)
  v_hat = (0.95 * 0.05 + 0.05 * 4.0) / (1 - 0.95**2)
  first = 1.0 - 0.01 * (1.0 / (1.0 + 1e-8) + 0.1)
  second = first - 0.01 * (m_hat / (math.sqrt(v_hat) + 1e-8) + 0.1 * first)
  assert adamw_run(grads, True)[0] == pytest.approx(second, rel=cases.EXACT)


def test_clip_works_on_the_norm_of_all_leaves():
  grads = {'a': np.array([3.0]), 'b': np.array([[0.0], [4.0]])}
  clipped, norm = optim.clip_by_global_norm(grads, 1.0)
  assert norm == 5.0 and optim.global_norm(clipped) == pytest.approx(1.0)
  np.testing.assert_allclose(clipped['b'], [[0.0], [0.8]], rtol=cases.EXACT)
  same, _ = optim.clip_by_global_norm(grads, 10.0)
  np.testing.assert_array_equal(same['a'], grads['a'])


def test_ema_of_a_constant_approaches_it_geometrically():
  average = {'w': np.array([0.0])}
  for _ in range(5):
    average = optim.ema(average, {'w': np.array([2.0])}, 0.9)
  np.testing.assert_allclose(average['w'], 2 * (1 - 0.9**5), rtol=cases.EXACT)


@pytest.mark.parametrize(
  ('config', 'main', 'active', 'without', 'layer', 'expert', 'ffn', 'table'),
  [
    (
      cases.V3,
      671_026_419_200,
      37_552_282_624,
      36_625_603_584,
      187_107_328,
      44_040_192,
      11_320_164_608,
      926_679_040,
    ),
    (
      cases.V2,
      235_741_434_880,
      21_375_800_320,
      20_851_512_320,
      149_227_520,
      23_592_960,
      3_822_878_720,
      524_288_000,
    ),
    (
      cases.LITE,
      15_706_484_224,
      2_661_150_208,
      2_451_435_008,
      13_763_072,
      8_650_752,
      571_080_704,
      209_715_200,
    ),
  ],
  ids=['671B', '236B', '16B'],
)
def test_published_counts(
  config, main, active, without, layer, expert, ffn, table
):
  got = params.counts(config)
  assert got['main'] == main
  assert got['active'] == active
  assert got['active_without_embedding'] == without
  assert params.attention(config) == layer
  assert params.expert(config) == expert
  assert params.moe_ffn(config) == ffn
  assert params.embedding(config) == table


def test_mtp_counts():
  got = params.counts(cases.V3)
  assert got['mtp_stored'] == 13_463_426_304
  assert got['mtp_unique'] == 11_610_068_224
  assert got['router_bias'] == 58 * 256
  assert got['main'] + got['mtp_stored'] == pytest.approx(684.49e9, rel=1e-5)


@pytest.mark.parametrize(
  ('config', 'expected'),
  [(cases.V3, 70_272), (cases.V2, 69_120), (cases.LITE, 31_104)],
)
def test_cache_bytes(config, expected):
  assert params.kv_bytes_per_token(config, 2) == expected
  with_mtp = params.kv_bytes_per_token(config, 2, with_mtp=True)
  assert with_mtp == (71_424 if config is cases.V3 else expected)


@pytest.mark.parametrize(
  ('config', 'kind', 'gigaflops'),
  [
    (cases.V3, 'causal', 250.5),
    (cases.V3, 'non_causal', 281.2),
    (cases.V3, 'mtp', 10.2),
    (cases.V2, 'causal', 155.3),
    (cases.LITE, 'causal', 16.4),
  ],
)
def test_training_flops(config, kind, gigaflops):
  got = params.flops_per_token(config, 4096)[kind] / 1e9
  assert round(got, 1) == gigaflops


def test_counts_equal_the_arrays_of_a_real_tree():
  config = cases.small()

  def size(tree):
    if isinstance(tree, dict):
      return sum(size(value) for value in tree.values())
    if isinstance(tree, list):
      return sum(size(value) for value in tree)
    return 0 if tree is None else tree.size

  tree = weights.random_weights(config, seed=12)
  got = params.counts(config)
  assert size(tree['mtp']) == got['mtp_unique']
  assert size(tree) - size(tree['mtp']) == got['main']
