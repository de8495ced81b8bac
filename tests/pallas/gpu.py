"""Hopper kernels without a Hopper: interpreted, lowered, compiled.

The interpreter runs wgmma at once, so that it misses absent waits; it sees
races between warpgroups, TMA and the proxies of shared memory.
"""

import contextlib
import importlib.util
import re

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
_without_ptxas = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None
  or importlib.util.find_spec('nvidia') is None,
  reason='no jax[cuda13], whose ptxas compiles without a GPU',
)


def compiled(test):
  """For `make compiled`, which has the compilers."""
  return pytest.mark.compiled(_without_ptxas(test))


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
