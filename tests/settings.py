"""Tiny configurations that pass all checks, for any test."""

from dsv3_jax import config
from experiments import base

_TINY = {
  'model__vocab_size': 23,
  'model__d_model': 16,
  'model__d_ff': 20,
  'model__num_layers': 3,
  'model__num_dense_layers': 1,
  'model__max_seq_len': 16,
  'model__mla__kv_lora_rank': 8,
  'model__mla__q_lora_rank': 6,
  'model__mla__qk_nope_head_dim': 4,
  'model__mla__qk_rope_head_dim': 6,
  'model__mla__v_head_dim': 5,
  'model__rope__original_seq_len': 16,
  'model__moe__num_experts': 8,
  'model__moe__top_k': 3,
  'model__moe__num_groups': 4,
  'model__moe__top_groups': 2,
  'model__moe__d_ff': 7,
  'model__moe__block_size': 4,
  'balance__alpha': 0.1,  # large enough to matter in every gradient
  'data__seq_len': 12,
  'data__tokenizer': 'none.json',  # lifts the rules on trained vocabularies
  'eval__stride': 4,
}


def small(**changes):
  """A checked `Config`; changes by dotted name with __ for a dot."""
  source = base.get_config('runlocal')
  with source.unlocked():
    for name, value in (_TINY | changes).items():
      *path, last = name.split('__')
      node = source
      for key in path:
        node = node[key]
      assert last in node, name
      node[last] = value
  return config.from_config_dict(source)
