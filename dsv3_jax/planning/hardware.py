"""Published peak FLOP/s of accelerators, by JAX's `device_kind`."""

# Dense BF16 [FLOP/s] of one device.
BF16_FLOPS = {
  'NVIDIA H800': 989e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}
