"""`config.json` with something wrong, beside the tensors of a tiny model.

Whatever it holds, import makes a valid configuration of it or refuses it in one
line, and a refusal leaves nothing behind. Trees and changes of JSON are those
of `fuzz_shards`.
"""

import pathlib
import random
from collections.abc import Iterator

import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.checkpoint.hf import exporter, importer
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from experiments import base
from tests.checkpoint.hf import exchanged
from tests.checkpoint.safetensors import fuzz_shards

BASE = base.get_config().to_dict()
Pairs, Text = fuzz_shards.Pairs, fuzz_shards.Text
CONFIG = 'config.json'

_MODEL = exchanged.make(
  'yarn', model__num_layers=2, model__moe__num_experts=4,
  model__moe__num_groups=2, model__moe__top_k=2,
)  # fmt: skip
FIELDS = (
  *hf_config.write(_MODEL, 'fp8'),
  *('rope_parameters', 'qk_head_dim', 'head_dim', 'auto_map', 'bos_token_id'),
  *('transformers_version', 'ep_size', 'use_cache', 'sliding_window', 'dtype'),
)
ROPE = (
  *('type', 'rope_type', 'rope_theta', 'factor', 'beta_fast', 'beta_slow'),
  *('mscale', 'mscale_all_dim', 'original_max_position_embeddings'),
  *('truncate', 'partial_rotary_factor', 'attention_factor'),
)
VALUES = (
  *fuzz_shards.NUMBERS,
  *(16, 48, 64, 128, 10**4, 10**6, 2**30, 2**31 - 1, 2**40, 1e-6, 2.5, 1e-300),
  *(Text('1e999'), Text('-1e999'), Text('Infinity'), 'yarn', 'default', 'silu'),
  *('deepseek_v3', 'deepseek_v2', 'kimi_k2', 'greedy', 'softmax'),
  *(['DeepseekV3ForCausalLM'], ['DeepseekV2ForCausalLM'], [128, 128]),
  [1] * 1000,
  *(Pairs([['type', 'yarn']]), Pairs([['quant_method', 'fp8']]), 'x' * 10**5),
  *('a\nb', '\u2028', '\ud800', Text('"\\u0000"'), Text('[[[[[[[[]]]]]]]]')),
)


def make(folder: pathlib.Path) -> None:
  """Puts the tensors of the tiny model there, as zeros in one file."""
  specs = exporter.manifest(_MODEL, 'float32')
  with shard_writer.ShardWriter(folder / shards.SINGLE, specs) as writer:
    for spec in specs:
      writer.write(spec.name, 0, np.zeros(spec.shape, np.float32))


def valid(rng) -> Pairs:
  """A valid config, of either generation of transformers."""
  body = hf_config.write(_MODEL, rng.choice(('float32', 'fp8')))
  if rng.random() < 0.5:
    rope = {'rope_theta': body.pop('rope_theta')} | body.pop('rope_scaling')
    if rng.random() < 0.5:
      rope = {'rope_type': 'default', 'rope_theta': rope['rope_theta']}
    body['rope_parameters'] = rope
  return tree_of(body)


def tree_of(value):
  """Objects as `Pairs`."""
  if isinstance(value, dict):
    return Pairs([key, tree_of(item)] for key, item in value.items())
  return value


# Changes of a tree in place.


def change_value(rng, tree):
  tree[rng.randrange(len(tree))][1] = fuzz_shards.copy(rng.choice(VALUES))


def add_field(rng, tree):
  pair = [rng.choice(FIELDS), fuzz_shards.copy(rng.choice(VALUES))]
  tree.insert(rng.randrange(len(tree) + 1), pair)


def change_rope(rng, tree):
  ropes = [
    value
    for key, value in tree
    if key[:4] == 'rope' and isinstance(value, Pairs)
  ]
  if not ropes:
    return
  rope, value = rng.choice(ropes), fuzz_shards.copy(rng.choice(VALUES))
  if rope and rng.random() < 0.7:
    rng.choice(rope)[1] = value
  else:
    rope.append([rng.choice(ROPE), value])


def change_count(rng, tree):
  """A count that stays near, so that rules about several fields are met."""
  pairs = [pair for pair in tree if type(pair[1]) is int]
  if pairs:
    pair = rng.choice(pairs)
    pair[1] = rng.choice((0, 1, 2, pair[1] - 1, pair[1] + 1, 2 * pair[1]))


CHANGES = (
  *(change_value, change_value, add_field, change_rope, change_rope),
  *(change_count, change_count, fuzz_shards.exchange, fuzz_shards.put_junk),
  fuzz_shards.change_pairs,
)


def case(rng) -> bytes:
  """The text of one config."""
  tree = valid(rng)
  for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
    rng.choice(CHANGES)(rng, tree)
    if not tree:
      break
  raw = fuzz_shards.dump(tree).encode()
  return fuzz_shards.change_bytes(rng, raw) if rng.random() < 0.15 else raw


def cases(seed: int, count: int) -> Iterator[bytes]:
  """The i-th depends on seed and i alone."""
  for i in range(count):
    yield case(random.Random(f'config/{seed}/{i}'))


def check(raw: bytes, folder: pathlib.Path, deep: bool) -> bool:
  """Reads one config beside the tensors of `make`; True if it was accepted.

  Args:
    deep: of one that is a configuration, also opens all parameters.
  """
  (folder / CONFIG).write_bytes(raw)
  output = folder.with_name('never')
  try:
    with shards.Folder(folder) as opened:
      cfg = importer.read_config(opened, BASE)
    assert config.from_config_dict(config.to_dict(cfg)) == cfg
    hidden_size = shards.read_json(folder / CONFIG)['hidden_size']
    assert cfg.model.d_model == hidden_size
    if deep:
      with importer.open_folder(folder, BASE) as (_, leaves):
        read = leaves['params', 'final_norm', 'norm'][:]
      assert read.shape == (cfg.model.d_model,)
    return True
  except errors.InputError as error:
    message = str(error)
  assert len(message.splitlines()) == 1 and len(message) < 2000, message
  assert message.isprintable() and str(folder) in message, message
  with pytest.raises(errors.InputError) as again:
    importer.to_workdir(folder, output, BASE)
  assert str(again.value) == message
  assert not output.exists()
  assert not output.with_name(output.name + '.partial').exists()
  return False
