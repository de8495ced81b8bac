"""Parameters, cache bytes and FLOP of a model, from its shape alone.

FLOP per token are 6 for each active parameter, except those of the embedding
table, plus attention matmuls over half the sequence (causal) or all of it. This
is how the published figures count. The main figures leave out MTP and
recomputation, as do the published 250 GFLOP a token and its MFU (ISCA tables 2
and 4, arXiv 2505.09343).
"""

import dataclasses
from collections.abc import Iterator

from dsv3_jax import config


@dataclasses.dataclass(frozen=True)
class Part:
  """One kind of parameter, `copies` times (over layers and experts).

  `active` of the copies are used for a token.
  """

  name: str
  shape: tuple[int, ...]
  copies: int
  active: int

  @property
  def size(self) -> int:
    total = self.copies
    for dim in self.shape:
      total *= dim
    return total

  @property
  def active_size(self) -> int:
    return self.size // self.copies * self.active if self.copies else 0


def main_parts(cfg: config.ModelConfig) -> list[Part]:
  """All parameters of the main model, router biases included."""
  dim, vocab, layers = cfg.d_model, cfg.vocab_size, cfg.num_layers
  parts = [Part('embedding', (vocab, dim), 1, 1)]
  parts += _attention(cfg, 'attention', layers)
  swiglu = (3, dim, cfg.d_ff)
  dense = cfg.num_dense_layers
  parts.append(Part('dense.swiglu', swiglu, dense, dense))
  parts += _moe(cfg, 'moe', cfg.num_moe_layers)
  parts.append(Part('norms', (2, dim), layers, layers))
  parts.append(Part('final_norm', (dim,), 1, 1))
  parts.append(Part('head', (dim, vocab), 1, 1))
  return [part for part in parts if part.copies]


def mtp_parts(cfg: config.ModelConfig) -> list[Part]:
  """Parameters of the MTP modules, biases included, without shared ones."""
  dim, depth = cfg.d_model, cfg.mtp.depth
  parts = [Part('mtp.projection', (2 * dim, dim), depth, depth)]
  parts += _attention(cfg, 'mtp.attention', depth)
  parts += _moe(cfg, 'mtp.moe', depth)
  parts.append(Part('mtp.norms', (5, dim), depth, depth))
  return [part for part in parts if part.copies]


def layer_parts(cfg: config.ModelConfig, is_moe: bool) -> list[Part]:
  """Parameters of one layer of the main model."""
  parts = [
    *_attention(cfg, 'attention', 1),
    Part('norms', (2, cfg.d_model), 1, 1),
  ]
  if is_moe:
    return [part for part in (*parts, *_moe(cfg, 'moe', 1)) if part.copies]
  return [*parts, Part('dense.swiglu', (3, cfg.d_model, cfg.d_ff), 1, 1)]


def vocab_parts(cfg: config.ModelConfig) -> tuple[Part, Part, Part]:
  """Embedding, final norm, head."""
  dim, vocab = cfg.d_model, cfg.vocab_size
  return (
    Part('embedding', (vocab, dim), 1, 1),
    Part('final_norm', (dim,), 1, 1),
    Part('head', (dim, vocab), 1, 1),
  )


def _attention(
  cfg: config.ModelConfig, name: str, copies: int
) -> Iterator[Part]:
  m, dim = cfg.mla, cfg.d_model
  shapes = {'w_dkv': (dim, m.cache_width), 'kv_norm': (m.kv_lora_rank,)}
  if m.q_lora_rank:
    shapes['w_dq'], shapes['q_norm'] = (dim, m.q_lora_rank), (m.q_lora_rank,)
  rows = m.q_lora_rank or dim
  shapes['w_uq'] = (rows, m.num_heads, m.qk_head_dim)
  shapes['w_uk'] = (m.kv_lora_rank, m.num_heads, m.qk_nope_head_dim)
  shapes['w_uv'] = (m.kv_lora_rank, m.num_heads, m.v_head_dim)
  shapes['w_o'] = (m.num_heads, m.v_head_dim, dim)
  for key, shape in shapes.items():
    yield Part(f'{name}.{key}', shape, copies, copies)


