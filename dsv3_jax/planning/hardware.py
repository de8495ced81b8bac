"""Published peak FLOP/s of accelerators, by JAX's `device_kind`."""

from dsv3_jax.planning import chips

# Dense BF16 [FLOP/s] of one device.
BF16_FLOPS = {
  'NVIDIA H800': chips.CHIPS['h800'].bf16,
  'NVIDIA H100 80GB HBM3': chips.CHIPS['h100'].bf16,
  'NVIDIA H200': chips.CHIPS['h200'].bf16,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': chips.CHIPS['v5p'].bf16,
  'TPU v6 lite': chips.CHIPS['v6e'].bf16,
}
