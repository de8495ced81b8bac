"""Latent attention: oracle, absorbed form, gradients, and who sees whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import attention, mla, rope
from pallas_kernels.mla_decode import api as mla_decode
from tests import gradients, settings, tolerances
from tests.oracles import mla as oracle
from tests.oracles import model as oracle_model
from tests.oracles import weights as oracle_weights

CFG = settings.small(model__max_seq_len=640).model  # with YaRN
SETTINGS = oracle_model.settings_of(CFG)
WEIGHTS = oracle_weights.random_weights(CFG, 0, std=0.4)['layers'][0]['mla']
FORMS = ('naive', 'absorbed')
# A cache has one sample a row.
ISOLATED = pytest.mark.parametrize(
  ('form', 'isolated'), [('naive', False), ('naive', True), ('absorbed', False)]
)


@functools.partial(jax.jit, static_argnames='form')
def forward(x_BTD, weights, positions_BT, segments_BT=None, form='naive'):
  """The attention layer in terms of the ops; the query is projected plainly."""
  cos, sin = rope.tables(CFG, positions_BT)
  w = weights
  y_BTY = x_BTD @ w['w_dkv_DY']
  latents = mla.compress(y_BTY, w['kv_norm_C'], cos, sin, 1e-6)
  q_BTNX = jnp.einsum('btd,dnx->btnx', x_BTD, w['w_q_DNX'])
  parts = (*mla.split_query(q_BTNX, cos, sin), latents)
  parts += (w['w_uk_CNH'], w['w_uv_CNU'])
  scale = rope.softmax_scale(CFG)
  if form == 'naive':
    up = lambda w: jnp.einsum('bsc,cnh->bsnh', latents.c_BSC, w)
    k_nope, v = up(w['w_uk_CNH']), up(w['w_uv_CNU'])
    q_BTNX = jnp.concatenate(parts[:2], axis=-1)
    keys = (k_nope, latents.k_rope_BSR, v)
    o_BTNU, _ = attention.causal(q_BTNX, *keys, segments_BT, scale)
  else:
    assert segments_BT is None
    lengths_B = jnp.full(len(x_BTD), x_BTD.shape[1], jnp.int32)
    paged = (*parts[:2], *pages_of(latents), lengths_B, *parts[3:], scale)
    o_BTNU = mla.attend_absorbed(*paged)
  return jnp.einsum('btnu,nud->btd', o_BTNU, w['w_o_NUD'])


def pages_of(latents):
  """Rows' latents as pages, and their block table."""
  batch, length = latents.c_BSC.shape[:2]
  count = -(-length // mla_decode.PAGE)
  pad = ((0, 0), (0, count * mla_decode.PAGE - length), (0, 0))
  to_pages = lambda x: jnp.pad(x, pad).reshape(-1, mla_decode.PAGE, x.shape[-1])
  table_Bb = jnp.arange(batch * count, dtype=jnp.int32).reshape(batch, count)
  return mla_decode.LatentPages(*map(to_pages, latents)), table_Bb


def oracle_forward(x_BTD, weights, positions_BT, segments_BT=None):
  rows = []
  for b, x_TD in enumerate(x_BTD):
    segments_T = None if segments_BT is None else segments_BT[b]
    args = (x_TD, weights, positions_BT[b], segments_T)
    args += (SETTINGS.freqs, SETTINGS.scale, CFG.latent_norm_eps)
    rows.append(oracle.mla_naive(*args)[0])
  return np.stack(rows)


def plain_weights(seed=0):
  """Attention weights without a query latent."""
  rng = np.random.default_rng(seed)
  names = ('w_dkv_DY', 'kv_norm_C', 'w_uk_CNH', 'w_uv_CNU', 'w_o_NUD')
  weights = {name: WEIGHTS[name] for name in names}
  heads = (CFG.mla.num_heads, CFG.mla.qk_head_dim)
  return weights | {'w_q_DNX': 0.4 * rng.normal(size=(CFG.d_model, *heads))}


def tokens(batch, length, seed=1):
  rng = np.random.default_rng(seed)
  x_BTD = rng.normal(size=(batch, length, CFG.d_model))
  positions_BT = np.tile(np.arange(length), (batch, 1))
  return x_BTD, positions_BT


def f32(tree):
  return jax.tree.map(jnp.float32, tree)


@ISOLATED
def test_both_forms_match_the_oracle(form, isolated):
  x_BTD, positions_BT = tokens(2, 9)
  positions_BT[1] = [0, 1, 2, 3, 0, 1, 2, 0, 0]  # restart with each sample
  segments_BT = None
  if isolated:
    segments_BT = np.array([[1] * 9, [1, 1, 1, 1, 2, 2, 2, 3, 0]])
  args = (plain_weights(), positions_BT, segments_BT)
  got = forward(f32(x_BTD), f32(args[0]), *args[1:], form=form)
  tolerances.assert_close(got, oracle_forward(x_BTD, *args))


@pytest.mark.parametrize('length', [1, 2, 127, 128, 129, 300])
def test_absorbed_equals_naive_around_the_query_block(length):
  x_BTD, positions_BT = tokens(1, length)
  args = (f32(x_BTD), f32(plain_weights()), positions_BT)
  naive, absorbed = (forward(*args, form=form) for form in FORMS)
  tolerances.assert_close(naive, absorbed)


def test_a_second_query_block_matches_the_oracle():
  x_BTD, positions_BT = tokens(1, 131)
  segments_BT = np.array([[1] * 120 + [2] * 11])
  args = (plain_weights(), positions_BT, segments_BT)
  got = forward(f32(x_BTD), f32(args[0]), *args[1:])
  tolerances.assert_close(got, oracle_forward(x_BTD, *args))


@ISOLATED
def test_gradients_match_the_oracle(form, isolated):
  x_BTD, positions_BT = tokens(1, 6)
  segments_BT = np.array([[1, 1, 1, 2, 2, 2]]) if isolated else None
  dy = np.random.default_rng(2).normal(size=x_BTD.shape)
  values = {'x': x_BTD, 'weights': plain_weights()}

  def loss(v):
    y = forward(v['x'], v['weights'], positions_BT, segments_BT, form=form)
    return jnp.sum(y * dy)

  def oracle_loss(v):
    args = (v['weights'], positions_BT, segments_BT)
    return np.sum(oracle_forward(v['x'], *args) * dy)

  gradients.assert_matches(jax.grad(loss)(f32(values)), oracle_loss, values)


def test_gradients_of_both_forms_agree_across_query_blocks():
  x_BTD, positions_BT = tokens(1, 150)
  dy = np.random.default_rng(3).normal(size=x_BTD.shape)

  def loss(x, weights, form):
    return jnp.sum(forward(x, weights, positions_BT, form=form) * dy)

  args = (f32(x_BTD), f32(plain_weights()))
  naive, absorbed = (
    jax.grad(loss, argnums=(0, 1))(*args, form) for form in FORMS
  )
  tolerances.assert_close(naive[0], absorbed[0])
  tolerances.assert_trees_close(naive[1], absorbed[1])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('query', [0, 127, 128, 129])
def test_no_gradient_from_a_query_to_later_tokens(form, query):
  x_BTD, positions_BT = tokens(1, 131)
  weights = f32(plain_weights())
  output = lambda x: jnp.sum(
    forward(x, weights, positions_BT, form=form)[:, query]
  )
  reached_T = np.any(np.asarray(jax.grad(output)(f32(x_BTD))), axis=(0, 2))
  np.testing.assert_array_equal(reached_T, np.arange(131) <= query)


def test_no_gradient_across_segments():
  x_BTD, positions_BT = tokens(1, 132)
  segments_BT = np.array([[1] * 3 + [2] * 127 + [0] * 2])
  weights = f32(plain_weights())
  for query, seen in ((2, range(3)), (129, range(3, 130)), (131, (130, 131))):
    output = lambda x, q=query: jnp.sum(
      forward(x, weights, positions_BT, segments_BT)[:, q]
    )
    reached_T = np.any(np.asarray(jax.grad(output)(f32(x_BTD))), axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(reached_T), list(seen))


def test_a_row_without_tokens_is_zero():
  rng = np.random.default_rng(4)
  q_nope, q_rope = rng.normal(size=(2, 1, 2, 4)), rng.normal(size=(2, 1, 2, 6))
  latents = mla.Latents(
    *f32((rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 6))))
  )
  w = plain_weights()
  args = (*f32((q_nope, q_rope)), *pages_of(latents), jnp.array([3, 0]))
  args += (*f32((w['w_uk_CNH'], w['w_uv_CNU'])), 0.3)
  out_BTNU = mla.attend_absorbed(*args)
  assert np.all(np.isfinite(out_BTNU)) and np.any(out_BTNU[0])
  assert not np.any(out_BTNU[1])


