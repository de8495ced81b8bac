"""FP8 experts spread over devices: the bytes of one device.

Tokens and the output's gradient are quantised before they are sent, row by row,
so every expert reads the same bytes. Rows arrive in the order of all tokens,
and fill the same blocks of 128: Wgrad, whose scales span a block, and the
gates' gradients are equal bit by bit. Outputs and tokens' gradients are sums of
parts that were rounded to BF16 to travel: half a step for each of them.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import experts as expert_ops
from dsv3_jax.ops import fp8_linear
from pallas_kernels import numerics
from pallas_kernels.fp8_matmul import reference
from tests.ops import spread

TOKENS, DIM, WIDTH, EXPERTS, TOP_K = 256, 130, 72, 8, 3
POLICY = precision.POLICIES['fp8']
BLOCKWISE = precision.POLICIES['fp8_block_dgrad']
# K parts, each off by 2^-9 of itself, and so is the sum; of the largest sum.
PARTS = 2.0**-7


def step(axes=(), policy=POLICY, wrap=lambda f: f, factor=math.inf):
  """Output and gradients of the routed product in FP8."""

  def apply(values, ids_MK):
    experts = expert_ops.Experts(
      *(
        fp8_linear.Weight(w, *reference.quantize_weight(w))
        for w in values['experts']
      )
    )
    tokens = values['x_MD'], ids_MK, values['gates_MK']
    options = expert_ops.ExpertOptions(
      axes=axes, policy=policy, buffer_factor=factor
    )
    return expert_ops.expert_ffn(*tokens, experts, options)

  return spread.value_and_grads(wrap(apply))


@functools.cache
def one_device():
  return jax.jit(step())


@functools.cache
def devices(shape, axes, factor=math.inf):
  return spread.over(shape, step(axes, factor=factor))


def draw(routing, seed=0):
  """Tokens in BF16, weights in f32, and gradients as small as real ones."""
  rng = np.random.default_rng(seed)
  up, down = (EXPERTS, DIM, WIDTH), (EXPERTS, WIDTH, DIM)
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  values = {
    'x_MD': normal(TOKENS, DIM).astype(jnp.bfloat16),
    'gates_MK': jnp.float32(rng.uniform(0.1, 1.0, (TOKENS, TOP_K))),
    'experts': [0.1 * normal(*s) for s in (up, up, down)],
  }
  ids_MK = spread.draw_ids(routing, TOKENS, TOP_K, EXPERTS, seed)
  return values, ids_MK, 1e-6 * normal(TOKENS, DIM)


def reorder(order_M, values, ids_MK, dy_MD):
  """The same tokens, one after the other in another way."""
  tokens = {name: values[name][order_M] for name in ('x_MD', 'gates_MK')}
  return values | tokens, ids_MK[order_M], dy_MD[order_M]


def assert_equal(got, want):
  (y_MD, grads), (want_MD, want_grads) = got, want
  assert y_MD.dtype == grads['x_MD'].dtype == jnp.bfloat16
  assert spread.error(y_MD, want_MD) < PARTS
  assert spread.error(grads['x_MD'], want_grads['x_MD']) < PARTS
  for name in ('gates_MK', 'experts'):
    pairs = map(jax.tree.leaves, (grads[name], want_grads[name]))
    for g, w in zip(*pairs, strict=True):
      assert g.dtype == jnp.float32
      np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize('routing', spread.ROUTINGS)
@pytest.mark.parametrize('shape', [(1, 2), (2, 2), (2, 4)], ids=str)
def test_equals_one_device(shape, routing):
  args = draw(routing)
  assert_equal(devices(shape, spread.ONE_HOP)(*args), one_device()(*args))


@pytest.mark.parametrize('routing', spread.ROUTINGS)
def test_two_hops_bring_the_same_rows_in_another_order(routing):
  """From each device of the same node in turn, and of each from all nodes."""
  args = draw(routing)
  got_MD, got = devices((2, 4), spread.TWO_HOPS)(*args)
  order_M = np.arange(TOKENS).reshape(2, 4, -1).swapaxes(0, 1).reshape(-1)
  got['x_MD'], got['gates_MK'] = (
    got[name][order_M] for name in ('x_MD', 'gates_MK')
  )
  want = one_device()(*reorder(order_M, *args))
  assert_equal((got_MD[order_M], got), want)


@pytest.mark.parametrize('routing', spread.ROUTINGS)
def test_rounds_change_nothing_but_the_tiles_of_weight_gradients(routing):
  """Tiles of 128 tokens of a round each: other scales, so other roundings.

  Measured: scales within 2.5e-3, 1 - cosine within 4e-4.
  """
  args = draw(routing)
  got_MD, got = devices((2, 4), spread.ONE_HOP, 0.5)(*args)
  want_MD, want = one_device()(*args)
  tokens = ('x_MD', 'gates_MK')
  pick = lambda y_MD, grads: (
    y_MD,
    {name: grads[name] for name in tokens} | {'experts': []},
  )
  assert_equal(pick(got_MD, got), pick(want_MD, want))
  for g, w in zip(got['experts'], want['experts'], strict=True):
    for e in range(EXPERTS):
      scale, direction = numerics.scale_and_direction(g[e], w[e])
      assert scale < 5e-3 and direction < 1e-3, (scale, direction)


@pytest.mark.usefixtures('optimized')
@pytest.mark.nightly
def test_runs_again_bit_by_bit():
  args = draw('random')
  run = devices((2, 4), spread.TWO_HOPS)
  for a, b in zip(
    *(jax.tree.leaves(run(*args)) for _ in range(2)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def moved(run):
  """How many arrays of which dtype and width travel."""
  counts = collections.Counter()
  for eqn in spread.equations(jax.make_jaxpr(run)(*draw('random'))):
    if eqn.primitive.name == 'all_to_all':
      (x,) = eqn.invars
      counts[x.aval.dtype.name, x.aval.shape[-1]] += 1
  return counts


@pytest.mark.parametrize('remat', [False, True])
def test_dispatch_is_fp8_and_combine_is_bf16_both_ways(remat):
  """TR 3.3.3; nothing is sent twice, also under remat."""
  names = jax.checkpoint_policies.save_only_these_names
  kept = names('all_to_all', 'swiglu_in')
  again = functools.partial(jax.checkpoint, policy=kept)
  options = {'wrap': again} if remat else {}
  assert moved(spread.over((2, 4), step(spread.ONE_HOP, **options))) == {
    ('int32', TOP_K): 1,
    ('uint8', DIM): 2,  # tokens, the output's gradient
    ('float32', -(-DIM // 128)): 2,  # their scales
    ('bfloat16', DIM): 2,  # outputs, tokens' gradients
    ('float32', TOP_K): 2,  # gates and their gradients
  }


def test_blockwise_dgrad_reads_the_gradient_as_it_was():
  """Blocks span tokens of all devices: nothing can be quantised before."""
  run = lambda policy: spread.over((2, 4), step(spread.ONE_HOP, policy))
  more = moved(run(BLOCKWISE)) - moved(run(POLICY))
  assert more == {('bfloat16', DIM): 1}
