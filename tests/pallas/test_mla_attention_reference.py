"""MLA's attention without kernels against a float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics
from pallas_kernels.mla_attention import api, cases
from tests.pallas import attention

NAMES, BOUND = attention.NAMES, attention.BOUND
# Every case in one dtype, each dtype and each implementation in several.
FORMS = [
  *((name, 'bfloat16', 'xla') for name in ('one', 'block', 'padding')),
  *((name, 'bfloat16', 'reference') for name in ('tiny', 'ragged', 'packed')),
  *((name, 'float32', 'xla') for name in ('tiny', 'ragged', 'packed')),
  *((name, 'float32', 'reference') for name in ('one', 'padding', 'packed')),
]
MORE = [
  form
  for form in itertools.product(
    cases.SMALL, ('bfloat16', 'float32'), ('reference', 'xla')
  )
  if form not in FORMS
]


def _run(case, args, implementation='reference', remat=False):
  """o, lse and every gradient."""
  scale = attention.scale(case)
  return attention.run(args, scale, implementation, remat)


@pytest.mark.parametrize(
  ('name', 'dtype', 'implementation'),
  [*FORMS, *(pytest.param(*x, marks=pytest.mark.nightly) for x in MORE)],
)
def test_matches_the_oracle(name, dtype, implementation):
  case, dtype = cases.SMALL[name], getattr(jnp, dtype)
  args = attention.inputs(case, dtype)
  want = attention.oracle(*args, attention.scale(case))
  outputs = _run(case, args, implementation)
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


@pytest.mark.parametrize('remat', [False, True])
def test_same_under_remat_and_again_gives_the_same_bits(remat):
  case = cases.SMALL['packed']
  args = attention.inputs(case)
  again = _run(case, args, remat=remat)
  for x, y in zip(again, _run(case, args), strict=True):
    assert numerics.difference(x, y) < 1e-5
  for x, y in zip(again, _run(case, args, remat=remat), strict=True):
    np.testing.assert_array_equal(x, y)


def test_vmap_is_a_loop():
  """The loop runs without jit."""
  case = cases.SMALL['tiny']
  q, k_nope, k_rope, v, *_ = attention.inputs(case)
  call = functools.partial(
    api.attention, scale=attention.scale(case), implementation='reference'
  )
  pair = [jnp.stack([x, x[::-1]]) for x in (q, k_nope, k_rope, v)]
  got = jax.jit(jax.vmap(call))(*pair)
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
    (0, lambda x: x.astype(jnp.float16), 'float16 must be bfloat16 or float32'),
  ],
)
def test_arguments_that_do_not_fit(index, change, message):
  args = list(attention.inputs(cases.SMALL['tiny'])[:4])
  args[index] = change(args[index])
  with pytest.raises(ValueError, match=message):
    api.attention(*args, scale=1.0, implementation='reference')


def test_segments_are_int32():
  q, k_nope, k_rope, v, *_ = attention.inputs(cases.SMALL['tiny'])
  segments = jnp.ones(q.shape[:2], jnp.int16)
  with pytest.raises(ValueError, match=r'segments\.dtype=int16'):
    api.attention(q, k_nope, k_rope, v, segments, scale=1.0)
