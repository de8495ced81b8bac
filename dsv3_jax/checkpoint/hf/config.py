"""Reads and writes the `config.json` of a Hugging Face folder.

Every field is read, checked, or known to have no effect; any other is refused.
Nothing that a config names (`auto_map`) is imported, and nothing is allocated
at a size that it claims.
"""

import copy
import pathlib
from collections.abc import Callable
from typing import Any

from dsv3_jax import config, errors
from dsv3_jax.checkpoint.safetensors import header as shard_header
from dsv3_jax.checkpoint.safetensors import reader as shards

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
# Fields of which the model supports one value.
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
# Fields that do not change the logits.
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
# transformers has this eps in the latents' norms, whatever `rms_norm_eps` is.
_LATENT_NORM_EPS = 1e-6
_MOST_LENGTH = 2**31 - 1  # positions are int32
_MOST_ROPE = 1e12  # of RoPE's numbers; their minimum is its inverse

Refuse = Callable[[str, str], errors.InputError]


def write(cfg: config.Config, dtype: str = 'float32') -> dict[str, Any]:
  """The config of a `DeepseekV3ForCausalLM` of this shape.

  transformers applies YaRN at every length; we and the released code apply it
  only beyond the original length. So `rope_scaling` is written only then.

  Args:
    dtype: of the exported tensors: 'float32', 'bfloat16' or 'fp8'.

  Raises:
    InputError: the format cannot say what this model computes.
  """
  net = cfg.model
  if net.latent_norm_eps != _LATENT_NORM_EPS:
    raise errors.InputError(
      f'model.latent_norm_eps={net.latent_norm_eps} must be '
      f'{_LATENT_NORM_EPS} to be exported: the format has no field for it'
    )
  body = copy.deepcopy(_FIXED)  # lists too: the caller may change them
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
    body['quantization_config'] = copy.deepcopy(_FP8)
  return body


def read(path: pathlib.Path, most: int) -> dict[str, Any]:
  """Settings below `model.` by dotted name.

  Args:
    path: of the `config.json`.
    most: bytes of all tensors of the folder; bounds every dim and count.

  Raises:
    InputError: a field is missing, unknown, or has an unsupported value.
  """
  body = shards.read_json(path)
  for field, value in body.items():
    if isinstance(value, dict):
      shard_header.as_object(value, str(path), shard_header.show(field))

  def refuse(field: str, rule: str) -> errors.InputError:
    name = field if field.isidentifier() else repr(field)
    name = name if len(name) < 100 else shard_header.show(field)
    value = shard_header.show(body.get(field))
    return errors.InputError(f'{path}: {name}={value} {rule}')

  known = {*_FIELDS, *_FIXED, *_IGNORED, 'rope_theta', 'rope_scaling'}
  known |= {'rope_parameters', 'quantization_config', 'num_key_value_heads'}
  known |= {'head_dim', 'qk_head_dim'}
  for field in body:
    if field not in known:
      raise refuse(field, 'is a field that is not known here')
  for field, value in _FIXED.items():
    if field in body and body[field] != value:
      raise refuse(field, f'is not built: it must be {value!r}')
  settings: dict[str, Any] = {'latent_norm_eps': _LATENT_NORM_EPS}
  for field, name in _FIELDS.items():
    if field not in body and field not in _OPTIONAL:
      raise errors.InputError(f'{path}: {field} is missing')
    settings[name] = _value(field, body, most, refuse)
  sums = {
    'num_key_value_heads': settings['mla.num_heads'],
    'head_dim': settings['mla.qk_rope_head_dim'],
    'qk_head_dim': settings['mla.qk_nope_head_dim']
    + settings['mla.qk_rope_head_dim'],
  }
  for field, value in sums.items():
    if field in body and body[field] != value:
      raise refuse(field, f'is not built: it must be {value}')
  if body.get('quantization_config', _FP8) != _FP8:
    raise refuse('quantization_config', f'is not built: it must be {_FP8}')
  return settings | _rope(body, settings['max_seq_len'], refuse)


def _value(field: str, body: dict[str, Any], most: int, refuse: Refuse) -> Any:
  """The value of one of `_FIELDS`, with its type and bounds checked."""
  value = body.get(field, _OPTIONAL.get(field))
  if value is None and field in ('q_lora_rank', 'n_shared_experts'):
    value = 0
  kinds = _KINDS.get(field, (int,))
  if type(value) not in kinds:
    names = ' or '.join(kind.__name__ for kind in kinds)
    raise refuse(field, f'must be of type {names}')
  if field == 'max_position_embeddings':
    if value > _MOST_LENGTH:
      raise refuse(field, f'must be at most {_MOST_LENGTH}')
  elif value > most:
    raise refuse(field, f'is more than the {most} bytes of all tensors here')
  return value


def _rope(
  body: dict[str, Any], max_seq_len: int, refuse: Refuse
) -> dict[str, Any]:
  """RoPE settings, as written by old and new versions of transformers."""
  field, given = 'rope_parameters', body.get('rope_parameters')
  if old := given is None:
    field, given = 'rope_scaling', body.get('rope_scaling')
    given = {} if given is None else given
  if not isinstance(given, dict):
    raise refuse(field, 'must be an object or null')
  given = dict(given)
  if old:
    given['rope_theta'] = body.get('rope_theta')
  kind = given.pop('rope_type', given.get('type', 'default'))
  theta = given.pop('rope_theta', None)
  given.pop('type', None)
  numbers = [theta, *given.values()]
  for x in numbers:
    # Larger numbers, which no model has, would overflow in YaRN's formulas.
    if type(x) not in (int, float) or not 1 / _MOST_ROPE <= x <= _MOST_ROPE:
      raise refuse(
        field,
        f'with rope_theta must hold numbers > 0, {1 / _MOST_ROPE:.0e} to '
        f'{_MOST_ROPE:.0e}',
      )
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
  settings = {f'rope.{name}': given[name] for name in _ROPE}
  return settings | {'rope.theta': theta, 'rope.original_seq_len': original}
