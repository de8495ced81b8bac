"""MLA's kernels for TPUs: interpreted, and lowered for the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import compile_kernels_tpu as without_tpu
from pallas_kernels import dispatch, numerics
from pallas_kernels.mla_attention import (
  api,
  backward_tpu,
  cases,
  pallas_tpu,
)
from tests import nightly
from tests.pallas import attention, products

BlockSizes = pallas_tpu.BlockSizes
BOUND = attention.BOUND
V3 = [n for n in without_tpu.programs() if n.startswith('attention')]


run = functools.partial(attention.run, implementation='pallas_interpret')
assert_close = attention.assert_close


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('one', jnp.bfloat16),
    ('block', jnp.bfloat16),
    ('packed', jnp.bfloat16),
    ('ragged', jnp.float32),
    pytest.param('tiny', jnp.bfloat16, marks=pytest.mark.nightly),
    pytest.param('ragged', jnp.bfloat16, marks=pytest.mark.nightly),
    pytest.param('padding', jnp.bfloat16, marks=pytest.mark.nightly),
    pytest.param('one', jnp.float32, marks=pytest.mark.nightly),
    pytest.param('packed', jnp.float32, marks=pytest.mark.nightly),
  ],
)
def test_is_the_reference_and_the_oracle(name, dtype):
  case = cases.SMALL[name]
  args, scale = attention.inputs(case, dtype), attention.scale(case)
  got, want = run(args, scale), attention.run(args, scale)
  assert [x.dtype for x in got] == [x.dtype for x in want]
  assert_close(got, want, BOUND[dtype])
  assert_close(got, attention.oracle(*args, scale), BOUND[dtype])
  products.assert_bitwise(run(args, scale), got)


@functools.partial(jax.jit, static_argnames=('scale', 'blocks', 'interpret'))
def with_blocks(args, scale, blocks, interpret=True):
  """o, lse and every gradient, of blocks of that size."""
  *operands, do, dlse = args
  options = {'blocks': blocks, 'interpret': interpret}
  o, lse = pallas_tpu.forward(*operands, scale, **options)
  f32 = lambda x: x.astype(jnp.float32)
  delta = jnp.sum(f32(o) * f32(do), -1).swapaxes(1, 2) - dlse
  grads = backward_tpu.backward(*operands, scale, lse, delta, do, **options)
  return o, lse, *grads


@pytest.mark.parametrize(
  ('sizes', 'samples'),
  [
    pytest.param((128, 128), 'one', marks=pytest.mark.nightly),
    ((128, 128), 'unlike'),
    ((256, 128), 'unlike'),
    pytest.param((128, 384), 'unlike', marks=pytest.mark.nightly),
  ],
)
def test_many_blocks_and_rows_with_other_segments(sizes, samples):
  case = cases.Case(2, 300, 2, 16, 8, 24)
  args, scale = list(attention.inputs(case)), attention.scale(case)
  if samples == 'unlike':
    first, second = np.zeros((2, 300), np.int32)
    first[130:] = 7  # beside it a row of three samples, one of one token
    second[1:20], second[20:] = -3, 5
    args[4] = jnp.asarray([first, second])
  want = attention.run(args, scale)
  got = with_blocks(args, scale, BlockSizes(*sizes))
  assert_close(got, want, BOUND[jnp.bfloat16])


@pytest.mark.parametrize(
  'sizes',
  [(128, 128), pytest.param((256, 128), marks=pytest.mark.nightly)],
)
def test_no_gradient_from_what_a_query_does_not_see(sizes):
  case = cases.SMALL['packed']
  *operands, segments, do, dlse = attention.inputs(case)
  start, query = 71, 130  # a sample's start, and the last of it
  do = do.at[:, :query].set(0).at[:, query + 1 :].set(0)
  dlse = dlse.at[..., :query].set(0).at[..., query + 1 :].set(0)
  args = (*operands, segments, do, dlse)
  dq, *rest = with_blocks(args, attention.scale(case), BlockSizes(*sizes))[2:]
  for grad in rest:
    grad = np.asarray(grad, np.float32)
    unseen = np.delete(grad, np.s_[start : query + 1], axis=1)
    assert not unseen.any()
    assert grad[:, start:query].any(axis=(1, *range(2, grad.ndim))).all()
  assert not np.delete(np.asarray(dq, np.float32), query, axis=1).any()


def test_what_is_not_seen_changes_no_bit():
  """Of another segment and behind, however large."""
  case = cases.SMALL['packed']
  args, scale = list(attention.inputs(case)), attention.scale(case)
  got = run(args, scale)
  for at in range(4):
    args[at] = args[at].at[:, :70].mul(100).at[:, 131:].mul(100)
  middle = np.s_[71:131]  # all of a sample and no other
  for x, y in zip(run(args, scale), got, strict=True):
    axis = 2 if x.ndim == 3 and x.shape[1] == case.heads else 1
    index = (slice(None),) * axis + (middle,)
    products.assert_bitwise(x[index], y[index])


def test_scores_far_apart_are_finite():
  case = cases.SMALL['ragged']
  args = list(attention.inputs(case))
  args[0] = args[0] * 1000
  got = run(args, attention.scale(case))
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got)


def test_same_under_remat():
  case = cases.SMALL['packed']
  args, scale = attention.inputs(case), attention.scale(case)
  products.assert_bitwise(run(args, scale, remat=True), run(args, scale))


def test_vmap_is_a_loop():
  case = cases.Case(1, 20, 1, 16, 8, 16)
  args, scale = attention.inputs(case), attention.scale(case)
  operands = [jnp.stack([x, -x[:, ::-1]]) for x in args[:4]]

  def loss(*operands):
    o, lse = api.attention(
      *operands, scale=scale, implementation='pallas_interpret'
    )
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(lse)

  grad = jax.grad(loss, argnums=(0, 1, 2, 3))
  got = jax.jit(jax.vmap(grad))(*operands)
  for i in range(2):
    want = jax.jit(grad)(*(x[i] for x in operands))
    for x, y in zip(got, want, strict=True):
      assert numerics.difference(x[i], y) < BOUND[jnp.bfloat16]


@pytest.mark.slow
def test_no_race_and_nothing_read_that_was_not_written(capfd):
  case = cases.Case(1, 200, 1, 16, 8, 16)
  args, scale = attention.inputs(case), attention.scale(case)
  strict = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    num_cores_or_threads=2,
    random_seed=0,
  )
  got = with_blocks(args, scale, BlockSizes(128, 128), strict)
  assert_close(got, attention.run(args, scale), BOUND[jnp.bfloat16])
  assert 'RACE' not in capfd.readouterr().out


@pytest.mark.parametrize('chip', nightly.daily(['v5p', 'v7x'], 'v5p'))
@pytest.mark.parametrize('name', V3)
def test_lowers_for_a_tpu(name, chip):
  program = without_tpu.programs()[name]
  text = without_tpu.lower(program, without_tpu.CHIPS[chip]).as_text()
  assert text.count('@tpu_custom_call') == (2 if 'grad' in name else 1)


def test_no_array_of_all_pairs():
  case = cases.V3['pretrain']
  name = 'attention grad bfloat16 pretrain'
  program = without_tpu.programs()[name]
  jaxpr = jax.make_jaxpr(program.function)(*program.args)
  pairs = case.length**2 * case.heads
  largest = max(v.aval.size for e in jaxpr.eqns for v in e.outvars)
  assert largest < pairs / 10


def test_blocks():
  with pytest.raises(ValueError, match=r'blocks\.keys=64 must be a multiple'):
    BlockSizes(128, 64)
  sizes = {n: pallas_tpu.choose_blocks(n).keys for n in (1, 131, 513, 4096)}
  assert sizes == {1: 128, 131: 256, 513: 384, 4096: 512}
  blocks = BlockSizes(256, 128)
  for i, j in np.ndindex(4, 8):
    seen = (i + 1) * 256 - 1 >= j * 128
    assert seen == (j <= int(blocks.last_key(i)))
    assert seen == (i >= int(blocks.first_query(j)))


def test_gradient_by_api_lowers_for_a_tpu(monkeypatch):
  monkeypatch.setattr(dispatch, 'backend_kernel', lambda: 'pallas_tpu')
  forward = without_tpu.programs()['attention fprop bfloat16 packed']

  def loss(*args):
    o_BTNU, lse_BNT = api.attention(*args, scale=0.1)
    return jnp.sum(o_BTNU.astype(jnp.float32)) + jnp.sum(lse_BNT)

  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
  program = without_tpu.Program(gradient, forward.args)
  text = without_tpu.lower(program, without_tpu.CHIPS['v5p']).as_text()
  assert text.count('@tpu_custom_call') == 3
