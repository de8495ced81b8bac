"""Causal attention of MLA: one entry and one derivative for all passes.

  s_ts = scale (q_t . k_s),  p = exp(s - lse),  o = p v            (TR eq. 10)
  delta_t = o_t . do_t - dlse_t,  ds = p (do v^T - delta) scale

Nothing of size T x T is saved for the backward pass: only queries, keys, values
(which remat recomputes from the latents), the log-sum-exp, and the output; with
`pack` the output in E5M6, shared with the projection behind it (TR 3.3.3).
Output and log-sum-exp carry the checkpoint name 'attention'.

Letters: X = H + R; others as in CONTRIBUTING.md.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, quantized
from pallas_kernels.fp8_matmul import e5m6
from pallas_kernels.mla_attention import (
  backward_gpu,
  backward_tpu,
  blocks_gpu,
  pallas_gpu,
  pallas_tpu,
  reference,
  xla,
)


class Passes(NamedTuple):
  """Forward and backward, with the signatures of those in `reference`.

  The output may be f32; `attend` rounds it, and the gradients, to q's type.
  """

  forward: Callable
  backward: Callable


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
  """Causal attention of sequences on themselves (TR eqs. 4, 10).

  Differentiable in q, both parts of the keys and v, through both results.

  Args:
    q_BTNX: X = H + R, rotary part last; all four of one type, BF16 or f32.
    k_rope_BSR: shared by all heads. S = T >= 1.
    segments_BT: int32; tokens see their own segment only. None: one segment.
    scale: factor on the logits; softmax in f32.
    implementation: see `dispatch`; 'auto' is 'xla' where the kernels do not
      take the arguments: f32, heads wider than 128 + 64 or 128 on a GPU.
  Returns:
    The output, in q's type, and the log-sum-exp of the logits, f32.
  Raises:
    ValueError: shapes, types or the implementation's name do not fit.
    NotImplementedError: legal, but not by this implementation.
  """
  operands = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU)
  passes = choose(implementation, *operands, segments_BT)
  o_BTNU, lse_BNT, _ = attend(*operands, segments_BT, scale, passes, False)
  return o_BTNU, lse_BNT


def choose(implementation: str, q, k_nope, k_rope, v, segments) -> Passes:
  """The passes that `implementation` stands for with such arguments.

  Raises: as `attention`.
  """
  _check(q, k_nope, k_rope, v, segments)

  def unsupported(kernel: str) -> str | None:
    is_gpu = kernel == 'pallas_gpu'
    return blocks_gpu.unsupported(q, k_nope, k_rope, v) if is_gpu else None

  chosen = dispatch.resolve(
    implementation, 'mla_attention', unsupported, fallback='xla'
  )
  if chosen in ('reference', 'xla'):
    module = {'reference': reference, 'xla': xla}[chosen]
    return Passes(module.forward, module.backward)
  if chosen == 'pallas_gpu':
    return Passes(pallas_gpu.forward, backward_gpu.backward)
  options = {'interpret': chosen == 'pallas_interpret'}
  return Passes(
    functools.partial(pallas_tpu.forward, **options),
    functools.partial(backward_tpu.backward, **options),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
  passes: Passes,
  pack: bool,
) -> tuple[
  Float[Array, 'B T N U'], Float[Array, 'B N T'], quantized.Packed | None
]:
  """Attention by given passes, unchecked; `attention` is the public form.

  Args:
    pack: save the output as E5M6, [B * T, N * U].
  Returns:
    Output, log-sum-exp, and with `pack` what is saved instead of the output;
    no gradient goes through that.
  """
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS)
  return _attend_fwd(*args, scale, passes, pack)[0]


def _attend_fwd(
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS, scale, passes, pack
):
  inputs = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS)
  with jax.named_scope('attention'):
    o_BTNU, lse_BNT = passes.forward(*inputs, scale)
    o_BTNU = o_BTNU.astype(v_BSNU.dtype)
  saved = o_BTNU
  if pack:
    tokens = o_BTNU.shape[0] * o_BTNU.shape[1]
    saved = e5m6.quantize(o_BTNU.reshape(tokens, -1))
  saved, lse_BNT = jax.tree.map(
    lambda x: checkpoint_name(x, 'attention'), (saved, lse_BNT)
  )
  residuals = (inputs, lse_BNT, saved)
  if pack:
    return (o_BTNU, lse_BNT, saved), residuals
  # The caller goes on with the saved array: one more would be a second copy.
  return (saved, lse_BNT, None), residuals


def _attend_bwd(scale, passes, pack, residuals, cotangents):
  inputs, lse_BNT, saved = residuals
  do_BTNU, dlse_BNT, _ = cotangents
  dtype, f32 = inputs[0].dtype, jnp.float32
  o_BTNU = e5m6.unpack(saved).reshape(do_BTNU.shape) if pack else saved
  with jax.named_scope('attention'):
    delta_BNT = jnp.einsum(
      'btnu,btnu->bnt',
      o_BTNU.astype(f32),
      do_BTNU.astype(f32),
      precision=jax.lax.Precision.HIGHEST,
    )
    delta_BNT -= dlse_BNT
    grads = passes.backward(*inputs, scale, lse_BNT, delta_BNT, do_BTNU)
    return *(x.astype(dtype) for x in grads), None


attend.defvjp(_attend_fwd, _attend_bwd)


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
