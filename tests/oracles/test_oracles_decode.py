"""The oracle of paged decoding against that of attention."""

import numpy as np
import pytest

from . import cases, decode, mla, model, weights


def paged(entries, order, pages=5):
  """[pages, 64, width] with the tokens in the pages of `order`; NaN beyond."""
  out = np.full((pages, decode.PAGE, entries.shape[1]), np.nan)
  for s, entry in enumerate(entries):
    out[order[s // decode.PAGE], s % decode.PAGE] = entry
  return out


@pytest.mark.parametrize('length', [3, 64, 70])
def test_between_its_projections_it_is_attention(length):
  """W_UK before and W_UV and W_O after give the naive output."""
  config = cases.small()
  tree = weights.random_weights(config, seed=2, std=0.5)['layers'][0]['mla']
  settings = model.settings_of(config)
  x_TD = np.random.default_rng(3).normal(size=(length, config.d_model))
  rope_args = (settings.freqs, settings.latent_eps, settings.rope_factor)
  want_TD, (c_SC, k_SR) = mla.mla_naive(
    x_TD,
    tree,
    np.arange(length),
    None,
    settings.freqs,
    settings.scale,
    settings.latent_eps,
    settings.rope_factor,
  )
  q_nope_TNH, q_rope_TNR = mla._queries(
    x_TD, tree, np.arange(length), *rope_args
  )
  q_TNC = np.einsum('tnh,cnh->tnc', q_nope_TNH, tree['w_uk_CNH'])
  q_1TNY = np.concatenate([q_TNC, q_rope_TNR], -1)[None, -3:]
  order = [4, 1]
  o_1TNC, _ = decode.decode(
    q_1TNY,
    paged(c_SC, order),
    paged(k_SR, order),
    [order],
    [length],
    settings.scale,
  )
  got_TD = np.einsum(
    'tnc,cnu,nud->td', o_1TNC[0], tree['w_uv_CNU'], tree['w_o_NUD']
  )
  np.testing.assert_allclose(got_TD, want_TD[-3:], rtol=0, atol=1e-11)


def test_a_query_that_sees_nothing():
  pages = np.full((1, decode.PAGE, 2), np.nan)
  q = np.ones((1, 2, 1, 4))
  o, lse = decode.decode(q, pages, pages, [[0]], [0], 1.0)
  assert not o.any() and np.all(np.isneginf(lse))
