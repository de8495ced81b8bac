"""Schedules at the report's scale and beyond what a float can count."""

import dataclasses
import fractions
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from dsv3_jax import config
from dsv3_jax.data import batch_ramp
from dsv3_jax.training import lr_schedule
from experiments import v3_671b
from tests.oracles import optim as oracle

RECIPE = config.from_config_dict(v3_671b.get_config())
T = 10**12  # a trillion tokens
FULL_STEP = 15360 * 4096  # tokens

lengths = st.integers(0, 2**62)  # above 2^53 a float skips numbers


@pytest.mark.parametrize(
  ('step', 'tokens', 'expected'),
  [
    (0, 0, 0.0),
    (1, 10**7, 1.1e-7),
    (1999, 28 * 10**9, 2.2e-4 * 1999 / 2000),
    (2000, 28 * 10**9, 2.2e-4),
    (10**5, 10 * T - 1, 2.2e-4),
    (10**5, 12_150 * 10**9, 1.21e-4),
    (10**5, 14_300 * 10**9, 2.2e-5),
    (10**5, 14_633 * 10**9 - 1, 2.2e-5),
    (10**5, 14_633 * 10**9, 7.3e-6),
    (10**5, 14_800 * 10**9, 7.3e-6),
  ],
)
def test_learning_rate_of_the_report(step, tokens, expected):
  lr = lr_schedule.lr_at(RECIPE.optim.lr, step, tokens)
  assert lr == pytest.approx(expected, rel=1e-12, abs=1e-20)


def ramp(cfg):
  """Sizes of all steps until the ramp ends, and the tokens seen by then."""
  tokens, sizes = 0, []
  while tokens < cfg.batch_ramp_tokens:
    sizes.append(batch_ramp.batch_size_at(cfg, tokens))
    tokens += sizes[-1] * RECIPE.data.seq_len
  return sizes, tokens


def test_the_report_s_run_takes_243_thousand_steps():
  # The ramp is linear in tokens; sequences come singly here.
  fine = dataclasses.replace(RECIPE.train, batch_size_step=1)
  sizes, tokens = ramp(fine)
  rest = (fine.total_tokens - tokens) / FULL_STEP
  assert round(len(sizes) / 1000, 1) == 15.0
  assert round(rest / 1000, 1) == 227.8
  assert round(sum(sizes[:2000]) * 4096 / 1e9) == 28  # seen by the warm-up


def test_the_report_s_ramp_in_whole_steps():
  cfg, border = RECIPE.train, 469 * 10**9
  sizes, tokens = ramp(cfg)
  assert sizes[0] == 3072 and sorted(sizes) == sizes
  assert batch_ramp.batch_size_at(cfg, border - 1) == 15360 - 256
  assert batch_ramp.batch_size_at(cfg, border) == 15360
  assert batch_ramp.batch_size_at(cfg, tokens) * 4096 == FULL_STEP == 62_914_560
  fine = dataclasses.replace(cfg, batch_size_step=1)
  assert 1.0 < len(sizes) / len(ramp(fine)[0]) < 1.025  # rounded down


@st.composite
def rates(draw):
  three = st.lists(st.floats(1e-9, 1.0), min_size=3, max_size=3)
  final, decayed, peak = sorted(draw(three))
  return config.LrConfig(
    peak=peak,
    warmup_steps=draw(st.integers(0, 5000)),
    constant_tokens=draw(lengths),
    decay_tokens=draw(lengths),
    decay_lr=decayed,
    hold_tokens=draw(lengths),
    final_lr=final,
  )


@hypothesis.given(rates(), st.integers(0, 10_000), lengths)
def test_learning_rate_is_the_oracle_s(cfg, step, tokens):
  want = oracle.learning_rate(step, tokens, **dataclasses.asdict(cfg))
  assert lr_schedule.lr_at(cfg, step, tokens) == pytest.approx(want, rel=1e-9)


