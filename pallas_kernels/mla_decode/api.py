"""Absorbed latent attention for decoding: arguments checked once for all.

Queries come absorbed (W_UK^T q_nope beside the rotated q_rope), outputs leave
before W_UV: one latent serves all heads as key and as value (TR 2.1.1).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, quantized
from pallas_kernels.mla_decode import cache as caches
from pallas_kernels.mla_decode import pallas_gpu, pallas_tpu, reference

# Of one kernel call, which computes masks query by query and holds the sums of
# all queries. More queries (a prompt behind a cached prefix) come in slices.
MOST_QUERIES = 16

LatentPages = caches.LatentPages
PAGE = caches.PAGE
bits = caches.bits
dequantize = caches.dequantize
from_bits = caches.from_bits
quantize = caches.quantize


def decode(
  q_BTNY: Float[Array, 'B T N Y'],
  cache: LatentPages,
  table_Bb: Int[Array, 'B b'],
  lengths_B: Int[Array, 'B'],
  scale: float,
  implementation: str = 'auto',
  splits: int | None = None,
) -> tuple[Float[Array, 'B T N C'], Float[Array, 'B N T']]:
  """Attention of each row's last T tokens over its pages (TR 2.1.1).

  Args:
    q_BTNY: BF16 or f32; latent part, then rotary part: Y = C + R.
    cache: of the queries' dtype, or with latents in e4m3. Pages that no row
      owns, and places of a row's last page beyond its length, may hold
      anything.
    table_Bb: int32; a row's pages in order. Entries beyond its length may be
      anything; those within must be pages.
    lengths_B: int32 tokens in the cache, the T queries' own included, at most
      64 b; the queries are causal among themselves. 0: an empty row.
    scale: of the scores before the softmax, a Python number.
    splits: parts of a row (see `parts.py`); None: enough to keep the device
      busy. Changes results by rounding only.
  Returns:
    o_BTNC in the queries' dtype; lse_BNT f32, natural logarithm. Zero and -inf
    for a query that sees no token. No gradient is defined.
  Raises:
    ValueError: shapes, dtypes, splits or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation; 'auto' takes
      the reference instead.
  """
  _check(q_BTNY, cache, table_Bb, lengths_B)
  if splits is not None and splits < 1:
    raise ValueError(f'splits={splits} must be at least 1')

  def unsupported(kernel: str) -> str | None:
    return pallas_gpu.unsupported(cache) if kernel == 'pallas_gpu' else None

  chosen = dispatch.resolve(implementation, 'mla_decode', unsupported)
  args = (q_BTNY, cache, table_Bb, lengths_B, scale)
  if chosen == 'reference':
    return reference.decode(*args, splits=splits or 1)
  kernel = functools.partial(
    pallas_tpu.decode, interpret=chosen == 'pallas_interpret'
  )
  if chosen == 'pallas_gpu':
    kernel = pallas_gpu.decode
  run = lambda q_BTNY, lengths_B: kernel(
    q_BTNY, cache, table_Bb, lengths_B, scale, splits=splits
  )
  few = q_BTNY.shape[1] <= MOST_QUERIES
  return (run if few else functools.partial(_in_slices, run))(q_BTNY, lengths_B)


def _in_slices(run, q_BTNY, lengths_B):
  """`run` on a few queries at a time, each slice ending where its last does."""
  batch, queries = q_BTNY.shape[:2]
  count = -(-queries // MOST_QUERIES)
  before = count * MOST_QUERIES - queries  # padding queries, in front
  q_BTNY = jnp.pad(q_BTNY, ((0, 0), (before, 0), (0, 0), (0, 0)))
  shape = (batch, count, MOST_QUERIES, *q_BTNY.shape[2:])
  later_n1 = MOST_QUERIES * jnp.arange(count, dtype=jnp.int32)[::-1, None]
  lengths_nB = jnp.maximum(lengths_B - later_n1, 0)
  slices = (jnp.moveaxis(q_BTNY.reshape(shape), 1, 0), lengths_nB)
  o_nBTNC, lse_nBNT = jax.lax.map(lambda one: run(*one), slices)
  o_BnTNC, lse_BNnT = jnp.moveaxis(o_nBTNC, 0, 1), jnp.moveaxis(lse_nBNT, 0, 2)
  o_BTNC = o_BnTNC.reshape(batch, -1, *o_BnTNC.shape[3:])
  lse_BNT = lse_BNnT.reshape(*lse_BNnT.shape[:2], -1)
  return o_BTNC[:, before:], lse_BNT[:, :, before:]


def _check(q_BTNY, cache: LatentPages, table_Bb, lengths_B) -> None:
  if q_BTNY.ndim != 4 or not q_BTNY.size:
    raise ValueError(f'q.shape={q_BTNY.shape} must be [B, T, N, C + R], none 0')
  if q_BTNY.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'q.dtype={q_BTNY.dtype} must be bfloat16 or float32')
  _check_cache(cache, q_BTNY.shape[-1], q_BTNY.dtype)
  rows = q_BTNY.shape[0]
  if table_Bb.ndim != 2 or table_Bb.shape[0] != rows or not table_Bb.size:
    raise ValueError(
      f'table.shape={table_Bb.shape} must be [{rows}, blocks of a row]'
    )
  if lengths_B.shape != (rows,):
    raise ValueError(f'lengths.shape={lengths_B.shape} must be {(rows,)}')
  for name, x in (('table', table_Bb), ('lengths', lengths_B)):
    if x.dtype != jnp.int32:
      raise ValueError(f'{name}.dtype={x.dtype} must be int32')


def _check_cache(cache: LatentPages, width: int, dtype) -> None:
  c_psC, k_rope_psR = cache.c_psC, cache.k_rope_psR
  for name, x in (('c', c_psC), ('k_rope', k_rope_psR)):
    if len(x.shape) != 3 or x.shape[1] != PAGE or not x.shape[0]:
      raise ValueError(
        f'cache.{name}.shape={x.shape} must be [pages, {PAGE}, width]'
      )
  if c_psC.shape[0] != k_rope_psR.shape[0]:
    raise ValueError(
      f'cache.c.shape={c_psC.shape} and cache.k_rope.shape={k_rope_psR.shape} '
      f'must have as many pages'
    )
  if c_psC.shape[2] + k_rope_psR.shape[2] != width:
    raise ValueError(
      f'q.shape[-1]={width} must be {c_psC.shape[2]} + {k_rope_psR.shape[2]}, '
      f'the widths of cache.c and cache.k_rope'
    )
  of_dtype = {'cache.k_rope': k_rope_psR}
  if cache.is_quantized:
    _check_quantized(c_psC)
  else:
    of_dtype['cache.c'] = c_psC
  for name, x in of_dtype.items():
    if x.dtype != dtype:
      raise ValueError(f'{name}.dtype={x.dtype} must be {dtype}, as of q')


def _check_quantized(c_psC: quantized.Quantized) -> None:
  if c_psC.values.dtype != quantized.E4M3:
    raise ValueError(f'cache.c.dtype={c_psC.values.dtype} must be e4m3')
  if c_psC.tile != quantized.ROW:
    raise ValueError(f'cache.c.tile={c_psC.tile} must be {quantized.ROW}')
  want = (*c_psC.shape[:2], -(-c_psC.shape[2] // 128))
  if c_psC.scales.shape != want:
    raise ValueError(
      f'cache.c.scales.shape={c_psC.scales.shape} must be {want}'
    )
