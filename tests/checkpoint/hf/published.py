"""The published layout as another reader sees it: NumPy, in float64.

Written from the release's own description; nothing of the package is imported,
so that its table of names is tested against something else than itself.
"""

import pathlib

import ml_dtypes
import numpy as np
import safetensors

from tests.oracles import fp8, model, rope

_DTYPES = {
  'F32': np.float32,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
}
# Of the release's convert.py, for the inference code.
_CONVERT = {
  'embed_tokens': 'embed',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'q_proj': 'wq',
  'q_a_proj': 'wq_a',
  'q_a_layernorm': 'q_norm',
  'q_b_proj': 'wq_b',
  'kv_a_proj_with_mqa': 'wkv_a',
  'kv_a_layernorm': 'kv_norm',
  'kv_b_proj': 'wkv_b',
  'o_proj': 'wo',
  'gate_proj': 'w1',
  'down_proj': 'w2',
  'up_proj': 'w3',
  'lm_head': 'head',
}


def official_name(name: str) -> str:
  """What convert.py calls a tensor: by steps, as there."""
  name = name.removeprefix('model.')
  name = name.replace('self_attn', 'attn').replace('mlp', 'ffn')
  name = name.replace('weight_scale_inv', 'scale')
  name = name.replace('e_score_correction_bias', 'bias')
  key = name.split('.')[-2]
  return name.replace(key, _CONVERT.get(key, key))


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors in float64, FP8 times its blocks' scales."""
  stored = {}
  for path in sorted(folder.glob('*.safetensors')):
    for name, view in safetensors.deserialize(path.read_bytes()):
      array = np.frombuffer(view['data'], _DTYPES[view['dtype']])
      stored[name] = array.reshape(view['shape']).astype(np.float64)
  for name in list(stored):
    if (weight := name.removesuffix('_scale_inv')) != name:
      stored[weight] = fp8.dequantize_blocks(stored[weight], stored.pop(name))
  return stored


def weights(tensors: dict[str, np.ndarray], body: dict) -> dict:
  """What `oracles.model.forward` takes; `body` is the config.json."""
  count, modules = (
    body['num_hidden_layers'],
    body.get('num_nextn_predict_layers', 0),
  )
  get = lambda name: tensors[f'{name}.weight']
  mtp = []
  for i in range(count, count + modules):
    prefix = f'model.layers.{i}.'
    module = {
      'enorm_D': get(prefix + 'enorm'),
      'hnorm_D': get(prefix + 'hnorm'),
      'eh_proj_2DD': get(prefix + 'eh_proj').T,
      'block': _block(tensors, body, i),
      'norm_D': get(prefix + 'shared_head.norm'),
    }
    for copy, of in (
      ('embed_tokens', 'model.embed_tokens'),
      ('shared_head.head', 'lm_head'),
    ):
      np.testing.assert_array_equal(get(prefix + copy), get(of))
    mtp.append(module)
  return {
    'embed_VD': get('model.embed_tokens'),
    'head_DV': get('lm_head').T,
    'final_norm_D': get('model.norm'),
    'layers': [_block(tensors, body, i) for i in range(count)],
    'mtp': mtp,
  }


def settings(body: dict) -> model.Settings:
  """What `oracles.model.forward` takes, from a config.json of either kind.

  Of latents' norms, the release's code has eps 1e-6 whatever the config says.
  YaRN's numbers that are not given are those of the release's code.
  """
  rotary, scaling = body['qk_rope_head_dim'], body['rope_scaling']
  freqs = rope.frequencies(rotary, body['rope_theta'])
  factor, mscale, mscale_all_dim = 1.0, 1.0, 0.0
  if scaling:
    assert scaling['type'] == 'yarn'
    freqs = rope.yarn_frequencies(
      rotary,
      body['rope_theta'],
      scaling['original_max_position_embeddings'],
      scaling['factor'],
      scaling.get('beta_fast', 32),
      scaling.get('beta_slow', 1),
    )
    factor, mscale = scaling['factor'], scaling.get('mscale', 1)
    mscale_all_dim = scaling.get('mscale_all_dim', 0)
  scale, rope_factor = rope.softmax_scale(
    body['qk_nope_head_dim'] + rotary, factor, mscale, mscale_all_dim, True
  )
  return model.Settings(
    eps=body['rms_norm_eps'],
    latent_eps=1e-6,
    freqs=freqs,
    scale=scale,
    rope_factor=rope_factor,
    num_groups=body['n_group'],
    top_groups=body['topk_group'],
    top_k=body['num_experts_per_tok'],
    score_func=body['scoring_func'],
    norm_topk=body['norm_topk_prob'],
    route_scale=body['routed_scaling_factor'],
    hidden='post_norm',
  )


def _block(tensors, body, i):
  prefix = f'model.layers.{i}.'
  get = lambda name: tensors[f'{prefix}{name}.weight']
  swiglu = lambda name: {
    'w_gate_DF': get(f'{name}.gate_proj').T,
    'w_up_DF': get(f'{name}.up_proj').T,
    'w_down_FD': get(f'{name}.down_proj').T,
  }
  if i < body['first_k_dense_replace']:
    ffn = swiglu('mlp')
  else:
    experts = [
      swiglu(f'mlp.experts.{e}') for e in range(body['n_routed_experts'])
    ]
    stack = lambda key: np.stack([expert[key] for expert in experts])
    ffn = {
      'router_DE': get('mlp.gate').T,
      # V2 has none.
      'bias_E': tensors.get(prefix + 'mlp.gate.e_score_correction_bias'),
      'experts': {
        'w_gate_EDF': stack('w_gate_DF'),
        'w_up_EDF': stack('w_up_DF'),
        'w_down_EFD': stack('w_down_FD'),
      },
      'shared': None,
    }
    if body['n_shared_experts']:
      ffn['shared'] = swiglu('mlp.shared_experts')
  return {
    'attn_norm_D': get('input_layernorm'),
    'ffn_norm_D': get('post_attention_layernorm'),
    'mla': _attention(lambda name: get(f'self_attn.{name}'), body),
    'ffn': ffn,
  }


def _attention(get, body):
  num_heads, nope = body['num_attention_heads'], body['qk_nope_head_dim']
  by_head = lambda w_XI: w_XI.T.reshape(w_XI.shape[1], num_heads, -1)
  kv_b_CNX = by_head(get('kv_b_proj'))
  weights = {
    'w_dkv_DY': get('kv_a_proj_with_mqa').T,
    'kv_norm_C': get('kv_a_layernorm'),
    'w_uk_CNH': kv_b_CNX[:, :, :nope],
    'w_uv_CNU': kv_b_CNX[:, :, nope:],
    'w_o_NUD': get('o_proj').T.reshape(num_heads, -1, body['hidden_size']),
  }
  if not body['q_lora_rank']:
    return weights | {'w_q_DNX': by_head(get('q_proj'))}
  return weights | {
    'w_dq_DQ': get('q_a_proj').T,
    'q_norm_Q': get('q_a_layernorm'),
    'w_uq_QNX': by_head(get('q_b_proj')),
  }
