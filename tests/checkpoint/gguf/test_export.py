"""GGUF files: what they hold, what is refused, and that they are whole."""

import errno
import json
import shutil
from unittest import mock

import gguf
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.checkpoint.gguf import exporter, metadata, tensors, vocabulary
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from dsv3_jax.data import tokenizer as tokenizers
from experiments import v3_671b
from tests.checkpoint.gguf import llama
from tests.checkpoint.hf import exchanged


@pytest.fixture(scope='module')
def file(model, tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'x.gguf'
  return llama.write(*model, path, tokenizer, dtype='float32')


def expected(cfg, params, router_biases):
  """Every tensor as llama.cpp's source reads it."""
  turned = lambda w: np.asarray(w).reshape(w.shape[0], -1).T
  want = {
    'token_embd.weight': params['embed']['w'],
    'output_norm.weight': params['final_norm']['norm'],
    'output.weight': turned(params['head']['w']),
  }
  for i in range(cfg.model.num_layers):
    dense = i < cfg.model.num_dense_layers
    stack = params['dense_layers' if dense else 'moe_layers']['layers']
    at = i if dense else i - cfg.model.num_dense_layers
    take = lambda group, at=at: {k: w[at] for k, w in group.items()}
    mla = take(stack['attention'])
    layer = {
      'attn_norm': stack['attention_norm']['norm'][at],
      'ffn_norm': stack['ffn_norm']['norm'][at],
      'attn_q_a': turned(mla['w_dq']),
      'attn_q_a_norm': mla['q_norm'],
      'attn_q_b': turned(mla['w_uq']),
      'attn_kv_a_mqa': turned(mla['w_dkv']),
      'attn_kv_a_norm': mla['kv_norm'],
      'attn_k_b': np.einsum('cnh->nch', mla['w_uk']),
      'attn_v_b': np.einsum('cnu->nuc', mla['w_uv']),
      'attn_output': np.einsum('nud->dnu', mla['w_o']).reshape(
        cfg.model.d_model, -1
      ),
    }
    ffn = take(stack['ffn']) if dense else take(stack['moe']['shared'])
    for part, kind in {'gate': 'gate', 'up': 'up', 'down': 'down'}.items():
      suffix = '' if dense else '_shexp'
      layer[f'ffn_{part}{suffix}'] = turned(ffn[f'w_{kind}'])
      if not dense:
        stacked = np.asarray(stack['moe'][f'w_{kind}'][at])
        layer[f'ffn_{part}_exps'] = stacked.swapaxes(1, 2)
    if not dense:
      layer['ffn_gate_inp'] = turned(stack['moe']['w_router'][at])
      want[f'blk.{i}.exp_probs_b.bias'] = router_biases['moe'][at]
    want |= {f'blk.{i}.{name}.weight': w for name, w in layer.items()}
  return {name: np.asarray(w) for name, w in want.items()}


def test_every_tensor_in_f32(model, file):
  got, want = llama.read(file), expected(*model)
  assert got.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def is_f32(name, array):
  """Norms, the router and its biases are so in every file."""
  return array.ndim == 1 or 'ffn_gate_inp' in name


def test_bf16_is_rounded_to_the_nearest(model, tokenizer, tmp_path):
  path = llama.write(*model, tmp_path / 'x', tokenizer, dtype='bfloat16')
  got = llama.read(path)
  for name, array in expected(*model).items():
    if not is_f32(name, array):
      array = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_q8_0_is_within_half_a_step(model, tokenizer, tmp_path):
  """A step is amax / 127 of 32 weights, itself rounded to F16."""
  path = llama.write(*model, tmp_path / 'x', tokenizer, dtype='q8_0')
  got = llama.read(path)
  for name, array in expected(*model).items():
    if is_f32(name, array):
      np.testing.assert_array_equal(got[name], array, err_msg=name)
      continue
    blocks, back = array.reshape(-1, 32), got[name].reshape(-1, 32)
    amax = np.max(np.abs(blocks), axis=1, keepdims=True)
    error = np.abs(back - blocks)
    assert np.all(error <= amax * (0.5 / 127 + 2.0**-11) * 1.001), name
    assert np.max(error) > 0.0, name


def fields(path):
  return {x.name: x.contents() for x in gguf.GGUFReader(path).fields.values()}


def test_metadata_is_the_config(model, file, tokenizer):
  net, got = model[0].model, fields(file)
  want = {
    'vocab_size': net.vocab_size,
    'context_length': net.max_seq_len,
    'embedding_length': net.d_model,
    'block_count': net.num_layers,
    'feed_forward_length': net.d_ff,
    'leading_dense_block_count': net.num_dense_layers,
    'attention.layer_norm_rms_epsilon': np.float32(net.norm_eps),
    'attention.head_count': net.mla.num_heads,
    'attention.head_count_kv': 1,
    'attention.q_lora_rank': net.mla.q_lora_rank,
    'attention.kv_lora_rank': net.mla.kv_lora_rank,
    'attention.key_length': net.mla.kv_lora_rank + net.mla.qk_rope_head_dim,
    'attention.value_length': net.mla.kv_lora_rank,
    'attention.key_length_mla': net.mla.qk_nope_head_dim
    + net.mla.qk_rope_head_dim,
    'attention.value_length_mla': net.mla.v_head_dim,
    'expert_feed_forward_length': net.moe.d_ff,
    'expert_count': net.moe.num_experts,
    'expert_used_count': net.moe.top_k,
    'expert_shared_count': net.moe.num_shared_experts,
    'expert_group_count': net.moe.num_groups,
    'expert_group_used_count': net.moe.top_groups,
    'expert_weights_scale': net.moe.route_scale,
    'expert_weights_norm': net.moe.norm_topk,
    'expert_gating_func': gguf.ExpertGatingFuncType.SIGMOID,
    'rope.dimension_count': net.mla.qk_rope_head_dim,
    'rope.freq_base': net.rope.theta,
    'rope.scaling.type': 'yarn',
    'rope.scaling.factor': net.rope.factor,
    'rope.scaling.original_context_length': net.rope.original_seq_len,
    'rope.scaling.yarn_log_multiplier': np.float32(
      0.1 * net.rope.mscale_all_dim
    ),
  }
  ours = {k.removeprefix('deepseek2.'): v for k, v in got.items()}
  assert {name: ours[name] for name in want} == want
  assert {k for k in got if k.startswith('deepseek2.')} == {
    f'deepseek2.{name}' for name in want
  }
  assert got['general.architecture'] == 'deepseek2'
  assert got['general.name'] == file.stem
  assert got['general.file_type'] == gguf.LlamaFileType.ALL_F32
  assert got['tokenizer.ggml.pre'] == 'deepseek-v3'
  assert got['tokenizer.ggml.bos_token_id'] == tokenizer.bos_id
  assert got['tokenizer.ggml.eos_token_id'] == tokenizer.eos_id
  assert got['tokenizer.ggml.padding_token_id'] == tokenizer.pad_id
  assert got['tokenizer.ggml.add_bos_token'] is True
  tokens, types = (
    got[f'tokenizer.ggml.{name}'] for name in ('tokens', 'token_type')
  )
  assert len(tokens) == len(types) == len(set(tokens)) == net.vocab_size
  controls = {i for i, x in enumerate(types) if x == gguf.TokenType.CONTROL}
  assert controls == tokenizer.special_ids
  unused = [i for i, x in enumerate(types) if x == gguf.TokenType.UNUSED]
  assert unused == list(range(tokenizer.vocab_size, net.vocab_size))


def largest_piece(table):
  """Bytes, in f32, of the largest piece of any tensor."""
  places = {
    (place.file_shape, place.rows_per_step): place
    for tensor in table
    for place in tensor.places
  }
  return max(
    4 * (stop - start) * per * int(np.prod(shape[1:]))
    for (shape, per), place in places.items()
    for start, stop in place.pieces()
  )


def test_wide_tensors_are_read_in_pieces():
  wide = {'d_model': 4096, 'd_ff': 8192, 'vocab_size': 32_000}
  changes = {f'model__{name}': size for name, size in wide.items()}
  table = tensors.table(llama.make('plain', **changes), 'q8_0')
  assert len(list(table[0].pieces())) == 16
  assert largest_piece(table) == 32 << 20


@pytest.mark.nightly
def test_tensors_of_the_671b_model():
  """As many as in the GGUF files that others made of it."""
  cfg = config.from_config_dict(v3_671b.get_config())
  table = tensors.table(cfg, 'q8_0')
  assert len(table) == 1086
  sizes = {x.name: x.shape for x in table}
  assert sizes['blk.60.ffn_up_exps.weight'] == (256, 2048, 7168)
  assert sizes['blk.0.attn_k_b.weight'] == (128, 512, 128)
  assert largest_piece(table) <= 32 << 20


@pytest.mark.parametrize(
  ('case', 'changes', 'expected'),
  [
    ('plain', {'moe__num_shared_experts': 0}, 'num_shared_experts=0'),
    ('plain', {'moe__score_func': 'softmax'}, 'top_groups=2 must be'),
    ('plain', {'norm_eps': 1e-3}, 'latent_norm_eps=1e-06 must be model.norm'),
    ('yarn', {'rope__mscale': 0.5}, 'mscale=0.5 must be'),
    ('yarn', {'rope__beta_slow': 0.2}, 'beta_slow=0.2 must be 32.0 and 1.0'),
    ('plain', {'num_layers': 26}, 'q_lora_rank=96 must be 0'),
    ('plain', {'num_layers': 513}, 'num_layers=513 must be <= 512'),
    ('plain', {'moe__num_experts': 1028}, 'num_experts=1028 must be <= 1024'),
  ],
)
def test_models_that_llama_cpp_has_not(case, changes, expected):
  changes = {f'model__{name}': value for name, value in changes.items()}
  with pytest.raises(errors.InputError, match='--format=gguf: ') as caught:
    metadata.check(llama.make(case, **changes))
  assert expected in str(caught.value) and '\n' not in str(caught.value)


def test_what_yarn_or_groups_would_do_is_no_reason_without_them():
  metadata.check(
    llama.make('plain', model__rope__mscale=0.5, model__rope__beta_slow=0.2)
  )
  metadata.check(
    llama.make(
      'plain',
      model__num_dense_layers=3,
      model__moe__num_shared_experts=0,
      model__moe__score_func='softmax',
    )
  )


@pytest.mark.parametrize(
  ('path', 'value', 'expected'),
  [
    ('normalizer', {'type': 'NFC'}, 'normalizer must be null'),
    ('pre_tokenizer', {'type': 'Whitespace'}, 'pre_tokenizer must be that'),
    ('model.byte_fallback', True, 'model.byte_fallback=True must be off'),
    ('model.ignore_merges', True, 'model.ignore_merges=True must be off'),
  ],
)
def test_tokenizers_that_llama_cpp_has_not(tokenizer, path, value, expected):
  spec = json.loads(tokenizer.text)
  *keys, last = path.split('.')
  node = spec[keys[0]] if keys else spec
  node[last] = value
  changed = tokenizers.Tokenizer(json.dumps(spec))
  with pytest.raises(errors.InputError) as caught:
    vocabulary.check(changed, 544)
  assert expected in str(caught.value)
  with pytest.raises(errors.InputError, match='512 tokens must be'):
    vocabulary.check(tokenizer, 511)


def test_q8_0_has_blocks_of_32(model):
  cfg = llama.make('plain', model__mla__qk_nope_head_dim=24)
  with pytest.raises(errors.InputError, match=r'blk\.0\.attn_k_b\.weight has '):
    tensors.table(cfg, 'q8_0')
  assert tensors.table(cfg, 'bfloat16')


@pytest.mark.parametrize(
  ('value', 'dtype', 'expected'),
  [
    (np.nan, 'float32', 'first NaN at [3, 2]'),
    (np.inf, 'q8_0', 'first infinity at [3, 2]'),
    (3.4e38, 'bfloat16', 'first infinity'),
    (1e7, 'q8_0', 'above 8.32e+06'),
  ],
)
def test_bad_weights_are_refused(
  value, dtype, expected, model, tokenizer, tmp_path
):
  cfg, *trees = model
  leaves = exchanged.leaves_of(*trees)
  head_DV = np.array(leaves['params', 'head', 'w'])
  head_DV[2, 3] = value
  leaves['params', 'head', 'w'] = head_DV
  with pytest.raises(errors.InputError) as caught:
    exporter.export(
      cfg, leaves, tmp_path / 'x', tokenizer=tokenizer, dtype=dtype
    )
  assert 'lm_head.weight' in str(caught.value)
  assert expected in str(caught.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', [KeyboardInterrupt, BrokenPipeError])
def test_a_stopped_export_leaves_nothing(kind, model, tokenizer, tmp_path):
  cfg, params, router_biases = model
  output = tmp_path / 'deep' / 'x.gguf'
  seen = []

  def stop(line):
    if not output.parent.exists():
      return
    seen.append([path.name for path in output.parent.iterdir()])
    if line.startswith('blk.1'):
      raise kind

  args = (cfg, params, router_biases, output, tokenizer)
  with pytest.raises(kind):
    llama.write(*args, progress=stop)
  assert seen[-1] == ['x.gguf.partial'] and not list(output.parent.iterdir())


def test_a_file_is_whole_or_not_there(model, tokenizer, tmp_path):
  args = (*model, tmp_path / 'x.gguf', tokenizer)
  full = OSError(errno.ENOSPC, 'No space left on device')
  expected = (
    r'^.*/x\.gguf cannot be written \(No space .*: nothing of it is left'
  )
  with (
    mock.patch.object(shard_writer, 'flush', side_effect=full),
    pytest.raises(errors.FullDiskError, match=expected),
  ):
    llama.write(*args)
  assert not list(tmp_path.iterdir())
  # What a killed process left is replaced; what exists already is not.
  (tmp_path / 'x.gguf.partial').write_bytes(b'old')
  llama.write(*args)
  assert [path.name for path in tmp_path.iterdir()] == ['x.gguf']
  with pytest.raises(errors.InputError, match='exists: name another'):
    llama.write(*args)
  (tmp_path / 'y.partial').mkdir()
  with pytest.raises(errors.InputError, match='is a folder'):
    llama.write(*model, tmp_path / 'y', tokenizer)


def test_the_disk_must_have_space_for_the_whole_file(
  model, tokenizer, tmp_path
):
  """To the byte; refused before a weight is read."""
  path = llama.write(*model, tmp_path / 'x', tokenizer)
  reader = gguf.GGUFReader(path)
  needed = path.stat().st_size - reader.data_offset
  usage = lambda free: mock.patch.object(
    shutil, 'disk_usage', return_value=mock.Mock(free=free)
  )
  unread = mock.Mock(side_effect=AssertionError)
  output = tmp_path / 'y'
  with (
    usage(needed - 1),
    mock.patch.object(tensors.GgufTensor, 'read', unread),
    pytest.raises(
      errors.InputError, match=r'GB of free space, .* needs 0\.00 '
    ),
  ):
    llama.write(*model, output, tokenizer)
  assert [x.name for x in tmp_path.iterdir()] == ['x']
  with usage(needed):
    llama.write(*model, output, tokenizer)


def test_progress_names_layers_and_what_is_left_out(model, tokenizer, tmp_path):
  lines = []
  path = tmp_path / 'x.gguf'
  llama.write(*model, path, tokenizer, progress=lines.append)
  first, *layers, last = lines
  assert 'model.mtp.depth=1' in first and 'left out' in first
  assert [line.split()[0] for line in layers] == ['blk.0', 'blk.1', 'blk.2']
  assert last.startswith(str(path))
