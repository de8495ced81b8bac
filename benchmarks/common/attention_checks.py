"""The attention kernels that `benchmarks.hopper` checks: decode and training.

Both have the fields of `hopper_parts.Kernel` that checks need.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import mla_attention, mla_decode
from pallas_kernels.mla_attention import backward_gpu
from pallas_kernels.mla_attention import cases as attention_cases
from pallas_kernels.mla_attention import pallas_gpu as attention_gpu
from pallas_kernels.mla_attention import reference as attention_reference
from pallas_kernels.mla_decode import cases as decode_cases
from pallas_kernels.mla_decode import pallas_gpu as decode_gpu
from pallas_kernels.mla_decode import reference as decode_reference

DIFFERENCE = 1e-5  # of any result from the reference's
CASES = {
  'whole': attention_cases.Case(1, 1024, 8),
  'ragged': attention_cases.Case(2, 1027, 4),
  'packed': attention_cases.Case(1, 900, 8, samples=(300, 3, 400)),
}
DECODED = ('v3_heads_16', 'ragged', 'speculative')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """kind: 'attention', 'decode' or 'decode fp8'."""

  kind: str
  name: str
  case: Any
  mode: str

  def draw(self, key: jax.Array) -> tuple:
    if self.kind == 'attention':
      return mla_attention.draw(self.case, key)
    cache = 'fp8' if 'fp8' in self.kind else 'bf16'
    return mla_decode.draw(self.case, cache, key)

  def function(self, mode: str) -> Callable[..., tuple]:
    """Of the operands of `draw`: all results, and of training all gradients."""
    more = {} if mode == 'reference' else {'interpret': mode == 'interpret'}
    if self.kind != 'attention':
      module = decode_reference if mode == 'reference' else decode_gpu
      return functools.partial(module.decode, scale=mla_decode.SCALE, **more)
    forward, backward = attention_gpu.forward, backward_gpu.backward
    if mode == 'reference':
      forward = attention_reference.forward
      backward = attention_reference.backward
    scale = (self.case.nope + self.case.rope) ** -0.5
    f32 = lambda x: x.astype(jnp.float32)

    def both(*args):
      if mode == 'reference':  # so that one side alone is rounded
        args = [x if x is None or x.ndim == 2 else f32(x) for x in args]
      *operands, do_BTNU = args
      o_BTNU, lse_BNT = forward(*operands, scale, **more)
      delta_BTN = jnp.sum(f32(o_BTNU) * f32(do_BTNU), axis=-1)
      kept = lse_BNT, jnp.swapaxes(delta_BTN, 1, 2), do_BTNU
      return o_BTNU, lse_BNT, *backward(*operands, scale, *kept, **more)

    return both

  @property
  def bound(self) -> float:
    return DIFFERENCE

  def error(self, got: tuple, want: tuple) -> float:
    return float(_difference(got, want))


def kernels(mode: str, dry_run: bool) -> list[Kernel]:
  """Every kernel at small shapes."""
  training, decoding = CASES, {n: decode_cases.SMALL[n] for n in DECODED}
  fp8 = {'ragged': decode_cases.Case((200, 1, 66), 3, queries=2, latent=256)}
  if dry_run:
    training = {'tiny': attention_cases.SMALL['tiny']}
    decoding, fp8 = {'tiny': decode_cases.SMALL['tiny']}, {}
  return [
    Kernel(kind, name, case, mode)
    for kind, table in (
      ('attention', training),
      ('decode', decoding),
      ('decode fp8', fp8),
    )
    for name, case in table.items()
  ]


@jax.jit
def _difference(got: tuple, want: tuple):
  """The largest of the results, 1 - 2 <x, y> / (|x|^2 + |y|^2)."""

  def one(x, y):
    x, y = (z.astype(jnp.float32) for z in (x, y))
    norms = jnp.sum(x**2) + jnp.sum(y**2)
    return jnp.sum((x - y) ** 2) / jnp.maximum(norms, 1e-30)

  return jnp.stack(list(map(one, got, want))).max()
