"""Inference on a mesh is that of one device, whatever is cut over what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import batching, layout, steps
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

CONFIG = settings.small(
  precision='f32',
  model__max_seq_len=400,
  model__rope__original_seq_len=400,
  model__num_layers=2,
  model__moe__d_ff=8,
)
F32 = 2e-6  # sums in another order, relative to the largest logit
ALL = {'data': 2, 'expert': 2, 'model': 2}
LAYOUTS = (
  {'data': 2},
  {'expert': 2},
  {'expert': 4},
  {'node': 2},
  {'model': 2},
  ALL,
)
ROWS, SIZE = 8, 16


@pytest.fixture(scope='module', autouse=True)
def quick_compile():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def weights():
  params, router = map(models.f32, models.random_params(CONFIG))
  for stack in ('dense_layers', 'moe_layers'):  # what is seen decides
    attention = params[stack]['layers']['attention']
    attention['w_uk'] *= 4.0
    attention['w_o'] *= 20.0
  return params, router


def logits(cfg, weights, mesh, length):
  """Of all tokens of rows in one pass, and of one token more; and the load."""
  place = layout.Layout(cfg, mesh)
  naive, absorbed = model.build(cfg), model.build(cfg, absorbed=True)

  def run(params, router, tokens_BT, table_Bb, caches):
    made, load_LE = [], 0
    for net, start, end in ((naive, 0, length), (absorbed, length, None)):
      part_BT = tokens_BT[:, start:end]
      at_Bt = jnp.zeros_like(part_BT) + jnp.arange(part_BT.shape[1])
      args = (part_BT, start + at_Bt, at_Bt, table_Bb, router, caches)
      found = net.apply({'params': params}, *args, method='cached')
      made.append(found[0])
      caches, load_LE = found[2], load_LE + found[3]
    return jnp.concatenate(made, axis=1), load_LE[None]

  rows = layout.ROWS
  taken = (place.params, layout.WHOLE, rows, rows, layout.PAGES)
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, cfg.model.vocab_size, (ROWS, length + 1))
  pages_b = np.arange(ROWS // place.num_ranks)[:, None]
  make = functools.partial(
    steps.empty_caches, cfg.model, ROWS, SIZE, jnp.float32, drafting=False
  )
  params, router = weights
  made_BTV, load_RLE = place.jit(run, taken, (rows, rows))(
    place.place(params, place.params),
    router,
    np.int32(tokens_BT),
    np.int32(np.tile(pages_b, (place.num_ranks, 1))),
    place.zeros(make, layout.PAGES),
  )
  return np.asarray(made_BTV), np.sum(np.asarray(load_RLE), axis=0)


@pytest.fixture(scope='module')
def one_device(weights):
  return logits(CONFIG, weights, None, 12)


@pytest.mark.parametrize('axes', LAYOUTS, ids=str)
def test_logits_are_those_of_one_device(weights, one_device, axes):
  want_BTV, want_LE = one_device
  got_BTV, load_LE = logits(CONFIG, weights, layout.make_mesh(**axes), 12)
  limit = F32 * np.max(np.abs(want_BTV))
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=0, atol=limit)
  np.testing.assert_array_equal(load_LE, want_LE)
  assert np.sum(load_LE) == ROWS * 13 * CONFIG.model.moe.top_k


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


def draw(seed):
  return batching.Draw(temperature=1.0, top_p=0.9, seed=seed)


# A prompt; how many tokens; how they are drawn.
REQUESTS = [
  (prompt(1, 5), 20, batching.Draw()),
  (prompt(2, 130), 9, draw(3)),
  (prompt(3, 1), 30, draw(4)),
  (prompt(4, 64), 5, batching.Draw()),
  (prompt(2, 130)[:100] + [1, 2], 4, batching.Draw()),
  (prompt(5, 62), 70, draw(5)),
  (prompt(6, 30), 40, batching.Draw()),
  (prompt(4, 64), 5, batching.Draw()),
]


def traffic(made, **how):
  """They come at different times; the session, and what each was told."""
  how = {'num_pages': 7, 'max_rows': 2, 'least_rows': 2} | how
  # One size of a prefill and of block tables: fewer programs to compile.
  session = batching.Session(made, **how, chunk=64, least_pages=4)
  requests = []
  for case in REQUESTS:
    requests.append(session.submit(*case))
    session.step()
  for _ in range(1000):
    if session.is_idle:
      break
    session.step()
  assert all(request.done for request in requests)
  assert all(one.pool.in_use == 0 for one in session.scheduler.each)
  return session, [request.tokens for request in requests]


@pytest.fixture(scope='module')
def expected(weights):
  made = steps.Steps(CONFIG, *weights)
  return traffic(made, num_pages=14, max_rows=4, least_rows=4)[1]


def counts(made):
  each = (made._prefill, made._extend, made._decode, made._copy)
  return [function._cache_size() for function in each]


@pytest.mark.slow
@pytest.mark.parametrize('axes', [ALL, {'node': 2, 'expert': 2}], ids=str)
def test_requests_get_the_tokens_of_one_device(weights, expected, axes):
  made = steps.Steps(CONFIG, *weights, mesh=layout.make_mesh(**axes))
  session, tokens = traffic(made)
  assert tokens == expected
  assert {r.job.rank for r in session._requests.values()} == set()
  assert sum(one.pool.available for one in session.scheduler.each) == 28
  known = counts(made)
  session, tokens = traffic(made)
  assert tokens == expected and counts(made) == known
  assert session.scheduler.num_pages == 28
