"""Inputs of MLA's attention, and its float64 oracle, a query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import numerics
from pallas_kernels.mla_attention import api

NAMES = ('o', 'lse', 'dq', 'dk_nope', 'dk_rope', 'dv')
BOUND = {jnp.bfloat16: 1e-5, jnp.float32: 1e-10}


@functools.partial(
  jax.jit, static_argnames=('scale', 'implementation', 'remat')
)
def run(args, scale, implementation='reference', remat=False):
  """o, lse and every gradient."""
  *operands, segments, do, dlse = args

  def call(*operands):
    return api.attention(
      *operands, segments, scale=scale, implementation=implementation
    )

  call = jax.checkpoint(call) if remat else call
  out, pull = jax.vjp(call, *operands)
  return *out, *pull((do, dlse))


def assert_close(got, want, bound=BOUND[jnp.bfloat16]):
  for name, x, y in zip(NAMES, got, want, strict=True):
    assert np.isfinite(np.asarray(x, np.float32)).all(), name
    assert x.shape == y.shape, name
    error = numerics.difference(x, y)
    assert error < bound, f'{name}: {error} >= {bound}'


def inputs(case, dtype=jnp.bfloat16, seed=0):
  """q, k_nope, k_rope, v, segments (or None), do and dlse."""
  rng = np.random.default_rng(seed)
  b, t, n = case.batch, case.length, case.heads
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q = make(b, t, n, case.nope + case.rope)
  keys = make(b, t, n, case.nope), make(b, t, case.rope)
  v, do = make(b, t, n, case.value), make(b, t, n, case.value)
  dlse = jnp.asarray(rng.normal(size=(b, n, t)), jnp.float32)
  return q, *keys, v, segments(case), do, dlse


def segments(case):
  """Samples count from 1; the rest of a sequence is 0."""
  if case.samples is None:
    return None
  ids = np.repeat(np.arange(len(case.samples)) + 1, case.samples)
  row = np.pad(ids.astype(np.int32), (0, case.length - len(ids)))
  return jnp.asarray(np.tile(row, (case.batch, 1)))


def scale(case) -> float:
  return (case.nope + case.rope) ** -0.5


def oracle(q, k_nope, k_rope, v, segments, do, dlse, scale):
  """o, lse, dq, dk_nope, dk_rope, dv; d softmax = diag(p) - p p^T."""
  f64 = lambda x: np.asarray(x, np.float64)
  q, k_nope, k_rope, v, do, dlse = map(f64, (q, k_nope, k_rope, v, do, dlse))
  o, lse = np.zeros(do.shape), np.zeros(dlse.shape)
  dq, dk_nope, dk_rope, dv = (np.zeros_like(x) for x in (q, k_nope, k_rope, v))
  width = k_nope.shape[-1]
  for b, t, n in np.ndindex(q.shape[:3]):
    seen = np.arange(t + 1)
    if segments is not None:
      row = np.asarray(segments[b])
      seen = seen[row[: t + 1] == row[t]]
    keys = np.concatenate([k_nope[b, seen, n], k_rope[b, seen]], axis=-1)
    logits = keys @ q[b, t, n] * scale
    top = logits.max()
    lse[b, n, t] = top + np.log(np.exp(logits - top).sum())
    p = np.exp(logits - lse[b, n, t])
    o[b, t, n] = p @ v[b, seen, n]
    dp = v[b, seen, n] @ do[b, t, n]
    ds = (p * dp - p * (p @ dp) + p * dlse[b, n, t]) * scale
    dq[b, t, n] = ds @ keys
    dk = np.outer(ds, q[b, t, n])
    dk_nope[b, seen, n] += dk[:, :width]
    dk_rope[b, seen] += dk[:, width:]
    dv[b, seen, n] += np.outer(p, do[b, t, n])
  return o, lse, dq, dk_nope, dk_rope, dv
