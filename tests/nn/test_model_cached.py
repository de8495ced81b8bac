"""Decoding through the latent cache gives the logits of the full forward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.nn import latent_cache, model
from experiments import v3_671b
from pallas_kernels.mla_decode import api as mla_decode
from tests import reference, settings, tolerances
from tests.nn import models
from tests.oracles import fp8
from tests.oracles import model as oracle

SIZE = mla_decode.PAGE
LENGTH, SPACE = SIZE + 6, 2 * SIZE
TABLE_Bb = np.array([[4, 0], [1, 5], [3, 2]])  # blocks in any order
CASES = {
  'scanned': {},
  'unrolled_yarn_no_dense': {
    'model__scan_layers': False,
    'model__rope__original_seq_len': 8,
    'model__num_dense_layers': 0,
    'model__mla__q_lora_rank': 0,
  },
}


def setup(name, **changes):
  long = {'model__max_seq_len': SPACE, 'model__rope__original_seq_len': SPACE}
  cfg = settings.small(**(long | CASES[name] | changes))
  params, router_biases = map(models.f32, models.random_params(cfg))
  rng = np.random.default_rng(3)
  tokens_BT = jnp.array(rng.integers(0, cfg.model.vocab_size, (3, LENGTH)))
  return cfg, params, router_biases, tokens_BT


def empty(cfg, fp8=False):
  def stack(count):
    args = (cfg.model, count, 6, SIZE, model.compute_dtype(cfg))
    return latent_cache.empty_cache(*args, fp8=fp8)

  counts = (cfg.model.num_dense_layers, cfg.model.num_moe_layers)
  return model.Caches(*map(stack, counts))


@functools.cache
def step(cfg, absorbed, implementation='auto'):
  net = model.build(cfg, absorbed=absorbed)
  fields = {'implementation': implementation}
  net = net.clone(policy=dataclasses.replace(net.policy, **fields))

  def run(params, tokens_BT, index_BT, last_B, *args):
    args = (tokens_BT, index_BT, last_B[:, None], *args)
    outputs = net.apply({'params': params}, *args, method='forward_cached')
    return outputs[0][:, 0], outputs[2]

  return jax.jit(run)


def full_logits(cfg, params, router_biases, tokens_BT):
  positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape)
  ones = jnp.ones_like(tokens_BT)
  batch = model.Batch(
    tokens_BT, tokens_BT, positions_BT, ones, ones.astype(jnp.float32)
  )
  return models.logits(cfg)(params, router_biases, batch)[0]


def assert_rows_match(logits_BV, full_BTV, last_B, dtype='float32'):
  want_BV = full_BTV[jnp.arange(len(last_B)), jnp.asarray(last_B)]
  tolerances.assert_close(logits_BV, want_BV, dtype)


@pytest.mark.parametrize(
  ('name', 'prefill_absorbed'),
  [
    pytest.param(name, absorbed, marks=[pytest.mark.nightly] * (i and absorbed))
    for i, name in enumerate(CASES)
    for absorbed in (False, True)
  ],
)
def test_prefill_then_token_by_token(name, prefill_absorbed):
  cfg, params, router_biases, tokens_BT = setup(name)
  full_BTV = full_logits(cfg, params, router_biases, tokens_BT)
  most = SIZE + 1
  lengths_B = np.array([2, most, SIZE - 2])  # prompts, padded on the right
  index_BT = jnp.broadcast_to(jnp.arange(most), (3, most))
  args = (
    tokens_BT[:, :most],
    index_BT,
    jnp.array(lengths_B - 1),
    TABLE_Bb,
    router_biases,
  )
  prefill = step(cfg, prefill_absorbed)
  logits_BV, caches = prefill(params, *args, empty(cfg))
  assert_rows_match(logits_BV, full_BTV, lengths_B - 1)
  zeros_B = jnp.zeros(3, jnp.int32)
  for at_B in (lengths_B + i for i in range(LENGTH - most)):
    token_B1 = tokens_BT[jnp.arange(3), at_B][:, None]
    args = (
      token_B1,
      jnp.array(at_B)[:, None],
      zeros_B,
      TABLE_Bb,
      router_biases,
      caches,
    )
    logits_BV, caches = step(cfg, True)(params, *args)
    assert_rows_match(logits_BV, full_BTV, at_B)


@pytest.mark.parametrize(
  'prefill_absorbed', [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_all_queries_see_latents_rounded_to_fp8(prefill_absorbed):
  # Two scales a token, the second of 32 values.
  cfg, _, _, tokens_BT = setup('scanned', model__mla__kv_lora_rank=160)
  params, router_biases = models.random_params(cfg)
  row_T = np.asarray(tokens_BT[0, :9])
  weights = reference.weights_of(params, router_biases, cfg)
  exact = oracle.settings_of(cfg.model)

  def rounded(c_TC):
    tile = (1, 128)
    return fp8.dequantize_blocks(*fp8.quantize_blocks(c_TC, tile), tile)

  want_TV = oracle.forward(
    weights, row_T, dataclasses.replace(exact, kept=rounded)
  )[0]
  params, router_biases = models.f32(params), models.f32(router_biases)
  caches, start, got = empty(cfg, fp8=True), 0, []
  for count in (5, 1, 2, 1):
    index_BT = jnp.arange(start, start + count)[None]
    piece_BT, last_B = jnp.asarray(row_T)[index_BT], jnp.array([count - 1])
    args = (piece_BT, index_BT, last_B, TABLE_Bb[:1], router_biases, caches)
    forward = step(cfg, prefill_absorbed or start > 0)
    logits_BV, caches = forward(params, *args)
    start += count
    got.append(logits_BV[0])
  tolerances.assert_close(got, want_TV[[4, 5, 7, 8]])
  other_TV = oracle.forward(weights, row_T, exact)[0]
  apart = np.max(np.abs(want_TV - other_TV)) / np.max(np.abs(want_TV))
  assert 1e-3 < apart < 0.1  # what rounding does is seen, and small


def test_an_fp8_token_of_v3_has_656_bytes():
  cfg = config.from_config_dict(v3_671b.get_config())
  layers, args = 61, (3, SIZE, jnp.bfloat16)
  shapes = jax.eval_shape(
    lambda: latent_cache.empty_cache(cfg.model, layers, *args, fp8=True)
  )
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  assert size == 656 * layers * 3 * SIZE


def test_several_tokens_at_once_onto_a_cache():
  # As for verifying: three new tokens see the cache and one another.
  cfg, params, router_biases, tokens_BT = setup('scanned')
  full_BTV = full_logits(cfg, params, router_biases, tokens_BT)
  index_BT = jnp.broadcast_to(jnp.arange(SIZE - 3), (3, SIZE - 3))
  args = (tokens_BT[:, : SIZE - 3], index_BT, jnp.zeros(3, jnp.int32))
  _, caches = step(cfg, True)(
    params, *args, TABLE_Bb, router_biases, empty(cfg)
  )
  for start in range(SIZE - 3, LENGTH, 3):
    index_BT = jnp.broadcast_to(jnp.arange(start, start + 3), (3, 3))
    for last in range(3):
      piece_BT = tokens_BT[:, start : start + 3]
      args = (
        piece_BT,
        index_BT,
        jnp.full(3, last),
        TABLE_Bb,
        router_biases,
        caches,
      )
      logits_BV, written = step(cfg, True)(params, *args)
      assert_rows_match(logits_BV, full_BTV, np.full(3, start + last))
    caches = written


def test_what_lies_behind_in_the_cache_is_not_seen():
  cfg, params, router_biases, tokens_BT = setup('scanned')
  index_BT = jnp.broadcast_to(jnp.arange(4), (3, 4))
  last_B = jnp.full(3, 3)
  args = (tokens_BT[:, :4], index_BT, last_B, TABLE_Bb, router_biases)
  _, caches = step(cfg, False)(params, *args, empty(cfg))
  first, second = TABLE_Bb.T
  soil = lambda c: c.at[:, first, 5:].set(1e4).at[:, second].set(1e4)
  dirty = jax.tree.map(soil, caches)
  args = (tokens_BT[:, 4:5], jnp.full((3, 1), 4), jnp.zeros(3, jnp.int32))
  clean_BV, _ = step(cfg, True)(params, *args, TABLE_Bb, router_biases, caches)
  dirty_BV, _ = step(cfg, True)(params, *args, TABLE_Bb, router_biases, dirty)
  np.testing.assert_array_equal(dirty_BV, clean_BV)


def test_the_cache_holds_c_plus_r_values_and_drops_what_is_past_its_end():
  cfg, params, router_biases, tokens_BT = setup('scanned')
  caches = empty(cfg)
  widths = [leaf.shape[-1] for leaf in jax.tree.leaves(caches.moe)]
  assert sum(widths) == cfg.model.mla.cache_width == 14
  index_BT = jnp.broadcast_to(jnp.arange(SPACE - 1, SPACE + 2), (3, 3))
  args = (tokens_BT[:, :3], index_BT, jnp.zeros(3, jnp.int32))
  args += (TABLE_Bb, router_biases, caches)
  _, written = step(cfg, False)(params, *args)
  for leaf in jax.tree.leaves(written):
    changed_ps = np.any(np.asarray(leaf), axis=(0, 3))
    want = sorted([block, SIZE - 1] for block in TABLE_Bb[:, 1].tolist())
    assert np.argwhere(changed_ps).tolist() == want


def test_tokens_of_no_row_write_nothing():
  cfg, params, router_biases, tokens_BT = setup('scanned')
  index_BT = jnp.array([[0, 1], [-1, -1], [0, -1]])
  args = (tokens_BT[:, :2], index_BT, jnp.zeros(3, jnp.int32))
  _, written = step(cfg, True)(
    params, *args, TABLE_Bb, router_biases, empty(cfg)
  )
  for leaf in jax.tree.leaves(written):
    changed = np.argwhere(np.any(np.asarray(leaf), axis=(0, 3))).tolist()
    assert changed == [[3, 0], [4, 0], [4, 1]]


def test_bf16_cache_stays_near_the_bf16_forward():
  cfg, params, router_biases, tokens_BT = setup('scanned', precision='bf16')
  full_BTV = full_logits(cfg, params, router_biases, tokens_BT)
  index_BT = jnp.broadcast_to(jnp.arange(LENGTH), (3, LENGTH))
  last_B = jnp.full(3, LENGTH - 1)
  args = (tokens_BT, index_BT, last_B, TABLE_Bb, router_biases, empty(cfg))
  logits_BV, caches = step(cfg, False)(params, *args)
  assert {c.dtype for c in jax.tree.leaves(caches)} == {jnp.dtype('bfloat16')}
  assert_rows_match(logits_BV, full_BTV, [LENGTH - 1] * 3, 'bfloat16')


def test_the_decode_kernel_gives_the_same():
  """Interpreted: a prompt of two blocks, then a token and a speculative one."""
  cfg, params, router_biases, tokens_BT = setup('scanned')
  full_BTV = full_logits(cfg, params, router_biases, tokens_BT)
  run, caches = step(cfg, True, 'pallas_interpret'), empty(cfg)
  for start, end in ((0, SIZE + 2), (SIZE + 2, SIZE + 4)):
    shape = (3, end - start)
    index_BT = jnp.broadcast_to(jnp.arange(start, end), shape)
    last_B = jnp.full(3, end - start - 1)
    args = (
      tokens_BT[:, start:end],
      index_BT,
      last_B,
      TABLE_Bb,
      router_biases,
      caches,
    )
    logits_BV, caches = run(params, *args)
    assert_rows_match(logits_BV, full_BTV, np.full(3, end - 1))
  plain = jax.jit(step(cfg, True)).lower(params, *args).as_text()
  assert jax.jit(run).lower(params, *args).as_text() != plain
