"""Hopper kernels compiled for an H100 that is not there, down to SASS.

Needs the wheels of jax[cuda13], whose ptxas compiles without a GPU, and
nvidia-cuda-nvdisasm, which that extra does not bring.
"""

import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax

from benchmarks.common import targets

_DUMPS = ('PTX', 'PTXAS', 'SASS')
_SET_REGISTERS = re.compile(r'USETMAXREG\S+ (?:UP\d, )?(0x[0-9a-f]+)')


class Machine(NamedTuple):
  """What ptxas reports of a kernel, and its instructions.

  registers: of a thread at the start; a warpgroup may then ask for another
    number. spilled: bytes stored and bytes loaded, added. seconds: of the whole
    compilation, with its listings.
  """

  registers: int
  spilled: int
  sass: str
  seconds: float

  def count(self, instruction: str) -> int:
    return len(re.findall(rf'\b{instruction}\b', self.sass))

  @property
  def asked_registers(self) -> list[int]:
    """Numbers of registers that warpgroups ask for."""
    numbers = _SET_REGISTERS.findall(self.sass)
    return sorted({int(number, 16) for number in numbers})


def read(report: str, sass: str, seconds: float) -> Machine:
  """Of one kernel. report: that of ptxas."""
  (registers,) = re.findall(r'Used (\d+) registers', report)
  # Of a spill a warning tells too, before the kernel's own line.
  (line,) = re.findall(r'.*bytes stack frame.*', report)
  spills = re.findall(r'(\d+) bytes spill', line)
  return Machine(int(registers), sum(map(int, spills)), sass, seconds)


def compile_kernel(function: Callable, *args) -> Machine:
  """`function`, of one kernel, compiled for an H100.

  args: shapes.

  Raises:
    RuntimeError: nvdisasm is absent.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    variables = {f'MOSAIC_GPU_DUMP_{dump}': '1' for dump in _DUMPS}
    variables['MOSAIC_GPU_DUMP_TO'] = name
    variables['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
    with mock.patch.dict(os.environ, variables), targets.without_cache():
      mesh = jax.sharding.Mesh(targets.h100(1, 1), ('x',))
      spec = jax.sharding.PartitionSpec()
      replicated = jax.sharding.NamedSharding(mesh, spec)
      args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        args,
      )
      start = time.perf_counter()
      jax.jit(function).trace(*args).lower().compile()
      seconds = time.perf_counter() - start
    (report,) = (path.read_text() for path in folder.glob('*.ptxas'))
    listings = [path.read_text() for path in folder.glob('*.sass*')]
  if not listings:
    raise RuntimeError('no SASS: pip install nvidia-cuda-nvdisasm')
  (sass,) = listings
  return read(report, sass, seconds)
