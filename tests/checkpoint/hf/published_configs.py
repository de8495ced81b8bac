"""Values of published configs, and tiny models of their keys."""

import copy

_YARN = {
  'beta_fast': 32,
  'beta_slow': 1,
  'factor': 40,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
  'original_max_position_embeddings': 4096,
  'type': 'yarn',
}
_FP8 = {
  'activation_scheme': 'dynamic',
  'fmt': 'e4m3',
  'quant_method': 'fp8',
  'weight_block_size': [128, 128],
}
_ATTENTION = {
  'attention_bias': False,
  'attention_dropout': 0.0,
  'kv_lora_rank': 512,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'v_head_dim': 128,
}
_COMMON = _ATTENTION | {
  'aux_loss_alpha': 0.001,
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'moe_layer_freq': 1,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-6,
  'seq_aux': True,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'use_cache': True,
}
_V3_GATE = {
  'architectures': ['DeepseekV3ForCausalLM'],
  'auto_map': {
    'AutoConfig': 'configuration_deepseek.DeepseekV3Config',
    'AutoModel': 'modeling_deepseek.DeepseekV3Model',
    'AutoModelForCausalLM': 'modeling_deepseek.DeepseekV3ForCausalLM',
  },
  'model_type': 'deepseek_v3',
  'norm_topk_prob': True,
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
}
_V3 = (
  _COMMON
  | _V3_GATE
  | {
    'bos_token_id': 0,
    'eos_token_id': 1,
    'ep_size': 1,
    'first_k_dense_replace': 3,
    'hidden_size': 7168,
    'intermediate_size': 18432,
    'max_position_embeddings': 163840,
    'moe_intermediate_size': 2048,
    'n_group': 8,
    'n_routed_experts': 256,
    'n_shared_experts': 1,
    'num_attention_heads': 128,
    'num_experts_per_tok': 8,
    'num_hidden_layers': 61,
    'num_key_value_heads': 128,
    'num_nextn_predict_layers': 1,
    'q_lora_rank': 1536,
    'quantization_config': _FP8,
    'rope_scaling': _YARN,
    'rope_theta': 10000,
    'routed_scaling_factor': 2.5,
    'topk_group': 4,
    'transformers_version': '4.33.1',
    'vocab_size': 129280,
  }
)
_SMALL = {  # of both 16B models
  'first_k_dense_replace': 1,
  'hidden_size': 2048,
  'moe_intermediate_size': 1408,
  'n_group': 1,
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'num_attention_heads': 16,
  'num_experts_per_tok': 6,
  'num_hidden_layers': 27,
  'num_key_value_heads': 16,
  'q_lora_rank': None,
  'topk_group': 1,
}
CONFIGS = {
  'DeepSeek-V3': _V3,
  'DeepSeek-V3.1': _V3
  | {
    'quantization_config': _FP8 | {'scale_fmt': 'ue8m0'},
    'transformers_version': '4.44.2',
  },
  'DeepSeek-R1': _V3 | {'transformers_version': '4.46.3'},
  'DeepSeek-V2-Lite': _COMMON
  | _SMALL
  | {
    'architectures': ['DeepseekV2ForCausalLM'],
    'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV2Config'},
    'bos_token_id': 100000,
    'eos_token_id': 100001,
    'intermediate_size': 10944,
    'max_position_embeddings': 163840,
    'model_type': 'deepseek_v2',
    'norm_topk_prob': False,
    'rope_scaling': _YARN | {'mscale': 0.707, 'mscale_all_dim': 0.707},
    'rope_theta': 10000,
    'routed_scaling_factor': 1.0,
    'scoring_func': 'softmax',
    'topk_method': 'greedy',
    'transformers_version': '4.33.1',
    'vocab_size': 102400,
  },
  'Moonlight-16B-A3B': _COMMON
  | _V3_GATE
  | _SMALL
  | {
    'bos_token_id': 163584,
    'eos_token_id': 163585,
    'ep_size': 1,
    'intermediate_size': 11264,
    'max_position_embeddings': 8192,
    'num_nextn_predict_layers': 0,
    'pad_token_id': 163838,
    'rms_norm_eps': 1e-5,
    'rope_scaling': None,
    'rope_theta': 50000.0,
    'routed_scaling_factor': 2.446,
    'transformers_version': '4.46.3',
    'vocab_size': 163840,
  },
  'Kimi-K2': _V3
  | {
    'bos_token_id': 163584,
    'eos_token_id': 163585,
    'first_k_dense_replace': 1,
    'max_position_embeddings': 131072,
    'model_type': 'kimi_k2',
    'n_group': 1,
    'n_routed_experts': 384,
    'num_attention_heads': 64,
    'num_key_value_heads': 64,
    'num_nextn_predict_layers': 0,
    'rope_scaling': _YARN
    | {'beta_fast': 1.0, 'beta_slow': 1.0, 'factor': 32.0},
    'rope_theta': 50000.0,
    'routed_scaling_factor': 2.827,
    'topk_group': 1,
    'transformers_version': '4.48.3',
    'vocab_size': 163840,
  },
}


def tiny(name: str) -> dict:
  """The config with the same keys and small sizes."""
  body = copy.deepcopy(CONFIGS[name])
  body.update(vocab_size=64, hidden_size=48, intermediate_size=40)
  body.update(num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16)
  body.update(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
  body.update(n_routed_experts=16, moe_intermediate_size=24)
  body.update(num_hidden_layers=body['first_k_dense_replace'] + 1)
  body.update(num_experts_per_tok=4, max_position_embeddings=128)
  if body['q_lora_rank']:
    body['q_lora_rank'] = 24
  if body['rope_scaling']:
    body['rope_scaling']['original_max_position_embeddings'] = 8
  return body
