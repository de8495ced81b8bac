"""Attention of MLA: arguments checked once for all implementations."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.mla_attention import (
  backward_gpu,
  backward_tpu,
  blocks_gpu,
  pallas_gpu,
  pallas_tpu,
  reference,
)


def attention(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BT: Int[Array, 'B T'] | None = None,
  *,
  scale: float,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B N T']]:
  """Causal attention of sequences on themselves (TR eqs. 5, 10).

  Differentiable in q, both parts of the keys and v, through both results.

  Args:
    q_BTNX: X = H + R, rotary part last; all four of one type, BF16 or f32.
    k_rope_BSR: shared by all heads. S = T >= 1.
    segments_BT: int32; tokens see their own segment only. None: one segment.
    scale: factor on the logits; softmax in f32.
    implementation: see `dispatch`; 'auto' on a GPU is the reference where the
      kernels do not take the arguments: f32, heads wider than 128 + 64 or 128.
  Returns:
    The output, in q's type, and the log-sum-exp of the logits, f32.
  Raises:
    ValueError: shapes, types or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation.
  """
  operands = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU)
  chosen = choose(implementation, *operands, segments_BT)
  return _attention(*operands, segments_BT, scale, chosen)


def choose(implementation: str, q, k_nope, k_rope, v, segments) -> str:
  """What `implementation` stands for with such arguments; see `ways`.

  Raises: as `attention`.
  """
  _check(q, k_nope, k_rope, v, segments)
  chosen = dispatch.resolve(implementation)
  refused = chosen == 'pallas_gpu' and blocks_gpu.refusal(q, k_nope, k_rope, v)
  return _without_kernel(refused, implementation) if refused else chosen


def ways(chosen: str) -> tuple[Callable, Callable]:
  """Forward and backward passes of what `choose` gave, as in `reference`."""
  if chosen == 'reference':
    return reference.forward, reference.backward
  if chosen == 'pallas_gpu':
    return pallas_gpu.forward, backward_gpu.backward
  how = {'interpret': chosen == 'pallas_interpret'}
  return (
    functools.partial(pallas_tpu.forward, **how),
    functools.partial(backward_tpu.backward, **how),
  )


@functools.cache
def _without_kernel(why: str, implementation: str) -> str:
  if implementation != 'auto':
    raise NotImplementedError(why)
  logging.getLogger(__name__).info('mla_attention: reference, %s', why)
  return 'reference'


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT, scale, chosen
):
  forward, _ = ways(chosen)
  return forward(q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BT, scale)


def _forward(*args):
  o_BTNU, lse_BNT = _attention(*args)
  return (o_BTNU, lse_BNT), (args[:5], o_BTNU, lse_BNT)


def _backward(scale, chosen, residuals, cotangents):
  args, o_BTNU, lse_BNT = residuals
  do_BTNU, dlse_BNT = cotangents
  f32 = jnp.float32
  delta_BNT = jnp.einsum(
    'btnu,btnu->bnt',
    o_BTNU.astype(f32),
    do_BTNU.astype(f32),
    precision=jax.lax.Precision.HIGHEST,
  )
  delta_BNT -= dlse_BNT
  _, backward = ways(chosen)
  return *backward(*args, scale, lse_BNT, delta_BNT, do_BTNU), None


_attention.defvjp(_forward, _backward)


def _check(q, k_nope, k_rope, v, segments) -> None:
  if q.ndim != 4 or k_nope.ndim != 4 or k_rope.ndim != 3 or v.ndim != 4:
    raise ValueError(
      'q, k_nope, k_rope and v must have 4, 4, 3 and 4 axes, these have '
      f'{q.ndim}, {k_nope.ndim}, {k_rope.ndim} and {v.ndim}'
    )
  batch, length, heads, width = q.shape
  if not length:
    raise ValueError(f'q.shape={q.shape} must have a token')
  nope, rope = k_nope.shape[-1], k_rope.shape[-1]
  if width != nope + rope:
    raise ValueError(f'q is {width} wide, must be H + R = {nope} + {rope}')
  _expect('k_nope', k_nope, (batch, length, heads, nope))
  _expect('k_rope', k_rope, (batch, length, rope))
  _expect('v', v, (batch, length, heads, v.shape[-1]))
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'q.dtype={q.dtype} must be bfloat16 or float32')
  for name, x in (('k_nope', k_nope), ('k_rope', k_rope), ('v', v)):
    if x.dtype != q.dtype:
      raise ValueError(f'{name}.dtype={x.dtype} must be {q.dtype}, as of q')
  if segments is not None:
    _expect('segments', segments, (batch, length))
    if segments.dtype != jnp.int32:
      raise ValueError(f'segments.dtype={segments.dtype} must be int32')


def _expect(name: str, x, shape: tuple[int, ...]) -> None:
  if x.shape != shape:
    raise ValueError(f'{name}.shape={x.shape} must be {shape}')