@hypothesis.given(rates(), lengths, lengths)
def test_warm_up_rises_in_steps_and_ignores_tokens(cfg, a, b):
  rising = [lr_schedule.lr_at(cfg, n, a) for n in range(cfg.warmup_steps)]
  assert all(x < y <= cfg.peak for x, y in itertools.pairwise(rising))
  assert rising == [
    lr_schedule.lr_at(cfg, n, b) for n in range(cfg.warmup_steps)
  ]


@hypothesis.given(rates(), lengths, lengths)
def test_then_the_rate_falls_in_tokens_and_ignores_steps(cfg, a, b):
  early, late = sorted((a, b))
  now, then = (
    lr_schedule.lr_at(cfg, cfg.warmup_steps, x) for x in (early, late)
  )
  assert cfg.peak * (1 + 1e-12) >= now >= then * (1 - 1e-12)
  assert lr_schedule.lr_at(cfg, cfg.warmup_steps + 10**6, late) == then


@hypothesis.given(rates())
def test_the_rate_changes_at_the_very_token(cfg):
  at = lambda tokens: lr_schedule.lr_at(cfg, cfg.warmup_steps, tokens)
  cosine, held = cfg.constant_tokens, cfg.constant_tokens + cfg.decay_tokens
  last = held + cfg.hold_tokens
  if cfg.constant_tokens:
    assert at(0) == at(cosine - 1) == cfg.peak
  if cfg.decay_tokens:
    assert at(cosine) == pytest.approx(cfg.peak)
  if cfg.hold_tokens:
    assert at(held) == at(last - 1) == cfg.decay_lr
  assert at(last) == cfg.final_lr


@hypothesis.given(st.integers(1, 2**62))
def test_two_piece_schedules_change_at_the_very_token(border):
  schedule = config.StepSchedule(first=0.3, first_tokens=border, then=0.1)
  assert lr_schedule.value_at(schedule, border - 1) == 0.3
  assert lr_schedule.value_at(schedule, border) == 0.1
  for tokens in (0, border - 1, border, 2 * border):
    want = oracle.step_schedule(tokens, 0.3, border, 0.1)
    assert lr_schedule.value_at(schedule, tokens) == want


@st.composite
def ramps(draw):
  micro, start = draw(st.integers(1, 128)), draw(st.integers(1, 50))
  return dataclasses.replace(
    RECIPE.train,
    batch_size_step=micro,
    batch_size_start=start * micro,
    batch_size=(start + draw(st.integers(0, 100))) * micro,
    batch_ramp_tokens=draw(lengths),
  )


@hypothesis.given(ramps(), lengths, lengths)
def test_batches_grow_in_whole_steps(cfg, a, b):
  sizes = [batch_ramp.batch_size_at(cfg, tokens) for tokens in sorted((a, b))]
  assert cfg.batch_size_start <= sizes[0] <= sizes[1] <= cfg.batch_size
  assert not any(size % cfg.batch_size_step for size in sizes)
  line = (cfg.batch_size_start, cfg.batch_size, cfg.batch_ramp_tokens)
  want = oracle.batch_size(a, *line, cfg.batch_size_step)
  assert batch_ramp.batch_size_at(cfg, a) == want


@hypothesis.given(ramps(), st.floats(0.0, 1.0))
def test_a_batch_grows_at_the_very_token(cfg, share):
  # Where the exact line reaches a step more, and not a token before.
  grows = (cfg.batch_size - cfg.batch_size_start) // cfg.batch_size_step
  hypothesis.assume(grows and cfg.batch_ramp_tokens)
  number = 1 + int(share * (grows - 1))
  line = fractions.Fraction(cfg.batch_ramp_tokens * number, grows)
  at = -(-line.numerator // line.denominator)
  want = cfg.batch_size_start + number * cfg.batch_size_step
  assert batch_ramp.batch_size_at(cfg, at) >= want
  assert batch_ramp.batch_size_at(cfg, at - 1) < want
