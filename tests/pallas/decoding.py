"""Operands of paged decoding, NaN where no kernel may read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import numerics
from pallas_kernels.mla_decode import api
from tests.oracles import decode as oracle

SCALE = 0.1352338  # of V3 with YaRN
# Of the output from float64, as FlashMLA's own tests have it for BF16.
DIFFERENCE = {'float32': 1e-11, 'bfloat16': 1e-5}
# Log-sum-exp is f32 in all; the operands' rounding is in the oracle's too.
LSE = 1e-5
WILD = (10**6, -7)  # table entries that are no pages


class Operands(NamedTuple):
  """The arguments of `api.decode`."""

  q_BTNY: jax.Array
  cache: api.LatentPages
  table_Bb: jax.Array
  lengths_B: jax.Array
  scale: float = SCALE


def draw(case, dtype='bfloat16', seed=0, fp8=False, poison=True) -> Operands:
  """Normal numbers in pages without order; NaN in all places of no row."""
  rng = np.random.default_rng(seed)
  rows = len(case.lengths)
  used = [-(-length // api.PAGE) for length in case.lengths]
  pages = sum(used) + 2
  free = list(rng.permutation(pages))
  latents, keys = (
    np.full((pages, api.PAGE, width), np.nan if poison else 0.0, np.float32)
    for width in (case.latent, case.rotary)
  )
  table_Bb = rng.choice(WILD, (rows, case.blocks)).astype(np.int32)
  for b, length in enumerate(case.lengths):
    for j in range(used[b]):
      page, tokens = free.pop(), min(length - j * api.PAGE, api.PAGE)
      latents[page, :tokens] = rng.normal(size=(tokens, case.latent))
      keys[page, :tokens] = rng.normal(size=(tokens, case.rotary))
      table_Bb[b, j] = page
  width = case.latent + case.rotary
  q_BTNY = rng.normal(size=(rows, case.queries, case.heads, width)) / 4
  cache = api.LatentPages(jnp.asarray(latents, dtype), jnp.asarray(keys, dtype))
  return Operands(
    jnp.asarray(q_BTNY, dtype),
    api.quantize(cache) if fp8 else cache,
    jnp.asarray(table_Bb),
    jnp.asarray(case.lengths, jnp.int32),
  )


def naive(args: Operands):
  """The oracle on the same rounded operands."""
  cache = api.dequantize(args.cache, args.q_BTNY.dtype)
  return oracle.decode(
    np.asarray(args.q_BTNY, np.float64),
    np.asarray(cache.c_psC, np.float64),
    np.asarray(cache.k_rope_psR, np.float64),
    np.asarray(args.table_Bb),
    np.asarray(args.lengths_B),
    args.scale,
  )


def permuted(args: Operands, seed=1) -> Operands:
  """The same rows with their pages elsewhere."""
  order = np.random.default_rng(seed).permutation(args.cache.pages)
  back = jnp.asarray(np.argsort(order), jnp.int32)
  table_Bb = args.table_Bb
  known = (table_Bb >= 0) & (table_Bb < args.cache.pages)
  table_Bb = jnp.where(known, back[jnp.where(known, table_Bb, 0)], table_Bb)
  cache = jax.tree.map(lambda x: x[order], args.cache)
  return args._replace(cache=cache, table_Bb=table_Bb)


def assert_close(got, want, dtype):
  """(o, lse) within the bounds of the dtype; empty ones exactly empty."""
  (o, lse), (want_o, want_lse) = got, want
  assert o.shape == want_o.shape and o.dtype == dtype
  assert lse.shape == want_lse.shape and lse.dtype == jnp.float32
  o, lse = np.asarray(o, np.float64), np.asarray(lse, np.float64)
  want_o, want_lse = (np.asarray(x, np.float64) for x in (want_o, want_lse))
  for b in range(len(o)):  # a small row must not hide behind the others
    error = numerics.difference(o[b], want_o[b])
    assert error < DIFFERENCE[str(jnp.dtype(dtype))], (b, error)
  empty = np.isneginf(want_lse)
  np.testing.assert_array_equal(np.isneginf(lse), empty)
  assert not np.any(o[empty.swapaxes(1, 2)])
  error = numerics.relative_error(lse[~empty], want_lse[~empty])
  assert error < LSE, error