def _moe(cfg: config.ModelConfig, name: str, copies: int) -> Iterator[Part]:
  moe, dim = cfg.moe, cfg.d_model
  expert = (3, dim, moe.d_ff)
  routed, used = copies * moe.num_experts, copies * moe.top_k
  shared = copies * moe.num_shared_experts
  yield Part(f'{name}.router', (dim, moe.num_experts), copies, copies)
  yield Part(f'{name}.router_bias', (moe.num_experts,), copies, 0)
  yield Part(f'{name}.experts', expert, routed, used)
  yield Part(f'{name}.shared', expert, shared, shared)


def kv_values_per_token(cfg: config.ModelConfig) -> int:
  """Values that the main model caches for a token."""
  return cfg.num_layers * cfg.mla.cache_width


def flops_per_token(
  cfg: config.ModelConfig, seq_len: int, causal: bool = True
) -> float:
  """Training FLOP per token of the main model (forward and backward)."""
  active = sum(p.active_size for p in main_parts(cfg))
  active -= cfg.vocab_size * cfg.d_model  # the lookup multiplies nothing
  return 6.0 * active + cfg.num_layers * _attention_flops(cfg, seq_len, causal)


def mtp_flops_per_token(cfg: config.ModelConfig, seq_len: int) -> float:
  """FLOP per token of the MTP modules, which include the shared head."""
  active = sum(p.active_size for p in mtp_parts(cfg))
  head = cfg.mtp.depth * cfg.vocab_size * cfg.d_model
  attention = cfg.mtp.depth * _attention_flops(cfg, seq_len, True)
  return 6.0 * (active + head) + attention


def _attention_flops(
  cfg: config.ModelConfig, seq_len: int, causal: bool
) -> float:
  """Both attention matmuls of one layer: 2 FLOP a product, three passes."""
  keys = seq_len / 2 if causal else seq_len
  m = cfg.mla
  return 6.0 * m.num_heads * (m.qk_head_dim + m.v_head_dim) * keys


def inspect_dict(cfg: config.ModelConfig, seq_len: int) -> dict:
  """What `dsv3 inspect --json` prints."""
  main, mtp = main_parts(cfg), mtp_parts(cfg)
  table = cfg.vocab_size * cfg.d_model
  active = sum(p.active_size for p in main)
  unique = sum(p.size for p in mtp)
  biases = [p.size for p in main if p.name.endswith('router_bias')]
  return {
    'parameters': {
      'main': sum(p.size for p in main),
      'router_bias': sum(biases),
      'mtp_stored': unique + cfg.mtp.depth * 2 * table,
      'mtp_unique': unique,
      'active': active,
      'active_without_embedding': active - table,
    },
    'kv_bytes_per_token': 2 * kv_values_per_token(cfg),
    'flops_per_token': {
      'causal': flops_per_token(cfg, seq_len),
      'non_causal': flops_per_token(cfg, seq_len, causal=False),
      'mtp': mtp_flops_per_token(cfg, seq_len),
    },
  }


def render(cfg: config.ModelConfig, seq_len: int) -> str:
  """A table for people: a row for each kind of parameter, then sums."""
  rows = [f'{"parameter":24} {"shape":>22} {"copies":>8} {"values":>18}']
  for part in [*main_parts(cfg), *mtp_parts(cfg)]:
    shape = ' x '.join(map(str, part.shape))
    rows.append(f'{part.name:24} {shape:>22} {part.copies:8,} {part.size:18,}')
  summary = inspect_dict(cfg, seq_len)
  rows.append('')
  for name, value in summary['parameters'].items():
    rows.append(f'{name.replace("_", " "):32} {value:18,}')
  kv = summary['kv_bytes_per_token']
  rows.append(f'{"KV cache, bytes a token (BF16)":32} {kv:18,}')
  for name, value in summary['flops_per_token'].items():
    title = f'GFLOP a token, {name} (T={seq_len})'
    rows.append(f'{title:36} {value / 1e9:14,.4g}')
  return '\n'.join(rows)
