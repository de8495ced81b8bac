"""Random float64 weights in the layout of `model`.

Norm weights and biases are random too: at ones and zeros a test would not
notice their absence. `config` is any object with the attributes of a model
configuration.
"""

import numpy as np


def random_weights(config, seed, std=0.2):
  """The whole nested dict; matrices have mean 0 and the given std."""
  draw = _Draw(seed, std)
  width = config.d_model
  layers = [
    _block(config, draw, layer < config.num_dense_layers)
    for layer in range(config.num_layers)
  ]
  modules = [
    {
      'enorm_D': draw.norm(width),
      'hnorm_D': draw.norm(width),
      'eh_proj_2DD': draw.normal(2 * width, width),
      'block': _block(config, draw, False),
      'norm_D': draw.norm(width),
    }
    for _ in range(config.mtp.depth)
  ]
  return {
    'embed_VD': draw.normal(config.vocab_size, width),
    'head_DV': draw.normal(width, config.vocab_size),
    'final_norm_D': draw.norm(width),
    'layers': layers,
    'mtp': modules,
  }


class _Draw:
  """A generator and the std of what it draws."""

  def __init__(self, seed, std):
    self._rng = np.random.default_rng(seed)
    self._std = std

  def normal(self, *shape):
    return self._rng.normal(0.0, self._std, shape)

  def norm(self, size):
    return 1.0 + self.normal(size)


def _block(config, draw, dense):
  """One dense or MoE block."""
  width = config.d_model
  return {
    'attn_norm_D': draw.norm(width),
    'ffn_norm_D': draw.norm(width),
    'mla': _mla(config, draw),
    'ffn': _swiglu(draw, width, config.d_ff) if dense else _moe(config, draw),
  }


def _mla(config, draw):
  dims, width = config.mla, config.d_model
  heads, latent = dims.num_heads, dims.kv_lora_rank
  nope, rotary = dims.qk_nope_head_dim, dims.qk_rope_head_dim
  result = {
    'w_dkv_DY': draw.normal(width, latent + rotary),
    'kv_norm_C': draw.norm(latent),
    'w_uk_CNH': draw.normal(latent, heads, nope),
    'w_uv_CNU': draw.normal(latent, heads, dims.v_head_dim),
    'w_o_NUD': draw.normal(heads, dims.v_head_dim, width),
  }
  if dims.q_lora_rank:
    result['w_dq_DQ'] = draw.normal(width, dims.q_lora_rank)
    result['q_norm_Q'] = draw.norm(dims.q_lora_rank)
    result['w_uq_QNX'] = draw.normal(dims.q_lora_rank, heads, nope + rotary)
  else:
    result['w_q_DNX'] = draw.normal(width, heads, nope + rotary)
  return result


def _swiglu(draw, width, hidden):
  return {
    'w_gate_DF': draw.normal(width, hidden),
    'w_up_DF': draw.normal(width, hidden),
    'w_down_FD': draw.normal(hidden, width),
  }


def _moe(config, draw):
  dims, width = config.moe, config.d_model
  count, hidden = dims.num_experts, dims.d_ff
  biased = dims.score_func == 'sigmoid'
  shared_width = dims.num_shared_experts * hidden
  return {
    'router_DE': draw.normal(width, count),
    'bias_E': draw.normal(count) if biased else None,
    'experts': {
      'w_gate_EDF': draw.normal(count, width, hidden),
      'w_up_EDF': draw.normal(count, width, hidden),
      'w_down_EFD': draw.normal(count, hidden, width),
    },
    'shared': _swiglu(draw, width, shared_width) if shared_width else None,
  }
