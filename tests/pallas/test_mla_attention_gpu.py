"""MLA's kernels for Hopper: interpreted, lowered, compiled.

The interpreter's memory is NaN until it is written.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import machine_code
from pallas_kernels import dispatch, numerics
from pallas_kernels.mla_attention import (
  api,
  backward_gpu,
  blocks_gpu,
  cases,
  pallas_gpu,
  xla,
)
from tests import nightly
from tests.pallas import attention, gpu, products

Case = cases.Case
BOUND = attention.BOUND[jnp.bfloat16]
# An interpreted program takes seconds: one sequence instead of two.
SMALL = cases.SMALL | {'packed': cases.SMALL['packed']._replace(batch=1)}
SHAPES = {
  'packed': cases.V3['packed'],
  'ragged': cases.SMALL['ragged'],
  'one': cases.SMALL['one'],
}
run = functools.partial(attention.run, implementation='pallas')


@pytest.fixture
def interpreted(monkeypatch):
  """`api` as on a GPU, with interpreted kernels."""
  on_hopper(monkeypatch)
  for module, name in ((pallas_gpu, 'forward'), (backward_gpu, 'backward')):
    kernel = functools.partial(getattr(module, name), interpret=True)
    monkeypatch.setattr(module, name, kernel)


def on_hopper(monkeypatch):
  monkeypatch.setattr(dispatch, 'backend_kernel', lambda: 'pallas_gpu')


def unlike(length):
  """Two rows of several blocks: of two samples, and of three."""
  case = Case(2, length, 1, 16, 8, 24)
  args = list(attention.inputs(case))
  first, second = np.zeros((2, length), np.int32)
  first[130:] = 7
  second[1:20], second[20:] = -3, 5
  args[4] = jnp.asarray([first, second])
  return args, attention.scale(case)


@gpu.interpreted
@pytest.mark.parametrize('name', nightly.daily(SMALL, 'packed'))
def test_is_the_reference_and_the_oracle_without_races(
  name, interpreted, capfd
):
  case = SMALL[name]
  args, scale = attention.inputs(case), attention.scale(case)
  with gpu.no_races(capfd):
    got = jax.block_until_ready(run(args, scale))
  want = attention.run(args, scale)
  assert [x.dtype for x in got] == [x.dtype for x in want]
  attention.assert_close(got, want)
  attention.assert_close(got, attention.oracle(*args, scale))


@gpu.interpreted
@pytest.mark.parametrize('length', [200, 300])
@pytest.mark.nightly
def test_many_blocks_and_rows_with_other_segments(length, interpreted, capfd):
  args, scale = unlike(length)
  with gpu.no_races(capfd):
    got = jax.block_until_ready(run(args, scale))
  attention.assert_close(got, attention.run(args, scale))
  attention.assert_close(got, attention.oracle(*args, scale))


@gpu.interpreted
@pytest.mark.parametrize('turns', [1, 2])
@pytest.mark.nightly
def test_blocks_go_round_the_buffers_and_again_give_the_same_bits(
  turns, interpreted, capfd
):
  """Round all three rings; widths of V3."""
  case = Case(1, 2 * turns * blocks_gpu.BLOCK + 3, 1)
  args, scale = attention.inputs(case), attention.scale(case)
  with gpu.no_races(capfd):
    got = jax.block_until_ready(run(args, scale))
  attention.assert_close(got, attention.run(args, scale))
  products.assert_bitwise(run(args, scale), got)


@gpu.interpreted
def test_no_gradient_from_what_a_query_does_not_see(interpreted):
  case = SMALL['packed']
  *operands, segments, do, dlse = attention.inputs(case)
  start, query = 71, 130  # a sample's start, and the last of it
  only = lambda x, axis: jnp.where(
    jnp.expand_dims(
      jnp.arange(case.length) == query,
      tuple(i for i in range(x.ndim) if i != axis),
    ),
    x,
    0,
  )
  args = (*operands, segments, only(do, 1), only(dlse, 2))
  dq, *rest = run(args, attention.scale(case))[2:]
  for grad in rest:
    grad = np.asarray(grad, np.float32)
    assert not np.delete(grad, np.s_[start : query + 1], axis=1).any()
    seen = grad[:, start : query + 1]
    assert seen.any(axis=(1, *range(2, grad.ndim))).all()
  assert not np.delete(np.asarray(dq, np.float32), query, axis=1).any()


@pytest.mark.nightly
@gpu.interpreted
def test_blocks_of_other_samples_are_not_loaded(interpreted):
  """NaN in them, which times a probability of zero is NaN, is not seen."""
  block = blocks_gpu.BLOCK
  case = Case(1, block + 70, 1, 16, 8, 16, (block, 70))
  clean, scale = list(attention.inputs(case)), attention.scale(case)
  want = run(clean, scale)
  for poisoned, kept in (
    (np.s_[:, :block], np.s_[block:]),
    (np.s_[:, block:], np.s_[:block]),
  ):
    args = [x.at[poisoned].set(jnp.nan) for x in clean[:4]] + clean[4:]
    for x, y in zip(run(args, scale), want, strict=True):
      index = (..., kept) if x.dtype == jnp.float32 else (slice(None), kept)
      products.assert_bitwise(x[index], y[index])


@pytest.mark.parametrize(
  ('queries', 'keys'), [(128, 128), (128, 64), (32, 128)]
)
def test_bounds_leave_out_no_pair_that_meets(queries, keys):
  rng = np.random.default_rng(0)
  length = 500
  packed = np.sort(rng.integers(0, 6, (3, length)), axis=1)
  rows = np.concatenate([packed, rng.permuted(packed, axis=1)]).astype(np.int32)
  first = np.asarray(blocks_gpu.first_keys(rows, queries, keys))
  end = np.asarray(blocks_gpu.end_queries(rows, queries, keys))
  for b, row in enumerate(rows):
    same_sample = np.tril(row[:, None] == row)
    for t, s in np.argwhere(same_sample):
      assert first[b, t // queries] <= s // keys
      assert t // queries < end[b, s // keys]
  fewer = first[:3] > 0, end[:3] < -(-length // queries)
  assert all(x.mean() > 0.3 for x in fewer)  # of packed rows


@pytest.mark.nightly
@gpu.interpreted
def test_scores_far_apart_are_finite(interpreted):
  case = SMALL['block']
  args = list(attention.inputs(case))
  args[0] = args[0] * 1000
  got = run(args, attention.scale(case))
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got)


@pytest.mark.nightly
@gpu.interpreted
def test_vmap_is_a_loop(interpreted):
  case = Case(1, 20, 1, 16, 8, 16)
  args, scale = attention.inputs(case), attention.scale(case)
  args = (*args[:4], *args[5:])  # without segments
  call = lambda *args: run((*args[:4], None, *args[4:]), scale)
  pair = [jnp.stack([x, -x]) for x in args]
  got = jax.jit(jax.vmap(call))(*pair)
  for at in range(2):
    q, k_nope, k_rope, v, do, dlse = (x[at] for x in pair)
    args = (q, k_nope, k_rope, v, None, do, dlse)
    for x, y in zip(got, attention.run(args, scale), strict=True):
      assert numerics.difference(x[at], y) < BOUND


def structs(case):
  """Shapes of q, k_nope, k_rope, v, segments (or None), do and dlse."""
  args = functools.partial(attention.inputs, case)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(args)
  )


def kernels(case):
  """Each kernel and its arguments."""
  q, k_nope, k_rope, v, segments, do, dlse = structs(case)
  operands, scale = (q, k_nope, k_rope, v), attention.scale(case)
  tail = () if segments is None else (segments,)
  at = lambda x: x[0] if x else None

  def forward(*args):
    return pallas_gpu.forward(*args[:4], at(args[4:]), scale)

  def backward(*args):
    kept = args[4:7]
    return backward_gpu.backward(*args[:4], at(args[7:]), scale, *kept)

  of_backward = (*operands, dlse, dlse, do, *tail)
  return {
    'forward': (forward, (*operands, *tail)),
    'dq': (lambda *args: backward(*args)[0], of_backward),
    'dkv': (lambda *args: backward(*args)[1:], of_backward),
  }


@pytest.mark.parametrize('name', nightly.daily(SHAPES, 'one'))
def test_all_shapes_are_lowered_to_wgmma(name):
  """Whole: the interpreter takes sizes that TMA would not."""
  width = max(SHAPES[name].nope, 64)
  kind = 'm64n{}k16.f32.bf16.bf16'.format
  want = {
    'forward': {kind(128), kind(width)},
    'dq': {kind(64), kind(width)},
    'dkv': {kind(32), kind(width), kind(64)},
  }
  for title, (kernel, args) in kernels(SHAPES[name]).items():
    kinds = gpu.multiplications(gpu.lower(kernel, *args))
    assert kinds == want[title], title


@gpu.compiled
@pytest.mark.parametrize('name', ['pretrain', 'packed'])
@pytest.mark.parametrize(
  ('kernel', 'products_of'),
  [
    ('forward', {'64x128x16': 20}),
    ('dq', {'64x64x16': 24, '64x128x16': 4}),
    ('dkv', {'64x32x16': 20, '64x128x16': 4, '64x64x16': 2}),
  ],
)
def test_registers_suffice(kernel, products_of, name):
  """Products of a block that the diagonal crosses, and of another."""
  run, args = kernels(cases.V3[name])[kernel]
  machine = machine_code.compile_kernel(run, *args)
  # Three registers, stored and loaded once where positions and segments are
  # compared.
  assert machine.spilled <= (24 if (kernel, name) == ('dq', 'packed') else 0)
  for shape, count in products_of.items():
    assert machine.count(rf'HGMMA\.{shape}\.F32\.BF16') == 2 * count


@pytest.mark.parametrize(
  ('wrap', 'count', 'name'),
  [
    pytest.param(lambda f: f, 3, 'pretrain', marks=pytest.mark.nightly),
    pytest.param(jax.checkpoint, 4, 'packed', marks=pytest.mark.nightly),
  ],
)
def test_gradient_lowers_without_an_array_of_all_pairs(
  wrap, count, name, monkeypatch
):
  """Through `api`; the interpreter knows no remat."""
  on_hopper(monkeypatch)
  case = cases.V3[name]._replace(heads=16)
  *operands, segments_BT, _, _ = structs(case)
  operands += [] if segments_BT is None else [segments_BT]

  def loss(*args):
    o_BTNU, lse_BNT = api.attention(*args, scale=0.1)
    return jnp.sum(o_BTNU.astype(jnp.float32)) + jnp.sum(lse_BNT)

  gradient = jax.value_and_grad(wrap(loss), argnums=(0, 1, 2, 3))
  text = gpu.lower(gradient, *operands)
  assert text.count('@mosaic_gpu_v2') == count
  kinds = {f'm64n{width}k16.f32.bf16.bf16' for width in (32, 64, 128)}
  assert gpu.multiplications(text) == kinds
  shapes = re.findall(r'tensor<([0-9x]+)x[a-z]', text)
  sizes = [math.prod(map(int, shape.split('x'))) for shape in shapes]
  assert max(sizes) < case.length**2 * case.heads / 10


@pytest.mark.parametrize(
  ('case', 'dtype', 'message'),
  [
    (Case(1, 4, 1), jnp.float32, 'q is float32, not bfloat16'),
    (Case(1, 4, 1, nope=136), jnp.bfloat16, r'widths 136 \+ 64 and 128 must'),
    (Case(1, 4, 1, rope=72), jnp.bfloat16, r'128 \+ 72 and 128 must be at'),
    (Case(1, 4, 1, value=192), jnp.bfloat16, '64 and 192 must be at most 128'),
  ],
)
def test_what_the_kernels_do_not_take(
  case, dtype, message, monkeypatch, caplog
):
  args, scale = attention.inputs(case, dtype)[:4], attention.scale(case)
  on_hopper(monkeypatch)
  dispatch.log_choice.cache_clear()
  with pytest.raises(NotImplementedError, match=message):
    api.attention(*args, scale=scale, implementation='pallas')
  o_BTNU, lse_BNT = xla.forward(*args, None, scale)
  want = (o_BTNU.astype(dtype), lse_BNT)
  with caplog.at_level('INFO', logger=dispatch.__name__):
    for _ in range(2):
      products.assert_bitwise(api.attention(*args, scale=scale), want)
  (message,) = caplog.messages
  assert message.startswith('mla_attention: xla, as ')
