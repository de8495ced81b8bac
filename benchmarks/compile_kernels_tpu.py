"""Compiles the TPU kernels at the 671B's shapes on a machine without a TPU.

Question: does Mosaic accept them: are all layouts legal, do the blocks fit into
a core's vector memory? Needs the `libtpu` wheel beside JAX, no device:

  JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \\
    python -m benchmarks.compile_kernels_tpu [--chip=v5p ...] [--only=grouped]

Prints a row for each kernel and shape, a column for each chip: seconds that the
compiler took, or the first words of its refusal, then all of it below.
Answers nothing about speed or about numbers. The last row is a control that has
to be refused: its blocks are too large for any chip.
"""

import argparse
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import cases, pallas_tpu, quantize_tpu
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul import pallas_tpu as grouped_tpu
from pallas_kernels.mla_attention import backward_tpu as attention_gradient
from pallas_kernels.mla_attention import cases as attention_cases
from pallas_kernels.mla_attention import pallas_tpu as attention_tpu
from pallas_kernels.mla_decode import api as decode_api
from pallas_kernels.mla_decode import cases as decode_cases
from pallas_kernels.mla_decode import pallas_tpu as decode_tpu

BF16, F32 = jnp.bfloat16, jnp.float32
CONTROL = 'control'


class Chip(NamedTuple):
  """A small topology of a chip and what JAX calls its device."""

  topology: str
  device_kind: str
  num_cores: int


CHIPS = {
  'v5p': Chip('v5p:2x2x1', 'TPU v5', 2),
  'v6e': Chip('v6e:2x2', 'TPU v6 lite', 1),
  'v7x': Chip('tpu7x:2x2x1', 'TPU7x', 1),
}


class Program(NamedTuple):
  """A function and the shapes of its arguments."""

  function: functools.partial
  args: tuple


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


def programs() -> dict[str, Program]:
  """Products of the linears and the experts, quantisers, both attentions."""
  return _dense() | _grouped() | _quantisers() | _attention() | _decoding()


def _dense() -> dict[str, Program]:
  by_name = {}
  for name, (m, n, k) in cases.V3.items():
    for kind, dtype, args in (
      ('fprop', BF16, (rows(m, k), blocks(n, k))),
      ('dgrad', BF16, (rows(m, n), blocks(k, n))),
      ('wgrad', F32, (rows(k, m), rows(n, m))),
    ):
      product = functools.partial(pallas_tpu.matmul, out_dtype=dtype)
      by_name[f'matmul {kind} {name}'] = Program(product, args)
  return by_name


