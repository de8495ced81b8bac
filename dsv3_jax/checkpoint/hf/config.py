"""Reads and writes the `config.json` of a Hugging Face folder.

Every field is read, checked, or known to have no effect; any other is refused.
Nothing that a config names (`auto_map`) is imported, and nothing is allocated
at a size that it claims.
"""

import copy
import pathlib
from typing import Any

from dsv3_jax import config, errors
from dsv3_jax.checkpoint.hf import rope_config
from dsv3_jax.checkpoint.safetensors import header as shard_header
from dsv3_jax.checkpoint.safetensors import reader as shards

# Field -> setting below `model.`.
FIELDS = {
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
# Fields that must have one of the values; the first is written.
FIXED: dict[str, tuple] = {
  'moe_layer_freq': (1,),
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'attention_dropout': (0.0,),
  'mlp_bias': (False,),
  'tie_word_embeddings': (False,),
  'rope_interleave': (True,),
  'is_encoder_decoder': (False,),
}
# The same, by the gate that the `model_type` has.
GATES: dict[str, dict[str, tuple]] = {
  'sigmoid': {
    'model_type': ('deepseek_v3', 'kimi_k2'),
    'architectures': (['DeepseekV3ForCausalLM'], None),
    'scoring_func': ('sigmoid',),
    'topk_method': ('noaux_tc',),
  },
  'softmax': {
    'model_type': ('deepseek_v2',),
    'architectures': (['DeepseekV2ForCausalLM'], None),
    'scoring_func': ('softmax',),
    'topk_method': ('group_limited_greedy', 'greedy'),
    # Readers of V2 disagree on what it would do.
    'norm_topk_prob': (False,),
  },
}
# Fields that equal others.
DERIVED = ('num_key_value_heads', 'head_dim', 'qk_head_dim')
# Fields that do not change the logits.
IGNORED = (
  *('_name_or_path', 'auto_map', 'transformers_version', 'ep_size'),
  *('bos_token_id', 'eos_token_id', 'pad_token_id', 'torch_dtype', 'dtype'),
  *('aux_loss_alpha', 'seq_aux', 'pretraining_tp', 'use_cache', 'return_dict'),
  *('output_router_logits', 'output_attentions', 'output_hidden_states'),
  *('chunk_size_feed_forward', 'id2label', 'label2id', 'problem_type'),
)
# The same of `quantization_config`. Which tensors are FP8 they say themselves;
# `scale_fmt` is of the activations' scales.
_FP8 = {
  'quant_method': 'fp8',
  'fmt': 'e4m3',
  'activation_scheme': 'dynamic',
  'weight_block_size': [128, 128],
}
_FP8_FIXED = {name: (value, None) for name, value in _FP8.items()} | {
  'quant_method': ('fp8',),
  'scale_fmt': ('float', 'ue8m0', None),
  'expert_dtype': ('fp8', None),
  'modules_to_convert': (None, []),
}
_FP8_IGNORED = ('modules_to_not_convert', 'ignored_layers', 'dequantize')
# transformers has this eps in the latents' norms, whatever `rms_norm_eps` is.
_LATENT_NORM_EPS = 1e-6
_MOST_LENGTH = 2**31 - 1  # positions are int32

Refuse = rope_config.Refuse


def write(cfg: config.Config, dtype: str = 'float32') -> dict[str, Any]:
  """The config of a `DeepseekV3ForCausalLM` of this shape.

  With V2's gate, `score_func='softmax'`, of a `DeepseekV2ForCausalLM`.

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
  if net.moe.score_func == 'softmax' and net.moe.norm_topk:
    raise errors.InputError(
      "model.moe.norm_topk=True must be False with score_func='softmax' to be "
      'exported: transformers does not normalise the gates of V2'
    )
  fixed = FIXED | GATES[net.moe.score_func]
  body = {field: values[0] for field, values in fixed.items()}
  body = copy.deepcopy(body)  # lists too: the caller may change them
  for field, path in FIELDS.items():
    node = net
    for name in path.split('.'):
      node = getattr(node, name)
    body[field] = node
  body['q_lora_rank'] = net.mla.q_lora_rank or None
  body['num_key_value_heads'] = net.mla.num_heads
  body |= rope_config.write(net)
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

  gate = _gate(body, refuse)
  known = {*FIELDS, *FIXED, *GATES[gate], *DERIVED, *IGNORED}
  known |= {*rope_config.FIELDS, 'quantization_config'}
  for field in body:
    if field not in known:
      raise refuse(field, 'is a field that is not known here')
  for field, values in (FIXED | GATES[gate]).items():
    if field in body and body[field] not in values:
      raise refuse(field, f'is not built: it must be {_either(values)}')
  if body.get('topk_method', 'noaux_tc') == 'greedy':  # knows no groups
    body |= {'n_group': 1, 'topk_group': 1}
  settings: dict[str, Any] = {
    'latent_norm_eps': _LATENT_NORM_EPS,
    'moe.score_func': gate,
  }
  for field, name in FIELDS.items():
    if field not in body and field not in _OPTIONAL:
      raise errors.InputError(f'{path}: {field} is missing')
    settings[name] = _value(field, body, most, refuse)
  rotary = settings['mla.qk_rope_head_dim']
  query = settings['mla.qk_nope_head_dim'] + rotary
  derived = (settings['mla.num_heads'], rotary, query)
  for field, value in zip(DERIVED, derived, strict=True):
    if body.get(field, value) not in (value, None):
      raise refuse(field, f'is not built: it must be {value}')
  _check_fp8(body.get('quantization_config'), refuse)
  return settings | rope_config.read(body, settings['max_seq_len'], refuse)


def _gate(body: dict[str, Any], refuse: Refuse) -> str:
  """The gate that belongs to the model's type."""
  types = {
    name: gate for gate, fixed in GATES.items() for name in fixed['model_type']
  }
  given = body.get('model_type', 'deepseek_v3')
  if not isinstance(given, str) or given not in types:
    raise refuse('model_type', f'is not built: it must be {_either(types)}')
  return types[given]


def _check_fp8(given: Any, refuse: Refuse) -> None:
  """Checks that FP8 tensors are in blocks of 128 x 128."""
  field = 'quantization_config'
  if given is None:
    return
  if not isinstance(given, dict):
    raise refuse(field, 'must be an object or null')
  for name, value in given.items():
    if name not in {*_FP8_FIXED, *_FP8_IGNORED}:
      shown = shard_header.show(name)
      raise refuse(field, f'is not built: {shown} is not known here')
    if name in _FP8_FIXED and value not in _FP8_FIXED[name]:
      rule = f'{name} must be {_either(_FP8_FIXED[name])}'
      raise refuse(field, f'is not built: {rule}')
  if 'quant_method' not in given:
    raise refuse(field, 'must have a quant_method')


def _either(values: Any) -> str:
  return ' or '.join(repr(value) for value in values if value is not None)


def _value(field: str, body: dict[str, Any], most: int, refuse: Refuse) -> Any:
  """The value of one of `FIELDS`, with its type and bounds checked."""
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
    raise refuse(field, f'is more than {most}, the most that can be here')
  return value
