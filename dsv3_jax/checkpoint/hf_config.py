"""The `config.json` of a Hugging Face folder, in both directions.

Every field is read, checked, or known to change nothing; any other is refused.
Nothing that a config names (`auto_map`) is ever imported.
"""

from typing import Any

from dsv3_jax import config, errors

# Field -> setting below `model.`.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'd_model',
  'intermediate_size': 'd_ff',
  'num_hidden_layers': 'num_layers',
  'first_k_dense_replace': 'num_dense_layers',
  'rms_norm_eps': 'norm_eps',
  'initializer_range': 'init_std',
  'max_position_embeddings': 'max_seq_len',
  'num_attention_heads': 'mla.num_heads',
  'q_lora_rank': 'mla.q_lora_rank',
  'kv_lora_rank': 'mla.kv_lora_rank',
  'qk_nope_head_dim': 'mla.qk_nope_head_dim',
  'qk_rope_head_dim': 'mla.qk_rope_head_dim',
  'v_head_dim': 'mla.v_head_dim',
  'n_routed_experts': 'moe.num_experts',
  'n_shared_experts': 'moe.num_shared_experts',
  'num_experts_per_tok': 'moe.top_k',
  'n_group': 'moe.num_groups',
  'topk_group': 'moe.top_groups',
  'moe_intermediate_size': 'moe.d_ff',
  'norm_topk_prob': 'moe.norm_topk',
  'routed_scaling_factor': 'moe.route_scale',
  'num_nextn_predict_layers': 'mtp.depth',
}
_OPTIONAL = {'num_nextn_predict_layers': 0, 'initializer_range': 0.006}
_KINDS = dict.fromkeys(
  ('rms_norm_eps', 'initializer_range', 'routed_scaling_factor'), (float, int)
) | {'norm_topk_prob': (bool,)}
# Fields that the model has one answer to.
_FIXED = {
  'model_type': 'deepseek_v3',
  'architectures': ['DeepseekV3ForCausalLM'],
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
  'moe_layer_freq': 1,
  'hidden_act': 'silu',
  'attention_bias': False,
  'attention_dropout': 0.0,
  'mlp_bias': False,
  'tie_word_embeddings': False,
  'rope_interleave': True,
}
# Fields that change no logit.
_IGNORED = (
  *('_name_or_path', 'auto_map', 'transformers_version', 'ep_size'),
  *('bos_token_id', 'eos_token_id', 'pad_token_id', 'torch_dtype', 'dtype'),
  *('aux_loss_alpha', 'seq_aux', 'pretraining_tp', 'use_cache', 'return_dict'),
  *('output_router_logits', 'output_attentions', 'output_hidden_states'),
)
_ROPE = ('beta_fast', 'beta_slow', 'factor', 'mscale', 'mscale_all_dim')
_FP8 = {
  'quant_method': 'fp8',
  'fmt': 'e4m3',
  'activation_scheme': 'dynamic',
  'weight_block_size': [128, 128],
}


def write(cfg: config.Config, dtype: str = 'float32') -> dict[str, Any]:
  """The config of a `DeepseekV3ForCausalLM` with our shape.

  transformers applies YaRN whatever the length; ours and the released code only
  beyond the original one. So `rope_scaling` is written exactly when it acts.

  Args:
    dtype: of the tensors beside it: 'float32', 'bfloat16' or 'fp8'.
  """
  net = cfg.model
  body = dict(_FIXED)
  for field, path in _FIELDS.items():
    node = net
    for name in path.split('.'):
      node = getattr(node, name)
    body[field] = node
  body['q_lora_rank'] = net.mla.q_lora_rank or None
  body['num_key_value_heads'] = net.mla.num_heads
  body['scoring_func'] = net.moe.score_func
  body['rope_theta'] = net.rope.theta
  body['rope_scaling'] = None
  if net.yarn:
    scaling = {name: getattr(net.rope, name) for name in _ROPE}
    original = net.rope.original_seq_len
    scaling['original_max_position_embeddings'] = original
    body['rope_scaling'] = {'type': 'yarn', **scaling}
  body['torch_dtype'] = 'float32' if dtype == 'float32' else 'bfloat16'
  if dtype == 'fp8':
    body['quantization_config'] = dict(_FP8)
  return body


def read(body: dict[str, Any], where: str) -> dict[str, Any]:
  """Settings below `model.` by dotted name.

  Args:
    where: the file, for errors.

  Raises:
    InputError: a field is missing, unknown, or has a value that is not built.
  """

  def refuse(field: str, rule: str) -> errors.InputError:
    return errors.InputError(f'{where}: {field}={body.get(field)!r} {rule}')

  known = {*_FIELDS, *_FIXED, *_IGNORED, 'rope_theta', 'rope_scaling'}
  known |= {'rope_parameters', 'quantization_config', 'num_key_value_heads'}
  known |= {'head_dim', 'qk_head_dim'}
  for field in body:
    if field not in known:
      raise refuse(field, 'is a field that is not known here')
  for field, value in _FIXED.items():
    if field in body and body[field] != value:
      raise refuse(field, f'is not built: it must be {value!r}')
  found = {}
  for field, path in _FIELDS.items():
    if field not in body and field not in _OPTIONAL:
      raise errors.InputError(f'{where}: {field} is missing')
    value = body.get(field, _OPTIONAL.get(field))
    if value is None and field in ('q_lora_rank', 'n_shared_experts'):
      value = 0
    kinds = _KINDS.get(field, (int,))
    if type(value) not in kinds:
      names = ' or '.join(kind.__name__ for kind in kinds)
      raise refuse(field, f'must be of type {names}')
    found[path] = value
  sums = {
    'num_key_value_heads': found['mla.num_heads'],
    'head_dim': found['mla.qk_rope_head_dim'],
    'qk_head_dim': found['mla.qk_nope_head_dim']
    + found['mla.qk_rope_head_dim'],
  }
  for field, value in sums.items():
    if field in body and body[field] != value:
      raise refuse(field, f'is not built: it must be {value}')
  if body.get('quantization_config', _FP8) != _FP8:
    raise refuse('quantization_config', f'is not built: it must be {_FP8}')
  return found | _rope(body, found['max_seq_len'], refuse)


def _rope(body: dict[str, Any], max_seq_len: int, refuse: Any) -> dict:
  """RoPE as either generation of transformers writes it."""
  field, given = 'rope_parameters', body.get('rope_parameters')
  if given is None:
    field, given = 'rope_scaling', dict(body.get('rope_scaling') or {})
    given['rope_theta'] = body.get('rope_theta')
  given = dict(given)
  kind = given.pop('rope_type', given.get('type', 'default'))
  theta = given.pop('rope_theta', None)
  given.pop('type', None)
  numbers = [theta, *given.values()]
  if not all(type(x) in (int, float) for x in numbers):
    raise refuse(field, 'with rope_theta must hold numbers')
  if kind == 'default' and not given:
    alone = {'rope.original_seq_len': max_seq_len, 'rope.factor': 1.0}
    return alone | {'rope.theta': theta}
  names = {*_ROPE, 'original_max_position_embeddings'}
  if kind != 'yarn' or given.keys() != names:
    raise refuse(field, f"must be of type 'yarn' with just {sorted(names)}")
  original = given['original_max_position_embeddings']
  if max_seq_len <= original:
    raise refuse(
      field,
      'is ambiguous: the released code has YaRN off up to '
      f'{original} positions, transformers on; drop it, or raise '
      'max_position_embeddings',
    )
  found = {f'rope.{name}': given[name] for name in _ROPE}
  return found | {'rope.theta': theta, 'rope.original_seq_len': original}
