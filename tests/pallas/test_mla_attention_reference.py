"""MLA's attention without kernels against a float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics
from pallas_kernels.mla_attention import api, cases
from tests.pallas import attention

NAMES = ('o', 'lse', 'dq', 'dk_nope', 'dk_rope', 'dv')
BOUND = {jnp.bfloat16: 1e-5, jnp.float32: 1e-10}


def _run(case, args, wrap=lambda f: f, implementation='reference'):
  """o, lse and every gradient."""
  *operands, segments, do, dlse = args
  call = functools.partial(
    api.attention,
    segments_BT=segments,
    scale=attention.scale(case),
    implementation=implementation,
  )
  out, pull = jax.vjp(wrap(lambda *x: call(*x)), *operands)
  return *out, *pull((do, dlse))


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('dtype', BOUND)
@pytest.mark.parametrize('name', cases.SMALL)
def test_matches_the_oracle(name, dtype, implementation):
  case = cases.SMALL[name]
  args = attention.inputs(case, dtype)
  want = attention.oracle(*args, attention.scale(case))
  outputs = _run(case, args, implementation=implementation)
  for what, x, y in zip(NAMES, outputs, want, strict=True):
    assert np.isfinite(np.asarray(x, np.float32)).all(), what
    assert numerics.difference(x, y) < BOUND[dtype], what
    assert x.dtype == (jnp.float32 if what == 'lse' else dtype), what


@pytest.mark.parametrize('name', ['ragged', 'packed'])
def test_no_gradient_from_what_a_query_does_not_see(name):
  case = cases.SMALL[name]
  *operands, segments, do, dlse = attention.inputs(case)
  first = 71  # a query; of 'packed' the second sample after one of its own
  only = lambda x, axis: jnp.where(
    jnp.expand_dims(
      jnp.arange(case.length) == first,
      tuple(i for i in range(x.ndim) if i != axis),
    ),
    x,
    0,
  )
  args = (*operands, segments, only(do, 1), only(dlse, 2))
  grads = _run(case, args)[3:]
  start = 0 if segments is None else 71
  for x in grads:
    x = np.asarray(x, np.float32)
    assert not x[:, :start].any() and not x[:, first + 1 :].any()
    assert x[:, first].any()


@pytest.mark.parametrize('wrap', [jax.jit, jax.checkpoint, lambda f: f])
def test_same_under_transformations(wrap):
  case = cases.SMALL['packed']
  args = attention.inputs(case)
  again = _run(case, args, wrap)
  for x, y in zip(again, _run(case, args), strict=True):
    assert numerics.difference(x, y) < 1e-5
  for x, y in zip(again, _run(case, args, wrap), strict=True):
    np.testing.assert_array_equal(x, y)


def test_vmap_is_a_loop():
  case = cases.SMALL['tiny']
  q, k_nope, k_rope, v, *_ = attention.inputs(case)
  call = functools.partial(
    api.attention, scale=attention.scale(case), implementation='reference'
  )
  pair = [jnp.stack([x, x[::-1]]) for x in (q, k_nope, k_rope, v)]
  got = jax.vmap(call)(*pair)
  for i in range(2):
    for x, y in zip(got, call(*(x[i] for x in pair)), strict=True):
      assert numerics.difference(x[i], y) < 1e-5


@pytest.mark.parametrize(
  ('index', 'change', 'message'),
  [
    (0, lambda x: x[..., 1:], 'H \\+ R'),
    (1, lambda x: x[:, 1:], 'k_nope.shape'),
    (2, lambda x: x[:1], 'k_rope.shape'),
    (3, lambda x: x.astype(jnp.float32), 'v.dtype'),
    (0, lambda x: x[0], 'axes'),
    (0, lambda x: x[:, :0], 'a token'),
  ],
)
def test_arguments_that_do_not_fit(index, change, message):
  args = list(attention.inputs(cases.SMALL['tiny'])[:4])
  args[index] = change(args[index])
  with pytest.raises(ValueError, match=message):
    api.attention(*args, scale=1.0, implementation='reference')
