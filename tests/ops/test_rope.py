"""Rotary positions: published constants, oracle, and what rotations keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, config_rules
from dsv3_jax.ops import rope
from experiments import v3_16b, v3_671b
from tests import settings, tolerances
from tests.oracles import model as oracle_model
from tests.oracles import rope as oracle

LENGTHS = (4096, 4097, 163840)


def published(experiment, max_seq_len):
  """A published model run up to `max_seq_len`."""
  source = experiment.get_config()
  with source.unlocked():
    source.model.max_seq_len = max_seq_len
  return config.from_config_dict(source).model


def oracle_frequencies(cfg):
  return oracle_model.settings_of(cfg).freqs


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize(
  ('experiment', 'extended'), [(v3_671b, 0.1352338), (v3_16b, 0.1147214)]
)
def test_softmax_scale_is_the_published_one(experiment, extended, length):
  cfg = published(experiment, length)
  want = 0.0721688 if length == 4096 else extended
  assert rope.softmax_scale(cfg) == pytest.approx(want, abs=5e-8)
  assert rope.rotation_factor(cfg) == 1.0
  oracle_settings = oracle_model.settings_of(cfg)
  assert rope.softmax_scale(cfg) == pytest.approx(oracle_settings.scale)


@pytest.mark.parametrize('length', LENGTHS)
def test_frequencies_of_the_671b_model(length):
  cfg = published(v3_671b, length)
  got = rope.frequencies(cfg)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, oracle_frequencies(cfg), rtol=1e-14)
  plain = oracle.frequencies(64, 10000.0)
  if length == 4096:
    np.testing.assert_allclose(got, plain, rtol=1e-14)
  else:  # pairs up to 10 keep their speed, from 23 on they are 40 times slower
    np.testing.assert_allclose(got[:11], plain[:11], rtol=1e-14)
    np.testing.assert_allclose(got[23:], plain[23:] / 40.0, rtol=1e-14)
    between = got[11:23] / plain[11:23]
    assert np.all((between < 1.0) & (between > 1.0 / 40.0))
    assert np.all(np.diff(between) < 0.0)


@pytest.mark.parametrize('dim', [2, 4, 6, 64])
@pytest.mark.parametrize('original', [8, 64, 4096])
def test_yarn_frequencies_match_the_oracle_at_any_size(dim, original):
  cfg = settings.small(
    model__mla__qk_rope_head_dim=dim,
    model__rope__original_seq_len=original,
    model__max_seq_len=2 * original,
  ).model
  want = oracle_frequencies(cfg)
  np.testing.assert_allclose(rope.frequencies(cfg), want, rtol=1e-14)


def test_unequal_mscales_change_the_rotated_part_only():
  cfg = settings.small(
    model__max_seq_len=17,
    model__rope__mscale=1.0,
    model__rope__mscale_all_dim=0.707,
  ).model
  want = oracle_model.settings_of(cfg)
  assert rope.softmax_scale(cfg) == pytest.approx(want.scale)
  assert rope.rotation_factor(cfg) == pytest.approx(want.rope_factor)
  assert want.rope_factor > 1.0
  cos, sin = rope.tables(cfg, jnp.array([[5]]))
  tolerances.assert_close(
    cos**2 + sin**2, np.full((1, 1, 3), want.rope_factor**2)
  )


@pytest.mark.parametrize('max_seq_len', [16, 640])
@pytest.mark.parametrize('heads', [(), (2,)])
def test_rotate_matches_the_oracle(max_seq_len, heads):
  cfg = settings.small(model__max_seq_len=max_seq_len).model
  rng = np.random.default_rng(0)
  positions_BT = rng.integers(0, max_seq_len, (2, 5))
  x = rng.normal(size=(2, 5, *heads, 6))
  got = rope.rotate(jnp.float32(x), *rope.tables(cfg, jnp.array(positions_BT)))
  want = oracle.rotate_interleaved(x, positions_BT, oracle_frequencies(cfg))
  np.testing.assert_allclose(got, want, rtol=0.0, atol=1e-6)
  assert got.dtype == jnp.float32


@pytest.mark.parametrize('experiment', [v3_671b, v3_16b])
def test_angles_are_exact_at_128k_and_beyond(experiment):
  """cos and sin of every 37th position up to 163,840, and of the largest.

  The bars are the roundings of f32: two of an angle below pi (2.4e-7) and one
  of the result; a frequency of 44 bits adds 2e-7 at the largest position.
  """
  cfg = published(experiment, 163840)
  ends = [131071, 163839, config_rules.MAX_POSITIONS - 1]
  positions_T = np.concatenate([np.arange(0, 163840, 37), ends])
  got = jax.jit(rope.tables, static_argnums=0)(cfg, positions_T[None])
  angles_Tr = positions_T[:, None] * oracle_frequencies(cfg)
  for table, function in zip(got, (np.cos, np.sin), strict=True):
    assert table.dtype == jnp.float32
    difference_Tr = np.abs(table[0] - function(angles_Tr))
    assert np.max(difference_Tr[:-1]) < 4e-7, np.max(difference_Tr[:-1])
    assert np.max(difference_Tr[-1]) < 6e-7, np.max(difference_Tr[-1])


def test_neighbours_are_rotated_as_one_pair():
  cfg = settings.small(model__mla__qk_rope_head_dim=4).model
  tables = rope.tables(cfg, jnp.array([[3]]))
  got = rope.rotate(jnp.array([[[1.0, 0.0, 0.0, 0.0]]]), *tables)[0, 0]
  np.testing.assert_allclose(got, [np.cos(3), np.sin(3), 0, 0], atol=1e-6)
  got = rope.rotate(jnp.array([[[0.0, 0.0, 0.0, 1.0]]]), *tables)[0, 0]
  angle = 3 * 10000.0**-0.5
  np.testing.assert_allclose(
    got, [0, 0, -np.sin(angle), np.cos(angle)], atol=1e-6
  )


def test_rotation_keeps_norms_and_position_0_keeps_everything():
  cfg = settings.small().model
  x = jnp.float32(np.random.default_rng(1).normal(size=(1, 16, 3, 6)))
  turned = rope.rotate(x, *rope.tables(cfg, jnp.arange(16)[None]))
  norms = lambda y: np.linalg.norm(y, axis=-1)
  tolerances.assert_close(norms(turned), norms(x))
  np.testing.assert_array_equal(turned[:, 0], x[:, 0])
  assert np.all(np.abs(turned[:, 1:] - x[:, 1:]).max(axis=-1) > 1e-3)


@pytest.mark.parametrize('max_seq_len', [16, 640])
def test_scores_depend_on_relative_positions_only(max_seq_len):
  cfg = settings.small(model__max_seq_len=max_seq_len).model
  rng = np.random.default_rng(2)
  q, k = (jnp.float32(rng.normal(size=(1, 1, 6))) for _ in range(2))

  def score(query_at, key_at):
    at = lambda x, p: rope.rotate(x, *rope.tables(cfg, jnp.array([[p]])))
    return float(jnp.sum(at(q, query_at) * at(k, key_at)))

  for distance in (0, 1, 7):
    scores = [score(start + distance, start) for start in (0, 1, 8)]
    np.testing.assert_allclose(scores, scores[0], rtol=0.0, atol=1e-5)
  assert abs(score(7, 0) - score(0, 7)) > 1e-2  # the order matters


def test_rotate_computes_in_f32_and_keeps_bf16():
  cfg = settings.small().model
  tables = rope.tables(cfg, jnp.arange(5)[None])
  x = jnp.bfloat16(np.random.default_rng(3).normal(size=(1, 5, 6)))
  got = rope.rotate(x, *tables)
  assert got.dtype == jnp.bfloat16
  want = rope.rotate(x.astype(jnp.float32), *tables).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.float32(got), np.float32(want))