def _grouped() -> dict[str, Program]:
  by_name = {}
  for name, (sizes, n, k) in grouped_cases.V3.items():
    j, e = sum(sizes), len(sizes)
    which = (
      jax.ShapeDtypeStruct((j // 128,), jnp.int32),
      jax.ShapeDtypeStruct((), jnp.int32),
    )
    product = functools.partial(grouped_tpu.grouped, out_dtype=BF16)
    gradient = functools.partial(grouped_tpu.grouped_k, num_experts=e)
    for kind, function, args in (
      ('fprop', product, (rows(j, k), blocks(e, n, k))),
      ('dgrad', product, (rows(j, n), blocks(e, k, n))),
      ('wgrad', gradient, (rows(k, j), rows(n, j))),
    ):
      by_name[f'grouped {kind} {name}'] = Program(function, (*args, *which))
  return by_name


def _quantisers() -> dict[str, Program]:
  both = functools.partial(quantize_tpu.quantize_both, pow2=True)
  by_name = {}
  for width in sorted({c.n for c in cases.V3.values()}):
    for dtype in (BF16, F32):
      x_MD = jax.ShapeDtypeStruct((4096, width), dtype)
      name = f'quantize {width} {jnp.dtype(dtype).name}'
      by_name[name] = Program(both, (x_MD,))
  return by_name


def _attention() -> dict[str, Program]:
  by_name = {}
  for name, case in attention_cases.V3.items():
    tokens = case.batch, case.length
    lead = *tokens, case.heads
    of_query = jax.ShapeDtypeStruct((case.batch, case.heads, case.length), F32)
    segments_BT = None
    if case.samples is not None:
      segments_BT = jax.ShapeDtypeStruct(tokens, jnp.int32)
    for dtype in (BF16, F32):
      struct = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
      args = (
        struct(*lead, case.nope + case.rope),
        struct(*lead, case.nope),
        struct(*tokens, case.rope),
        struct(*lead, case.value),
        segments_BT,
      )
      options = {'scale': 0.1352338}
      forward = functools.partial(attention_tpu.forward, **options)
      backward = functools.partial(_attention_gradient, **options)
      which = f'{jnp.dtype(dtype).name} {name}'
      by_name[f'attention fprop {which}'] = Program(forward, args)
      args += (of_query, of_query, struct(*lead, case.value))
      by_name[f'attention grad {which}'] = Program(backward, args)
  return by_name


def _attention_gradient(*args, scale):
  return attention_gradient.backward(*args[:5], scale, *args[5:])


def _decoding() -> dict[str, Program]:
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
    for kind, c_psC in (
      ('bf16', jax.ShapeDtypeStruct(page(case.latent), BF16)),
      ('fp8', rows(*page(case.latent))),
    ):
      cache = decode_api.LatentPages(c_psC, k_rope_psR)
      decode = functools.partial(decode_tpu.decode, scale=0.1352338)
      args = (q_BTNY, cache, *which)
      by_name[f'decode {kind} {name}'] = Program(decode, args)
  return by_name


def too_large() -> Program:
  """A product whose blocks fit into no core."""
  sizes = pallas_tpu.BlockSizes(128, 1024, 2**15)
  product = functools.partial(pallas_tpu.matmul, out_dtype=F32, blocks=sizes)
  return Program(product, (rows(128, 2**16), rows(1024, 2**16)))


def lower(program: Program, chip: Chip, sharding=None):
  """Lowered for a TPU that need not be there."""
  device = jax.sharding.AbstractDevice(
    device_kind=chip.device_kind, num_cores=chip.num_cores, platform='tpu'
  )
  mesh = jax.sharding.AbstractMesh(
    (1,),
    ('x',),
    axis_types=(jax.sharding.AxisType.Auto,),
    abstract_device=device,
  )
  options = {'in_shardings': sharding, 'out_shardings': sharding}
  jitted = jax.jit(program.function, **(options if sharding else {}))
  with jax.sharding.use_abstract_mesh(mesh):
    return jitted.trace(*program.args).lower(lowering_platforms=('tpu',))


def compile_for(program: Program, chip: Chip) -> str:
  """Seconds taken, or the compiler's refusal."""
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=chip.topology
  )
  device = topology.devices[0]
  if device.device_kind != chip.device_kind:
    raise ValueError(f'{chip.topology} is of {device.device_kind!r}')
  start = time.perf_counter()
  try:
    lower(program, chip, jax.sharding.SingleDeviceSharding(device)).compile()
  except jax.errors.JaxRuntimeError as refusal:
    return str(refusal)
  return f'{time.perf_counter() - start:.1f} s'


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chip', action='append', choices=CHIPS)
  parser.add_argument('--only', default='', help='part of a name')
  args = parser.parse_args(argv)
  chips = args.chip or list(CHIPS)
  print('| kernel |', ' | '.join(chips), '|')
  print('| --- |', ' | '.join('---' for _ in chips), '|')
  refusals, control = [], {CONTROL: too_large()}
  for name, program in (programs() | control).items():
    if args.only not in name and name != CONTROL:
      continue
    results = [compile_for(program, CHIPS[chip]) for chip in chips]
    print(
      f'| {name} |',
      ' | '.join(r.split(':')[0] for r in results),
      '|',
      flush=True,
    )
    refusals += [f'{name}: {r}' for r in results if not r.endswith(' s')]
  print('', *refusals, sep='\n\n')


if __name__ == '__main__':
  main()
