"""Tiny models of many shapes, and folders of their weights."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.hf import exporter
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

_SHAPE = {
  'precision': 'f32',
  'model__vocab_size': 64,
  'model__d_model': 48,
  'model__d_ff': 40,
  'model__norm_eps': 1e-3,
  'model__mla__qk_nope_head_dim': 8,
  'model__mla__qk_rope_head_dim': 8,
  'model__mla__v_head_dim': 12,
  'model__mla__kv_lora_rank': 16,
  'model__mla__q_lora_rank': 24,
  'model__mla__num_heads': 4,
  'model__moe__d_ff': 24,
  'model__mtp__depth': 1,
}
_YARN = {'model__rope__original_seq_len': 8, 'model__max_seq_len': 128}
_PLAIN = {'model__rope__original_seq_len': 128, 'model__max_seq_len': 128}
CASES = {
  'plain': _PLAIN,
  'yarn': _YARN,
  'yarn, mscale 0.707, no q_lora': _YARN
  | {
    'model__rope__mscale': 0.707,
    'model__rope__mscale_all_dim': 0.707,
    'model__mla__q_lora_rank': 0,
  },
  'no q_lora, 1 group, no dense': _PLAIN
  | {
    'model__mla__q_lora_rank': 0,
    'model__moe__num_groups': 1,
    'model__moe__top_groups': 1,
    'model__num_dense_layers': 0,
  },
  '16 experts, 2 groups, 2 shared, 2 MTP': _PLAIN
  | {
    'model__moe__num_experts': 16,
    'model__moe__num_groups': 2,
    'model__moe__num_shared_experts': 2,
    'model__moe__top_k': 4,
    'model__mtp__depth': 2,
  },
  'unrolled, 2 dense, no MTP': _PLAIN
  | {
    'model__scan_layers': False,
    'model__num_layers': 4,
    'model__num_dense_layers': 2,
    'model__mtp__depth': 0,
  },
  'beyond one block': _YARN  # of 128, in every matrix, and no multiple of it
  | {
    'model__d_model': 168,
    'model__d_ff': 200,
    'model__mla__kv_lora_rank': 136,
    'model__mla__q_lora_rank': 130,
    'model__mla__qk_nope_head_dim': 24,
    'model__mla__v_head_dim': 52,
    'model__moe__d_ff': 140,
  },
}


def make(name, **changes):
  return settings.small(**(_SHAPE | CASES[name] | changes))


def random_weights(cfg, seed=0):
  """f32 parameters, of a size that keeps logits near 1, and router biases."""
  params, router_biases = models.random_params(cfg, seed)
  size = 2.0 / np.sqrt(cfg.model.d_model)  # of a matrix' 0.25, for any width
  small = lambda path, w: w if 'norm' in path[-1].key else size * w
  params = jax.tree_util.tree_map_with_path(small, params)
  return jax.tree.map(
    lambda w: jnp.asarray(w, jnp.float32), (params, router_biases)
  )


def leaves_of(params, router_biases):
  """Path -> array, as `export` takes them."""
  tree = {'params': params, 'router': router_biases}
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(k.key for k in path): np.asarray(leaf) for path, leaf in flat}


def write(cfg, params, router_biases, folder, dtype='float32', **options):
  """Exports into several shards; returns the folder."""
  options = {'shard_bytes': 60_000} | options
  exporter.export(
    cfg, leaves_of(params, router_biases), folder, dtype=dtype, **options
  )
  return folder


def rewrite(folder, change):
  """Writes all tensors of a folder anew, changed, into one file; no hashes."""
  with shards.Folder(folder) as opened:
    arrays = {name: opened.read(name) for name in opened.entries}
  change(arrays)
  for path in [*folder.glob('*model*'), folder / shards.SUMS]:
    path.unlink()
  put(folder / shards.SINGLE, arrays)


def put(path, arrays):
  """One file of whole arrays."""
  specs = [
    shard_writer.TensorSpec(name, shards.DTYPE_NAMES[array.dtype], array.shape)
    for name, array in arrays.items()
  ]
  with shard_writer.ShardWriter(path, specs) as writer:
    for name, array in arrays.items():
      writer.write(name, 0, array)


def batch_of(tokens_BT):
  ones = jnp.ones(tokens_BT.shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  tokens_BT = jnp.int32(tokens_BT)
  weights = ones.astype(jnp.float32)
  return model.Batch(tokens_BT, tokens_BT, positions, ones, weights)
