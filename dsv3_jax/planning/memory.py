"""Bytes of activations and weights in training, from shapes alone.

Activations: residuals that a layer saves for its backward pass, per token, with
`model.remat='report'`, which recomputes RMSNorm, the MLA up-projections and the
SwiGLU product (TR 3.2.3). Weights: f32 masters, and the forms that matmuls
read: BF16 casts, or FP8 in both orientations, as Hopper's FP8 matmuls contract
the last dims of both operands (TR 3.3.3).
"""

import math

from dsv3_jax import config, precision
from dsv3_jax.planning import flops


def activation_bytes(
  cfg: config.ModelConfig,
  policy: precision.Policy,
  *,
  is_moe: bool,
  expert_rows: float | None = None,
) -> dict[str, int | float]:
  """Bytes per token that one layer saves for its backward pass, by kind.

  Args:
    expert_rows: rows of routed experts per token; None is top_k, no padding.
  """
  m, size = cfg.mla, 4 if policy.compute == 'float32' else 2
  outputs = m.num_heads * m.v_head_dim
  sizes = {
    'residual stream': 2 * cfg.d_model * size,
    'query latent': m.q_lora_rank * size,
    'key-value latent': m.cache_width * size,
    'attention output': outputs * size,
    'log-sum-exp': m.num_heads * 4,
  }
  if policy.fp8:  # E5M6: 12 bits
    sizes['attention output'] = 3 * -(-outputs // 2) + scale_bytes(outputs)
  per_row = lambda width: (
    2 * (width + scale_bytes(width) if policy.fp8 else width * size)
  )
  if not is_moe:
    return sizes | {'swiglu inputs': per_row(cfg.d_ff)}
  moe = cfg.moe
  rows = moe.top_k if expert_rows is None else expert_rows
  sizes['routed swiglu inputs'] = rows * per_row(moe.d_ff)
  if moe.num_shared_experts:
    sizes['shared swiglu inputs'] = per_row(moe.num_shared_experts * moe.d_ff)
  return sizes


def scale_bytes(columns: int) -> int:
  """Bytes of the f32 scales of a row."""
  return 4 * -(-columns // 128)


def weight_bytes(
  cfg: config.ModelConfig, policy: precision.Policy
) -> dict[str, int]:
  """Bytes of all parameters, MTP modules included, unsharded.

  'master': f32. 'compute': the forms that the matmuls of a step read.
  """
  total, compute = 0, 0
  for part in (*flops.main_parts(cfg), *flops.mtp_parts(cfg)):
    total += 4 * part.size
    compute += part.copies * compute_bytes(part, policy)
  return {'master': total, 'compute': compute}


def compute_bytes(part: flops.Part, policy: precision.Policy) -> int:
  """Bytes of a parameter's compute form; 0 if the master itself is read."""
  name, values = part.name.rsplit('.', 1)[-1], math.prod(part.shape)
  swiglu = name in ('swiglu', 'experts', 'shared')
  kind = policy.of('w_up' if swiglu else name)
  unread = ('embedding', 'router', 'router_bias', 'norms')  # have no copy
  if name in unread or kind == 'float32':
    return 0
  if kind != 'fp8':
    return 2 * values
  count, shape = (part.shape[0], part.shape[1:]) if swiglu else (1, part.shape)
  inputs = precision.FP8_MATRICES['w_up' if swiglu else name].inputs
  rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
  blocks = -(-rows // 128) * -(-columns // 128)
  return 2 * (values + 4 * count * blocks)  # both orientations


def inspect_dict(
  cfg: config.ModelConfig, policy: precision.Policy
) -> dict[str, dict[str, int | float]]:
  """The part of `dsv3 inspect --json` about memory."""
  dense, routed = (
    sum(activation_bytes(cfg, policy, is_moe=is_moe).values())
    for is_moe in (False, True)
  )
  layers = cfg.num_dense_layers * dense + cfg.num_moe_layers * routed
  return {
    'activation_bytes_per_token': {
      'dense_layer': dense,
      'moe_layer': routed,
      'all_layers': layers,
    },
    'weight_bytes': weight_bytes(cfg, policy),
  }


def render(cfg: config.ModelConfig, policy: precision.Policy) -> str:
  """The same as a table for people."""
  rows = ['saved for the backward pass, bytes a token']
  for title, is_moe in (('dense layer', False), ('MoE layer', True)):
    kinds = activation_bytes(cfg, policy, is_moe=is_moe)
    for name, size in kinds.items():
      rows.append(f'  {title:12} {name:24} {size:18,.0f}')
  summary = inspect_dict(cfg, policy)
  for name, size in summary['activation_bytes_per_token'].items():
    rows.append(f'  {name.replace("_", " "):37} {size:18,.0f}')
  rows.append('weights, GB')
  for name, size in summary['weight_bytes'].items():
    rows.append(f'  {name:37} {size / 1e9:18,.2f}')
  return '\n'.join(rows)
