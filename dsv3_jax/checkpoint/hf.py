"""One table between our parameters and the published checkpoint's tensors.

`table(cfg)` lists every tensor of the Hugging Face layout and the leaves that
it is made of; `to_hf` and `from_hf` read it in the two directions. PyTorch
keeps a matrix as [out, in] and joins heads and their dims; ours keep inputs
first and heads apart. kv_b_proj holds, head by head, key and value matrix.
MTP module k is layer `num_layers + k`, with copies of embedding and head, which
are ours shared (TR 2.2). Rotary dims are interleaved on both sides.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.nn import model

Tree = dict[str, Any]


class Leaf(NamedTuple):
  """A parameter by its keys, or, with `index`, a slice of its leading dims."""

  path: tuple[str, ...]
  index: tuple[int, ...] = ()


class Tensor(NamedTuple):
  """One tensor of the Hugging Face layout.

  leaves: joined along their last dim. num_in: leading dims that are inputs of
  a matrix; 0 if both sides keep the array alike. copy: another tensor of the
  file holds the same values, and import reads that one.
  """

  name: str
  leaves: tuple[Leaf, ...]
  num_in: int
  copy: bool = False


_SWIGLU = (
  ('gate_proj', 'w_gate'),
  ('up_proj', 'w_up'),
  ('down_proj', 'w_down'),
)


def table(cfg: config.ModelConfig) -> list[Tensor]:
  """Every tensor of the whole model; no name and no leaf's slice twice."""
  embed, head = Leaf(('params', 'embed', 'w')), Leaf(('params', 'head', 'w'))
  final_norm = Leaf(('params', 'final_norm', 'norm'))
  tensors = [
    Tensor('model.embed_tokens.weight', (embed,), 0),
    Tensor('model.norm.weight', (final_norm,), 0),
    Tensor('lm_head.weight', (head,), 1),
  ]
  for i in range(cfg.num_layers):
    stack, at = 'dense_layers', i
    if is_moe := i >= cfg.num_dense_layers:
      stack, at = 'moe_layers', i - cfg.num_dense_layers
    where = Leaf(('params', stack, f'layer_{at}'))
    if cfg.scan_layers:
      where = Leaf(('params', stack, 'layers'), (at,))
    bias = Leaf(('router', 'moe'), (at,)) if is_moe else None
    tensors += _block(cfg, f'model.layers.{i}.', where, bias)
  for k in range(cfg.mtp.depth):
    prefix, path = f'model.layers.{cfg.num_layers + k}.', ('params', f'mtp_{k}')
    tensors += _block(
      cfg, prefix, Leaf((*path, 'block')), Leaf(('router', 'mtp'), (k,))
    )
    norm = lambda name, path=path: (Leaf((*path, name, 'norm')),)
    tensors += [
      Tensor(prefix + 'embed_tokens.weight', (embed,), 0, copy=True),
      Tensor(prefix + 'enorm.weight', norm('embed_norm'), 0),
      Tensor(prefix + 'hnorm.weight', norm('hidden_norm'), 0),
      Tensor(prefix + 'eh_proj.weight', (Leaf((*path, 'w_proj')),), 1),
      Tensor(prefix + 'shared_head.norm.weight', norm('final_norm'), 0),
      Tensor(prefix + 'shared_head.head.weight', (head,), 1, copy=True),
    ]
  return tensors


def _block(
  cfg: config.ModelConfig, prefix: str, where: Leaf, bias: Leaf | None
) -> Iterator[Tensor]:
  """The tensors of one layer; `bias` is its router's, None if it is dense."""

  def tensor(name, path, num_in=0, index=()):
    leaves = tuple(
      Leaf((*where.path, *p.split('.')), where.index + index)
      for p in path.split(' ')
    )
    return Tensor(prefix + name + '.weight', leaves, num_in)

  yield tensor('input_layernorm', 'attention_norm.norm')
  yield tensor('post_attention_layernorm', 'ffn_norm.norm')
  attn = 'self_attn.'
  if cfg.mla.q_lora_rank:
    yield tensor(attn + 'q_a_proj', 'attention.w_dq', 1)
    yield tensor(attn + 'q_a_layernorm', 'attention.q_norm')
    yield tensor(attn + 'q_b_proj', 'attention.w_uq', 1)
  else:
    yield tensor(attn + 'q_proj', 'attention.w_q', 1)
  yield tensor(attn + 'kv_a_proj_with_mqa', 'attention.w_dkv', 1)
  yield tensor(attn + 'kv_a_layernorm', 'attention.kv_norm')
  yield tensor(attn + 'kv_b_proj', 'attention.w_uk attention.w_uv', 1)
  yield tensor(attn + 'o_proj', 'attention.w_o', 2)
  if bias is None:
    for theirs, ours in _SWIGLU:
      yield tensor(f'mlp.{theirs}', f'ffn.{ours}', 1)
    return
  yield tensor('mlp.gate', 'moe.w_router', 1)
  yield Tensor(prefix + 'mlp.gate.e_score_correction_bias', (bias,), 0)
  for theirs, ours in _SWIGLU:
    for e in range(cfg.moe.num_experts):
      yield tensor(f'mlp.experts.{e}.{theirs}', f'moe.{ours}', 1, (e,))
    if cfg.moe.num_shared_experts:
      yield tensor(f'mlp.shared_experts.{theirs}', f'moe.shared.{ours}', 1)


