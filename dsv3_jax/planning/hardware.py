"""Published peaks of accelerators, by the name that JAX gives the device."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Dense peaks of one device.

  bf16_flops [FLOP/s], memory_bytes, memory_bandwidth [bytes/s].
  """

  bf16_flops: float
  memory_bytes: float
  memory_bandwidth: float


CHIPS = {
  'NVIDIA H800': Chip(
    bf16_flops=989e12, memory_bytes=80e9, memory_bandwidth=3.35e12
  ),
  'NVIDIA H100 80GB HBM3': Chip(
    bf16_flops=989e12, memory_bytes=80e9, memory_bandwidth=3.35e12
  ),
  'NVIDIA H200': Chip(
    bf16_flops=989e12, memory_bytes=141e9, memory_bandwidth=4.8e12
  ),
  'NVIDIA A100-SXM4-80GB': Chip(
    bf16_flops=312e12, memory_bytes=80e9, memory_bandwidth=2.04e12
  ),
  'TPU v4': Chip(
    bf16_flops=275e12, memory_bytes=32e9, memory_bandwidth=1.23e12
  ),
  'TPU v5 lite': Chip(
    bf16_flops=197e12, memory_bytes=16e9, memory_bandwidth=0.82e12
  ),
  'TPU v5': Chip(
    bf16_flops=459e12, memory_bytes=95e9, memory_bandwidth=2.77e12
  ),
  'TPU v6 lite': Chip(
    bf16_flops=918e12, memory_bytes=32e9, memory_bandwidth=1.64e12
  ),
}
