"""Compiles the TPU kernels at the 671B's shapes on a machine without a TPU.

Question: does Mosaic accept them: are all layouts legal, do the blocks fit into
a core's vector memory? Needs the `libtpu` wheel beside JAX, no device:

  JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \\
    python -m benchmarks.compile_kernels_tpu [--chip=v5p ...] \\
    [--only=grouped] [--output=FILE]

Prints a row for each kernel and shape, a column for each chip: seconds that the
compiler took, or the first words of its refusal, then all of it below (in FILE
its first line). Answers nothing about speed or about numbers. The last row is a
control that has to be refused: its blocks are too large for any chip. Exits
with 1 if a kernel is refused or the control is not.
"""

import argparse
import functools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from benchmarks.common import kernel_programs, report, targets
from pallas_kernels.fp8_matmul import pallas_tpu, quantize_tpu
from pallas_kernels.grouped_matmul import pallas_tpu as grouped_tpu
from pallas_kernels.mla_attention import backward_tpu as attention_gradient
from pallas_kernels.mla_attention import pallas_tpu as attention_tpu
from pallas_kernels.mla_decode import pallas_tpu as decode_tpu

BF16, F32 = kernel_programs.BF16, kernel_programs.F32
ABOUT = __doc__.split('\n\n', 1)[1].strip()
CONTROL = 'control'
Program = kernel_programs.Program


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


def programs() -> dict[str, Program]:
  """Products of the linears and the experts, quantisers, both attentions."""
  return (
    kernel_programs.dense(pallas_tpu.matmul)
    | kernel_programs.grouped(grouped_tpu.grouped, grouped_tpu.grouped_k)
    | kernel_programs.quantisers(quantize_tpu.quantize_both, (BF16, F32))
    | kernel_programs.attention(
      attention_tpu.forward, {'grad': attention_gradient.backward}, (BF16, F32)
    )
    | kernel_programs.decoding(decode_tpu.decode)
  )


def too_large() -> Program:
  """A product whose blocks fit into no core."""
  sizes = pallas_tpu.BlockSizes(128, 1024, 2**15)
  product = functools.partial(pallas_tpu.matmul, out_dtype=F32, blocks=sizes)
  rows = kernel_programs.rows
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
    with targets.without_cache():
      placed = jax.sharding.SingleDeviceSharding(device)
      lower(program, chip, placed).compile()
  except jax.errors.JaxRuntimeError as refusal:
    return str(refusal)
  return f'{time.perf_counter() - start:.1f} s'


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chip', action='append', choices=CHIPS)
  parser.add_argument('--only', default='', help='part of a name')
  parser.add_argument(
    '--output', type=pathlib.Path, help='Markdown to append the table to'
  )
  args = parser.parse_args(argv)
  chips = args.chip or list(CHIPS)
  refusals, control, rows, wrong = [], {CONTROL: too_large()}, [], 0
  print(report.line(('kernel', *chips)))
  print(report.line(('---',) * (1 + len(chips))))
  for name, program in (programs() | control).items():
    if args.only not in name and name != CONTROL:
      continue
    results = {chip: compile_for(program, CHIPS[chip]) for chip in chips}
    words = {chip: text.split(':')[0] for chip, text in results.items()}
    rows.append({'kernel': name} | words)
    print(report.line(rows[-1].values()), flush=True)
    refused = {c: text for c, text in results.items() if text[-2:] != ' s'}
    refusals += [f'{name}, {c}: {text}' for c, text in refused.items()]
    wrong += len(refused) != (len(chips) if name == CONTROL else 0)
  print('', *refusals, sep='\n\n')
  if args.output:
    about = '\n\n'.join([ABOUT, *(text.split('\n')[0] for text in refusals)])
    report.write(args.output, 'compile_kernels_tpu', about + '\n', rows)
  return int(bool(wrong))


if __name__ == '__main__':
  sys.exit(main())