def to_hf(
  cfg: config.ModelConfig, params: Tree, router: Tree
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and f32 arrays of the Hugging Face layout, one after the other."""
  state = {'params': params, 'router': router}
  for tensor in table(cfg):
    leaves = [_get(state, leaf.path)[leaf.index] for leaf in tensor.leaves]
    joined = np.concatenate([np.asarray(x) for x in leaves], axis=-1)
    if tensor.num_in:
      joined = joined.reshape(math.prod(joined.shape[: tensor.num_in]), -1).T
    yield tensor.name, np.ascontiguousarray(joined)


def from_hf(
  cfg: config.Config, names: Mapping[str, Any], read: Callable[[str], Any]
) -> tuple[Tree, Tree]:
  """Parameters and router biases from tensors of the Hugging Face layout.

  Args:
    names: what there is; only membership is asked. read: name -> f32 array.

  Raises:
    InputError: a tensor is missing or has the wrong shape.
  """
  shapes = {
    'params': jax.eval_shape(
      lambda: model.init_params(model.build(cfg), jax.random.key(0))
    ),
    'router': jax.eval_shape(lambda: model.init_router(cfg.model)),
  }
  state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  for tensor in table(cfg.model):
    if tensor.copy:
      continue
    if tensor.name not in names:
      raise errors.InputError(f'{tensor.name} is missing from the checkpoint')
    places = [_get(state, leaf.path)[leaf.index] for leaf in tensor.leaves]
    widths = [place.shape[-1] for place in places]
    shape = (*places[0].shape[:-1], sum(widths))
    array = np.asarray(read(tensor.name))
    want = shape
    if tensor.num_in:
      inputs = math.prod(shape[: tensor.num_in])
      want = (math.prod(shape) // inputs, inputs)
    if array.shape != want:
      raise errors.InputError(
        f'{tensor.name} has shape {list(array.shape)}, wanted {list(want)}'
      )
    ours = (array.T if tensor.num_in else array).reshape(shape)
    pieces = np.split(ours, np.cumsum(widths)[:-1], axis=-1)
    for place, piece in zip(places, pieces, strict=True):
      place[...] = piece
  return state['params'], state['router']


def hf_config(cfg: config.Config) -> dict[str, Any]:
  """The `config.json` of a `DeepseekV3ForCausalLM` with our shape.

  transformers applies YaRN whatever the length; ours and the released code only
  beyond the original one. So `rope_scaling` is written exactly when it acts.
  """
  net = cfg.model
  m, moe, rope = net.mla, net.moe, net.rope
  yarn = {
    'type': 'yarn',
    'factor': rope.factor,
    'original_max_position_embeddings': rope.original_seq_len,
    'beta_fast': rope.beta_fast,
    'beta_slow': rope.beta_slow,
    'mscale': rope.mscale,
    'mscale_all_dim': rope.mscale_all_dim,
  }
  return {
    'architectures': ['DeepseekV3ForCausalLM'],
    'model_type': 'deepseek_v3',
    'vocab_size': net.vocab_size,
    'hidden_size': net.d_model,
    'intermediate_size': net.d_ff,
    'moe_intermediate_size': moe.d_ff,
    'num_hidden_layers': net.num_layers,
    'num_nextn_predict_layers': net.mtp.depth,
    'num_attention_heads': m.num_heads,
    'num_key_value_heads': m.num_heads,
    'n_shared_experts': moe.num_shared_experts,
    'n_routed_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'n_group': moe.num_groups,
    'topk_group': moe.top_groups,
    'topk_method': 'noaux_tc',
    'scoring_func': moe.score_func,
    'norm_topk_prob': moe.norm_topk,
    'routed_scaling_factor': moe.route_scale,
    'first_k_dense_replace': net.num_dense_layers,
    'moe_layer_freq': 1,
    'q_lora_rank': m.q_lora_rank or None,
    'kv_lora_rank': m.kv_lora_rank,
    'qk_nope_head_dim': m.qk_nope_head_dim,
    'qk_rope_head_dim': m.qk_rope_head_dim,
    'v_head_dim': m.v_head_dim,
    'max_position_embeddings': net.max_seq_len,
    'rope_theta': rope.theta,
    'rope_scaling': yarn if net.yarn else None,
    'rms_norm_eps': net.norm_eps,
    'initializer_range': net.init_std,
    'hidden_act': 'silu',
    'attention_bias': False,
    'tie_word_embeddings': False,
  }


def _get(tree: Tree, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree
