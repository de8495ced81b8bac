"""Compiles the Hopper kernels at the 671B's shapes on a machine without a GPU.

Question: does ptxas accept them for sm_90a, do registers suffice, and which
instructions are left? Needs the wheels of `jax[cuda13]` and
`nvidia-cuda-nvdisasm`, no device and no driver (`make compiled` has both):

  JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \\
    python -m benchmarks.compile_kernels_gpu [--only=grouped] [--output=FILE]

A row is a kernel and a shape. `registers` are a thread's at the start,
`of_warpgroups` those that loaders and consumers then ask for. `spilled_bytes`
are stored plus loaded, as ptxas counts them. The other columns count SASS
instructions: products in FP8 (QGMMA) and BF16 (HGMMA), loads and stores of
TMA (UTMALDG, UTMASTG), loads from shared memory for tensor cores (LDSM), loads
and stores of spilled registers (LDL, STL), and barriers among threads (BAR).
`seconds` are those of the whole compilation, with its listings.

Answers nothing about speed or about numbers: nothing runs.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp

from benchmarks.common import kernel_programs, machine_code, report
from pallas_kernels.fp8_matmul import pallas_gpu, quantize_gpu
from pallas_kernels.grouped_matmul import pallas_gpu as grouped_gpu
from pallas_kernels.mla_attention import backward_gpu
from pallas_kernels.mla_attention import pallas_gpu as attention_gpu
from pallas_kernels.mla_decode import pallas_gpu as decode_gpu

INSTRUCTIONS = (
  'QGMMA', 'HGMMA', 'UTMALDG', 'UTMASTG', 'LDSM', 'LDL', 'STL', 'BAR'
)  # fmt: skip
ABOUT = __doc__.split('\n\n', 1)[1].strip()
Program = kernel_programs.Program


def programs() -> dict[str, Program]:
  """Of one kernel each; all take BF16 or FP8."""
  bf16 = (jnp.bfloat16,)
  gradients = {'dq': _query_gradient, 'dkv': _key_gradients}
  return (
    kernel_programs.dense(pallas_gpu.matmul)
    | kernel_programs.grouped(grouped_gpu.grouped, grouped_gpu.grouped_k)
    | kernel_programs.quantisers(quantize_gpu.quantize_both, bf16)
    | _requantisers()
    | kernel_programs.attention(attention_gpu.forward, gradients, bf16)
    | kernel_programs.decoding(decode_gpu.decode)
  )


def _query_gradient(*args):
  return backward_gpu.backward(*args)[0]


def _key_gradients(*args):
  return backward_gpu.backward(*args)[1:]


def _requantisers() -> dict[str, Program]:
  tokens = kernel_programs.TOKENS
  return {
    f'requantize_transposed {width}': Program(
      quantize_gpu.requantize_transposed,
      (kernel_programs.rows(tokens, width),),
      f'{tokens} x {width}',
    )
    for width in kernel_programs.widths()
  }


def measure(name: str, program: Program) -> report.Row:
  """One row."""
  machine = machine_code.compile_kernel(program.function, *program.args)
  return {
    'kernel': name,
    'shape': program.shape,
    'seconds': machine.seconds,
    'registers': machine.registers,
    'of_warpgroups': ', '.join(map(str, machine.asked_registers)),
    'spilled_bytes': machine.spilled,
  } | {title: machine.count(title) for title in INSTRUCTIONS}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='part of a name')
  parser.add_argument(
    '--output', type=pathlib.Path, help='Markdown to append the table to'
  )
  args = parser.parse_args(argv)
  rows = []
  for name, program in programs().items():
    if args.only not in name:
      continue
    rows.append(measure(name, program))
    if len(rows) == 1:
      print(report.line(rows[0]))
      print(report.line('---' for _ in rows[0]))
    print(report.line(rows[-1].values()), flush=True)
    jax.clear_caches()
  if args.output:
    report.write(args.output, 'compile_kernels_gpu', ABOUT + '\n', rows)


if __name__ == '__main__':
  main()
