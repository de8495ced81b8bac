"""Attention over `context`: the float64 oracle, who does what, and its cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.ops import attention, context_attention, mla, rope
from pallas_kernels.mla_attention import xla
from tests import gradients, tolerances
from tests.ops import test_mla as plain

Spec = jax.sharding.PartitionSpec


def over(parts, body):
  """`body` on each device of `context`, with replicated arrays in and out."""
  sizes = dict.fromkeys(sharding.AXES, 1) | {'context': parts}
  mesh = sharding.make_mesh(
    config.ParallelConfig(
      **sizes, schedule='dualpipe', fsdp=(), deterministic=False
    )
  )
  specs = {'in_specs': Spec(), 'out_specs': Spec()}
  return jax.jit(sharding.shard_map_step(body, mesh, **specs))


def layer(x_BTD, w, positions_BS, segments_BS):
  """As `tests.ops.test_mla.forward`, of this device's tokens."""
  cos, sin = rope.tables(plain.CFG, collectives.shard_sequence(positions_BS))
  latents = mla.compress(x_BTD @ w['w_dkv_DY'], w['kv_norm_C'], cos, sin, 1e-6)
  latents = mla.Latents(*map(collectives.all_gather_sequence, latents))
  q_BTNX = jnp.einsum('btd,dnx->btnx', x_BTD, w['w_q_DNX'])
  q_BTNX = jnp.concatenate(mla.split_query(q_BTNX, cos, sin), axis=-1)
  up = lambda w: jnp.einsum('bsc,cnh->bsnh', latents.c_BSC, w)
  keys = (up(w['w_uk_CNH']), latents.k_rope_BSR, up(w['w_uv_CNU']))
  scale = rope.softmax_scale(plain.CFG)
  o_BTNU, _ = attention.causal(q_BTNX, *keys, segments_BS, scale)
  return jnp.einsum('btnu,nud->btd', o_BTNU, w['w_o_NUD'])


def value_and_grads(values, dy_BSD, *rest):
  """Gathered output, and the sums of all devices' gradients."""

  def loss(values):
    x_BTD = collectives.shard_sequence(values['x'])
    y_BTD = layer(x_BTD, values['weights'], *rest)
    return jnp.sum(y_BTD * collectives.shard_sequence(dy_BSD)), y_BTD

  grads, y_BTD = jax.grad(loss, has_aux=True)(values)
  return collectives.all_gather_sequence(y_BTD), collectives.psum(
    grads, 'context'
  )


# (devices, queries at a time): pieces of 12, 6 and 3 tokens.
@pytest.mark.parametrize(('parts', 'block'), [(1, 128), (2, 2), (4, 128)])
@pytest.mark.parametrize('isolated', [False, True])
def test_output_and_gradients_match_the_oracle(
  monkeypatch, parts, block, isolated
):
  monkeypatch.setattr(xla, 'QUERY_BLOCK', block)
  x_BSD, positions_BS = plain.tokens(2, 24)
  segments_BS = None
  if isolated:  # samples end within pieces and at their borders
    segments_BS = np.repeat([[1] * 4 + [2] * 4, [1] * 2 + [2] * 5 + [0]], 3, 1)
    positions_BS[0, 12:] -= 12
    positions_BS[1, 6:] -= 6
  rest = (positions_BS, segments_BS)
  dy_BSD = np.random.default_rng(2).normal(size=x_BSD.shape)
  values = {'x': x_BSD, 'weights': plain.plain_weights()}
  got, grads = over(parts, value_and_grads)(
    plain.f32(values), jnp.float32(dy_BSD), *rest
  )
  oracle = lambda v: plain.oracle_forward(v['x'], v['weights'], *rest)
  tolerances.assert_close(got, oracle(values))
  gradients.assert_matches(grads, lambda v: np.sum(oracle(v) * dy_BSD), values)


def test_pieces_go_out_and_come_back():
  """Two pieces each, one from either end; gathered they are in order."""
  x_BS = jnp.arange(32).reshape(2, 16)

  def body(x_BS):
    local_BT = collectives.shard_sequence(x_BS)
    pieces = jax.lax.all_gather(local_BT, 'context')
    return pieces, collectives.all_gather_sequence(local_BT)

  pieces, gathered = over(4, body)(x_BS)
  want = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
  np.testing.assert_array_equal(pieces[:, 0], want)
  np.testing.assert_array_equal(gathered, x_BS)
  np.testing.assert_array_equal(collectives.shard_sequence(x_BS), x_BS)


@pytest.mark.parametrize('parts', [2, 3, 8])
def test_every_device_makes_its_causal_products_once(monkeypatch, parts):
  """2 C + 1 of 4 C products of pieces, the query's own piece last."""
  monkeypatch.setattr(xla, 'QUERY_BLOCK', 2)
  monkeypatch.setattr(collectives, 'axis_size', lambda axes: parts)
  piece, pairs = 4, []
  for device in range(parts):
    monkeypatch.setattr(
      collectives, 'axis_index', lambda axis, here=device: here
    )
    tiles = context_attention.CausalTiles(2 * piece)
    assert tiles.count == (2 * parts + 1) * tiles.blocks
    computed = [tiles.tile(jnp.int32(n)) for n in range(tiles.count)]
    own = {0: device, 1: 2 * parts - 1 - device}
    for tile in computed:
      index = own[int(tile.query) // piece] * piece + int(tile.query) % piece
      assert int(tile.index) == index
    pairs += [(int(tile.index), int(tile.key) // piece) for tile in computed]
    late = [key for index, key in pairs if index == own[1] * piece]
    assert late[-1] == own[1]
  starts = range(0, 2 * parts * piece, 2)
  every = itertools.product(starts, range(2 * parts))
  assert sorted(pairs) == [(i, key) for i, key in every if key <= i // piece]


def test_half_of_the_products_are_never_made():
  """Rows of scores that the program multiplies, counted in its jaxpr."""
  x_BSD, positions_BS = plain.tokens(1, 64)
  weights = plain.f32(plain.plain_weights())
  body = functools.partial(layer, segments_BS=None)
  run = over(4, lambda x, *rest: body(collectives.shard_sequence(x), *rest))
  text = str(jax.make_jaxpr(run)(jnp.float32(x_BSD), weights, positions_BS))
  # Pieces of 8 queries by 8 keys, nine times: not 16 queries by 64 keys.
  heads = plain.CFG.mla.num_heads
  assert f'f32[1,{heads},8,8]' in text and 'length=9' in text
  assert f'{heads},16,64]' not in text


def test_a_kernel_of_whole_sequences_is_refused():
  q_BTNX = jnp.ones((1, 8, 2, 24))
  k_BSNH, k_rope_BSR = jnp.ones((1, 8, 2, 16)), jnp.ones((1, 8, 8))

  def body(q_BTNX):
    keys = (k_BSNH, k_rope_BSR, k_BSNH, jnp.zeros((1, 8), jnp.int32))
    return attention.causal(q_BTNX, *keys, 1.0, implementation='pallas_gpu')[0]

  with pytest.raises(NotImplementedError, match="no 'pallas_gpu' for sharded"):
    over(2, body)(q_BTNX)
