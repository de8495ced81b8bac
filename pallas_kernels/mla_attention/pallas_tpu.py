"""Causal attention of MLA on TPUs, through Pallas and Mosaic; forward.

A grid over sequences, heads, blocks of queries and blocks of keys: the running
largest logit, sum and output of a block of queries stay in VMEM while keys
pass. Blocks of keys behind the diagonal are neither copied nor multiplied. The
rotary key is one block for all heads.

Letters: as in reference.py; M is a block of queries, K of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128  # queries and keys of a step
_LOW = (
  float(jnp.finfo(jnp.float32).min) / 2
)  # finite: its difference is not NaN


def forward(q, k_nope, k_rope, v, segments_BT, scale, *, interpret=False):
  """Output, in q's type, and log-sum-exp, f32; see `reference.forward`."""
  batch, length, heads, _ = q.shape
  rest = -length % BLOCK
  pad = lambda x: jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
  first = lambda x: jnp.swapaxes(pad(x), 1, 2)  # heads before tokens
  if segments_BT is None:
    segments_BT = jnp.zeros((batch, length), jnp.int32)
  seg = pad(segments_BT)
  nope, rope, values = k_nope.shape[-1], k_rope.shape[-1], v.shape[-1]
  steps = (length + rest) // BLOCK
  row = lambda b, n, i, j: (b, n, i, 0)
  key = lambda b, n, i, j: (b, n, jnp.minimum(i, j), 0)
  wide = lambda width, at: pl.BlockSpec((None, None, BLOCK, width), at)
  column = jax.ShapeDtypeStruct((batch, heads, length + rest, 1), jnp.float32)
  o, lse = pl.pallas_call(
    functools.partial(_kernel, scale=scale),
    grid=(batch, heads, steps, steps),
    in_specs=[
      wide(nope, row),
      wide(rope, row),
      wide(nope, key),
      pl.BlockSpec(
        (None, BLOCK, rope), lambda b, n, i, j: (b, jnp.minimum(i, j), 0)
      ),
      wide(values, key),
      pl.BlockSpec((None, BLOCK, 1), lambda b, n, i, j: (b, i, 0)),
      pl.BlockSpec(
        (None, 1, BLOCK), lambda b, n, i, j: (b, 0, jnp.minimum(i, j))
      ),
    ],
    out_specs=[wide(values, row), wide(1, row)],
    out_shape=[
      jax.ShapeDtypeStruct((*column.shape[:3], values), q.dtype),
      column,
    ],
    scratch_shapes=[
      pltpu.VMEM((BLOCK, 1), jnp.float32),
      pltpu.VMEM((BLOCK, 1), jnp.float32),
      pltpu.VMEM((BLOCK, values), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='mla_attention',
  )(
    first(q[..., :nope]),
    first(q[..., nope:]),
    first(k_nope),
    pad(k_rope),
    first(v),
    seg[:, :, None],
    seg[:, None, :],
  )
  return jnp.swapaxes(o, 1, 2)[:, :length], lse[:, :, :length, 0]


def _kernel(
  q_nope,
  q_rope,
  k_nope,
  k_rope,
  v,
  seg_M1,
  seg_1K,
  o,
  lse,
  top_M1,
  sum_M1,
  o_MU,
  *,
  scale,
):
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    top_M1[...] = jnp.full_like(top_M1, _LOW)
    sum_M1[...] = jnp.zeros_like(sum_M1)
    o_MU[...] = jnp.zeros_like(o_MU)

  @pl.when(j <= i)
  def _():
    s_MK = _dot(q_nope[...], k_nope[...], 1) + _dot(q_rope[...], k_rope[...], 1)
    at = lambda axis: jax.lax.broadcasted_iota(jnp.int32, s_MK.shape, axis)
    seen_MK = (j * BLOCK + at(1) <= i * BLOCK + at(0)) & (
      seg_M1[...] == seg_1K[...]
    )
    s_MK = jnp.where(seen_MK, s_MK * scale, _LOW)
    new_M1 = jnp.maximum(top_M1[...], jnp.max(s_MK, axis=1, keepdims=True))
    # A block that a row sees nothing of must add nothing to it.
    p_MK = jnp.where(seen_MK, jnp.exp(s_MK - new_M1), 0.0)
    old_M1 = jnp.exp(top_M1[...] - new_M1)
    sum_M1[...] = sum_M1[...] * old_M1 + jnp.sum(p_MK, axis=1, keepdims=True)
    o_MU[...] = o_MU[...] * old_M1 + _dot(p_MK.astype(v.dtype), v[...], 0)
    top_M1[...] = new_M1

  @pl.when(j == i)
  def _():
    o[...] = (o_MU[...] / sum_M1[...]).astype(o.dtype)
    lse[...] = top_M1[...] + jnp.log(sum_M1[...])


def _dot(a, b, axis):
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )
