"""Topologies of absent hardware, for compilation ahead of time."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

H100 = 'NVIDIA H100 80GB HBM3'
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }} device_description_str: "{H100}"
"""


def h100(nodes: int, gpus: int) -> list[jax.Device]:
  """H100s on some nodes; needs the wheels of jax[cuda13], no driver.

  JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 must be set before JAX is imported.
  """
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=_H100, topology=f'1x{nodes}x{gpus}'
  )
  return list(topology.devices)


def v5p(shape: str) -> list[jax.Device]:
  """TPU v5p chips such as '2x2x4'; needs the libtpu wheel.

  TPU_SKIP_MDS_QUERY=1 must be set before JAX is imported.
  """
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=f'v5p:{shape}'
  )
  return list(topology.devices)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Compiles inside without the cache on disk.

  JAX writes programs for absent hardware to it and cannot read them.
  """
  name = 'jax_enable_compilation_cache'
  before = getattr(jax.config, name)
  jax.config.update(name, False)
  compilation_cache.reset_cache()  # or a choice made before would hold
  try:
    yield
  finally:
    jax.config.update(name, before)
    compilation_cache.reset_cache()
