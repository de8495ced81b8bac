"""The arithmetic of the loss gap: smoothing, gaps, spread, and its report."""

import argparse

import numpy as np
import pytest

from benchmarks import fp8_loss_gap as gap


def test_smoothing_of_a_constant_is_the_constant():
  loss_SN = np.full((2, 50), 3.0)
  np.testing.assert_allclose(gap.smoothed(loss_SN, 0.9), loss_SN)


def test_smoothing_is_the_weighted_mean_of_what_came():
  got_SN = gap.smoothed(np.array([[1.0, 2.0, 4.0]]), 0.5)
  want = [1.0, (0.5 * 1 + 1 * 2) / 1.5, (0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75]
  np.testing.assert_allclose(got_SN[0], want)


def test_a_loss_one_per_cent_higher_is_a_gap_of_one():
  base_SN = np.random.default_rng(0).uniform(2.0, 4.0, (3, 400))
  row = gap.row('arm', 1.01 * base_SN, base_SN, [1.5])
  for memory in gap.MEMORIES:
    assert row[f'ema_{memory}_largest_of_mean_percent'] == pytest.approx(1.0)
    assert row[f'ema_{memory}_steps_within_bar_percent'] == 0.0
  assert row['second_half_percent'] == pytest.approx(1.0)
  assert row['second_half_standard_error'] < 1e-6


def test_the_first_tenth_does_not_count():
  base_SN = np.full((1, 100), 2.0)
  arm_SN = base_SN.copy()
  arm_SN[:, :2] = 1e3
  row = gap.row('arm', arm_SN, base_SN, [1.5])
  assert row['from_tenth_to_half_percent'] == 0.0


def test_spread_takes_every_pair_of_seeds():
  base_SN = np.array([[1.0], [2.0], [3.0]])
  first, second = gap.between_seeds(base_SN)
  np.testing.assert_array_equal(first[:, 0], [2, 3, 3])
  np.testing.assert_array_equal(second[:, 0], [1, 1, 2])


def test_arms_differ_in_nothing_but_precision_or_the_nudge():
  args = argparse.Namespace(steps=10, set=[])
  arms = [gap.configured(arm, 1, args) for arm in gap.ARMS]
  plain = arms[0]
  assert [a.precision for a in arms] == [
    'bf16', 'fp8', 'fp8_block_dgrad', 'bf16',
  ]  # fmt: skip
  assert {a.data for a in arms} == {plain.data}
  assert {a.optim for a in arms} == {plain.optim}
  assert {a.seed for a in arms} == {1}
  assert arms[1].model == arms[2].model == plain.model
  nudged = arms[3].model.init_std / plain.model.init_std
  assert nudged == pytest.approx(gap.NUDGE)
  assert plain.model.d_model >= 512


def test_losses_are_written_a_column_a_run(tmp_path):
  losses_of = {
    'bf16': np.array([[2.0, 1.5], [3.0, 2.5]]),
    'fp8': np.ones((1, 2)),
  }
  gap.save(tmp_path / 'x.csv', losses_of)
  assert (tmp_path / 'x.csv').read_text().splitlines() == [
    'step,bf16-0,bf16-1,fp8-0',
    '1,2.00000,3.00000,1.00000',
    '2,1.50000,2.50000,1.00000',
  ]
