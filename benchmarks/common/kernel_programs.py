"""The kernels' arguments at the 671B's shapes, to be compiled and not run.

Each function takes the entry points of one accelerator and returns its programs
by name: the kernel, what it computes, the case.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import cases
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.mla_attention import cases as attention_cases
from pallas_kernels.mla_decode import api as decode_api
from pallas_kernels.mla_decode import cases as decode_cases

BF16, F32 = jnp.bfloat16, jnp.float32
SCALE = 0.1352338  # of the 671B's scores, with YaRN
TOKENS = 4096


class Program(NamedTuple):
  """A function, the shapes of its arguments, and those in words.

  shape: of a product, rows x columns x numbers that are summed.
  """

  function: Callable
  args: tuple
  shape: str = ''


def rows(*shape: int):
  """Shapes of a tensor with 1 x 128 tiles."""
  return _quantized(shape, quantized.ROW)


def blocks(*shape: int):
  """Shapes of a tensor with 128 x 128 tiles."""
  return _quantized(shape, quantized.BLOCK)


def _quantized(shape: tuple[int, ...], tile: tuple[int, int]):
  *lead, i, j = shape
  tiles = (*lead, -(-i // tile[0]), -(-j // tile[1]))
  struct = jax.ShapeDtypeStruct
  return quantized.Quantized(
    struct(shape, quantized.E4M3), struct(tiles, F32), tile
  )


def dense(matmul: Callable) -> dict[str, Program]:
  """The three products of every linear."""
  by_name = {}
  for name, (m, n, k) in cases.V3.items():
    for kind, dtype, args, sizes in (
      ('fprop', BF16, (rows(m, k), blocks(n, k)), (m, n, k)),
      ('dgrad', BF16, (rows(m, n), blocks(k, n)), (m, k, n)),
      ('wgrad', F32, (rows(k, m), rows(n, m)), (k, n, m)),
    ):
      product = functools.partial(matmul, out_dtype=dtype)
      words = ' x '.join(map(str, sizes))
      by_name[f'matmul {kind} {name}'] = Program(product, args, words)
  return by_name


def grouped(grouped: Callable, grouped_k: Callable) -> dict[str, Program]:
  """The three products of the routed experts."""
  by_name = {}
  for name, (sizes, n, k) in grouped_cases.V3.items():
    j, e = sum(sizes), len(sizes)
    which = (
      jax.ShapeDtypeStruct((j // 128,), jnp.int32),
      jax.ShapeDtypeStruct((), jnp.int32),
    )
    product = functools.partial(grouped, out_dtype=BF16)
    gradient = functools.partial(grouped_k, num_experts=e)
    for kind, function, args, words in (
      ('fprop', product, (rows(j, k), blocks(e, n, k)), f'{j} x {n} x {k}'),
      ('dgrad', product, (rows(j, n), blocks(e, k, n)), f'{j} x {k} x {n}'),
      ('wgrad', gradient, (rows(k, j), rows(n, j)), f'{k} x {n} x {j}'),
    ):
      words = f'{words}, {e} experts'
      program = Program(function, (*args, *which), words)
      by_name[f'grouped {kind} {name}'] = program
  return by_name


def quantisers(quantize_both: Callable, dtypes: Sequence) -> dict[str, Program]:
  """Activations of every width, to rows and to columns."""
  both = functools.partial(quantize_both, pow2=True)
  by_name = {}
  for width in widths():
    for dtype in dtypes:
      x_MD = jax.ShapeDtypeStruct((TOKENS, width), dtype)
      name = f'quantize {width} {jnp.dtype(dtype).name}'
      by_name[name] = Program(both, (x_MD,), f'{TOKENS} x {width}')
  return by_name


def widths() -> list[int]:
  """Of the linears' outputs."""
  return sorted({c.n for c in cases.V3.values()})


def attention(
  forward: Callable, gradients: Mapping[str, Callable], dtypes: Sequence
) -> dict[str, Program]:
  """gradients: by name, each of the arguments of `backward`."""
  by_name = {}
  for name, case in attention_cases.V3.items():
    tokens = case.batch, case.length
    lead = *tokens, case.heads
    of_query = jax.ShapeDtypeStruct((case.batch, case.heads, case.length), F32)
    words = f'{case.batch} x {case.length}, {case.heads} heads'
    segments_BT = None
    if case.samples is not None:
      segments_BT = jax.ShapeDtypeStruct(tokens, jnp.int32)
      words += f', {len(case.samples)} samples'
    for dtype in dtypes:
      struct = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
      args = (
        struct(*lead, case.nope + case.rope),
        struct(*lead, case.nope),
        struct(*tokens, case.rope),
        struct(*lead, case.value),
        segments_BT,
      )
      run = functools.partial(forward, scale=SCALE)
      which = f'{jnp.dtype(dtype).name} {name}'
      by_name[f'attention fprop {which}'] = Program(run, args, words)
      args += (of_query, of_query, struct(*lead, case.value))
      for title, gradient in gradients.items():
        run = functools.partial(_gradient, gradient)
        by_name[f'attention {title} {which}'] = Program(run, args, words)
  return by_name


def _gradient(gradient, *args):
  return gradient(*args[:5], SCALE, *args[5:])


def decoding(decode: Callable) -> dict[str, Program]:
  """Of BF16 and FP8 caches."""
  by_name = {}
  for name, case in decode_cases.V3.items():
    batch, pages = len(case.lengths), len(case.lengths) * case.blocks
    width = case.latent + case.rotary
    q_BTNY = jax.ShapeDtypeStruct(
      (batch, case.queries, case.heads, width), BF16
    )
    page = lambda width, pages=pages: (pages, decode_api.PAGE, width)
    k_rope_psR = jax.ShapeDtypeStruct(page(case.rotary), BF16)
    which = (
      jax.ShapeDtypeStruct((batch, case.blocks), jnp.int32),
      jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    words = f'{batch} x {case.queries}, {case.heads} heads, {pages} pages'
    for kind, c_psC in (
      ('bf16', jax.ShapeDtypeStruct(page(case.latent), BF16)),
      ('fp8', rows(*page(case.latent))),
    ):
      cache = decode_api.LatentPages(c_psC, k_rope_psR)
      run = functools.partial(decode, scale=SCALE)
      args = (q_BTNY, cache, *which)
      by_name[f'decode {kind} {name}'] = Program(run, args, words)
  return by_name