def test_the_cached_key_is_rotated_but_not_normed():
  x_BTD, positions_BT = tokens(1, 4)
  w = f32(plain_weights())
  cos, sin = rope.tables(CFG, jnp.array(positions_BT))
  compress = lambda x: mla.compress(
    x @ w['w_dkv_DY'], w['kv_norm_C'], cos, sin, 1e-6
  )
  once, twice = compress(f32(x_BTD)), compress(2.0 * f32(x_BTD))
  tolerances.assert_close(twice.c_BSC, once.c_BSC)
  tolerances.assert_close(twice.k_rope_BSR, 2.0 * once.k_rope_BSR)


@pytest.mark.parametrize('form', FORMS)
def test_bf16_stays_near_f32(form):
  x_BTD, positions_BT = tokens(2, 20)
  weights = {k: v / 2 for k, v in plain_weights().items()}
  want = forward(f32(x_BTD), f32(weights), positions_BT, form=form)
  to_bf16 = lambda tree: jax.tree.map(jnp.bfloat16, tree)
  weights = to_bf16(weights) | {'kv_norm_C': f32(weights['kv_norm_C'])}
  got = forward(to_bf16(x_BTD), weights, positions_BT, form=form)
  assert got.dtype == jnp.bfloat16
  tolerances.assert_close(np.float32(got), want, 'bfloat16')
