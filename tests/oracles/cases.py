"""Dimensions that the tests of the oracles share."""

import types

EXACT = 1e-12  # float64 with a few hundred operations


def namespace(tree):
  """Nested dicts as attributes."""
  if isinstance(tree, dict):
    return types.SimpleNamespace(
      **{key: namespace(value) for key, value in tree.items()}
    )
  return tree


def dims(vocab, width, d_ff, layers, q_lora, heads, moe_dims, depth):
  """Dimensions of a published model; attention heads are alike in all."""
  keys = ('num_experts', 'num_shared_experts', 'top_k', 'd_ff', 'score_func')
  return namespace(
    {
      'vocab_size': vocab,
      'd_model': width,
      'd_ff': d_ff,
      'num_layers': layers[0],
      'num_dense_layers': layers[1],
      'mla': {
        'num_heads': heads,
        'q_lora_rank': q_lora,
        'kv_lora_rank': 512,
        'qk_nope_head_dim': 128,
        'qk_rope_head_dim': 64,
        'v_head_dim': 128,
      },
      'moe': dict(zip(keys, moe_dims, strict=True)),
      'mtp': {'depth': depth},
    }
  )


V3 = dims(
  129280, 7168, 18432, (61, 3), 1536, 128, (256, 1, 8, 2048, 'sigmoid'), 1
)
V2 = dims(
  102400, 5120, 12288, (60, 1), 1536, 128, (160, 2, 6, 1536, 'softmax'), 0
)
LITE = dims(102400, 2048, 10944, (27, 1), 0, 16, (64, 2, 6, 1408, 'softmax'), 0)


def small(**changes):
  """A tiny model configuration; changes by dotted name with __ for a dot."""
  tree = {
    'vocab_size': 11,
    'd_model': 8,
    'd_ff': 12,
    'num_layers': 3,
    'num_dense_layers': 1,
    'norm_eps': 1e-6,
    'latent_norm_eps': 1e-6,
    'max_seq_len': 32,
    'mla': {
      'num_heads': 2,
      'q_lora_rank': 6,
      'kv_lora_rank': 5,
      'qk_nope_head_dim': 4,
      'qk_rope_head_dim': 4,
      'v_head_dim': 3,
    },
    'rope': {
      'theta': 10000.0,
      'original_seq_len': 16,
      'factor': 40.0,
      'beta_fast': 32.0,
      'beta_slow': 1.0,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
    },
    'moe': {
      'num_experts': 8,
      'num_shared_experts': 1,
      'top_k': 3,
      'num_groups': 4,
      'top_groups': 2,
      'd_ff': 7,
      'score_func': 'sigmoid',
      'norm_topk': True,
      'route_scale': 2.5,
    },
    'mtp': {'depth': 2, 'hidden': 'post_norm'},
  }
  for name, value in changes.items():
    *path, last = name.split('__')
    node = tree
    for key in path:
      node = node[key]
    assert last in node
    node[last] = value
  return namespace(tree)
