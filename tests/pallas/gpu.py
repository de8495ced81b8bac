"""Hopper kernels without a Hopper: interpreted, lowered, compiled.

The interpreter runs wgmma at once, so that it misses absent waits; it sees
races between warpgroups, TMA and the proxies of shared memory.
"""

import contextlib
import importlib.util
import pathlib
import re
from typing import NamedTuple

import jax
import pytest

from benchmarks.common import targets
from pallas_kernels import compat

interpreted = pytest.mark.skipif(
  compat.RELEASE < (0, 11),
  reason='jax before 0.11 interprets no Mosaic GPU kernel in FP8',
)
transposing = pytest.mark.skipif(
  compat.RELEASE < (0, 11),
  reason='jax before 0.11 lowers no load that transposes',
)
compiled = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None
  or importlib.util.find_spec('nvidia') is None,
  reason='no jax[cuda13], whose ptxas compiles without a GPU',
)


@contextlib.contextmanager
def no_races(capfd):
  """What is interpreted inside reports no race."""
  capfd.readouterr()
  yield
  out, _ = capfd.readouterr()
  assert 'RACE DETECTED' not in out, out


def lower(function, *args) -> str:
  """The module for an H100, its kernels inside."""
  device = jax.sharding.AbstractDevice(
    device_kind=targets.H100, num_cores=132, platform='cuda'
  )
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh(
    (1,), ('x',), axis_types=auto, abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


def multiplications(text: str) -> set[str]:
  """The kinds of wgmma of a lowered module: rows, columns, depth and types."""
  return set(re.findall(r'wgmma\.mma_async\.sync\.aligned\.([a-z0-9.]+)', text))


class Machine(NamedTuple):
  """What ptxas reports of a kernel, and its instructions."""

  spilled: int
  sass: str

  def count(self, instruction: str) -> int:
    return len(re.findall(rf'\b{instruction}\b', self.sass))


def compile_kernel(monkeypatch, folder: pathlib.Path, function, *args):
  """`function`, of one kernel, compiled for an H100 down to SASS."""
  for name in ('PTX', 'PTXAS', 'SASS'):
    monkeypatch.setenv(f'MOSAIC_GPU_DUMP_{name}', '1')
  monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', str(folder))
  monkeypatch.setenv('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  mesh = jax.sharding.Mesh(targets.h100(1, 1), ('x',))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args
  )
  jax.jit(function).trace(*args).lower().compile()
  (report,) = (path.read_text() for path in folder.glob('*.ptxas'))
  (sass,) = (path.read_text() for path in folder.glob('*.sass*'))
  spills = re.findall(r'(\d+) bytes spill', report)
  return Machine(sum(map(int, spills)), sass)
