"""Causal attention of whole sequences, or of a device's part of them.

The maths and its derivative are in `pallas_kernels.mla_attention`; here the
passes are chosen: those of a sequence on itself, or, where the `context` axis
shards sequences, those of `context_attention`.
"""

from jaxtyping import Array, Float, Int

from dsv3_jax.distributed import collectives
from dsv3_jax.ops import context_attention
from pallas_kernels import quantized
from pallas_kernels.mla_attention import api as mla_attention


def causal(
  q_BTNX: Float[Array, 'B T N X'],
  k_nope_BSNH: Float[Array, 'B S N H'],
  k_rope_BSR: Float[Array, 'B S R'],
  v_BSNU: Float[Array, 'B S N U'],
  segments_BS: Int[Array, 'B S'] | None,
  scale: float,
  pack: bool = False,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N U'], quantized.Packed | None]:
  """Causal attention of a sequence on itself (TR eqs. 4, 10).

  Where `context` shards the sequence, queries are this device's and keys all.

  Args:
    q_BTNX: X = H + R, rotary part last.
    segments_BS: tokens attend within their segment only; None: to all before.
    scale: factor on the logits; softmax in f32.
    pack: save the output as E5M6, [B * T, N * U].
    implementation: of `mla_attention.attention`.
  Returns:
    The output, and with `pack` what the backward pass has instead of it.
  Raises:
    ValueError, NotImplementedError: as `mla_attention.attention`; sharded
      sequences have the implementation 'xla' only.
  """
  args = (q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU, segments_BS)
  if collectives.axis_size('context') == 1:
    passes = mla_attention.choose(implementation, *args)
  elif implementation in ('auto', 'xla'):
    forward, backward = context_attention.forward, context_attention.backward
    passes = mla_attention.Passes(forward, backward)
  else:
    raise NotImplementedError(f'no {implementation!r} for sharded sequences')
  o_BTNU, _, packed = mla_attention.attend(*args, scale, passes, pack)
  return o_BTNU, packed
