"""Inference in numbers: cache, time per token, throughput of a node.

The limit model (ISCA 2.3.2) counts the all-to-alls alone. A token goes to
`copies` experts, as FP8 and back as BF16, and two micro-batches take turns, so
that a layer takes twice the exchange of one:

  time per token = 2 * layers * tokens * copies * hidden * (1 + 2) / bandwidth

The roofline adds computation, weights and cache that are read; the slower of
computation and exchange counts. Both are bounds: no kernel reaches its peak.
"""

import dataclasses

from dsv3_jax import config, precision
from dsv3_jax.planning import chips, flops, kernels, memory


def limit_seconds_per_token(
  bandwidth: float,
  *,
  layers: int = 61,
  hidden: int = 7000,
  tokens: int = 32,
  copies: int = 9,
) -> float:
  """The limit model; the defaults are the paper's, which rounds 7168 to 7K."""
  exchange = tokens * copies * hidden * 3 / bandwidth
  return 2 * layers * exchange


def cache_bytes_per_token(model: config.ModelConfig) -> int:
  """Of the BF16 latent cache."""
  return 2 * flops.kv_values_per_token(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTime:
  """One decode step of a device; seconds, tokens a second."""

  compute: float
  exchange: float
  batch: int
  node_size: int

  @property
  def seconds(self) -> float:
    return max(self.compute, self.exchange)

  @property
  def tokens_per_second_per_node(self) -> float:
    return self.batch / self.seconds * self.node_size


def decode(
  cfg: config.Config,
  chip: chips.Chip,
  *,
  devices: int,
  batch: int,
  context: int,
  rates: kernels.Rates | None = None,
) -> DecodeTime:
  """A decode step, experts and requests over `devices` (TR 3.4.2).

  Args:
    batch: requests of a device.
    context: tokens in the cache of each.
  """
  rates = rates or kernels.Rates()
  model, policy = cfg.model, precision.POLICIES[cfg.precision]
  m, layers = model.mla, model.num_layers
  peak = (chip.fp8 if policy.fp8 else chip.bf16) * rates.dense
  bandwidth = chip.hbm_bandwidth * rates.hbm
  weights = expert_values = 0.0
  for part in flops.main_parts(model):
    size = part.copies * memory.compute_bytes(part, policy)
    size /= 2 if policy.fp8 else 1  # one orientation
    if part.name.endswith('experts'):
      expert_values += part.active_size
      size /= devices
    elif part.name == 'embedding':
      size = 0.0
    weights += size
  active = sum(p.active_size for p in flops.main_parts(model))
  active -= model.vocab_size * model.d_model
  cache = batch * context * cache_bytes_per_token(model)
  scores = 2 * batch * context * m.num_heads * (m.cache_width + m.kv_lora_rank)
  matmuls = 2 * batch * active / peak
  attention = layers * scores / (chip.bf16 * rates.attention_forward)
  compute = max(matmuls, weights / bandwidth)
  compute += max(attention, cache / bandwidth)
  copies = model.moe.top_k + model.moe.num_shared_experts
  tier = chip.intra if devices <= chip.node_size else chip.inter
  exchange = 0.0
  if devices > 1:
    exchange = model.num_moe_layers * batch * copies * model.d_model * 3 / tier
  return DecodeTime(
    compute=compute,
    exchange=exchange,
    batch=batch,
    node_size=min(chip.node_size, 8),
  )


def prefill_tokens_per_second_per_node(
  cfg: config.Config, chip: chips.Chip, *, prompt: int
) -> float:
  """By computation alone, in nodes of 8 chips."""
  rates = kernels.Rates()
  policy = precision.POLICIES[cfg.precision]
  peak = (chip.fp8 if policy.fp8 else chip.bf16) * rates.dense
  m = cfg.model.mla
  per_key = 2 * m.num_heads * (m.qk_head_dim + m.v_head_dim)
  attention = cfg.model.num_layers * per_key * prompt / 2
  matmuls = flops.flops_per_token(cfg.model, prompt) / 3 - attention
  seconds = matmuls / peak
  seconds += attention / (chip.bf16 * rates.attention_forward)
  return min(chip.node_size, 8) / seconds
