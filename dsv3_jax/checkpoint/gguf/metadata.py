"""The settings of a model as the metadata of a GGUF file.

llama.cpp's architecture `deepseek2` computes V2 and V3. It attends in the
absorbed form: one key of C + R and one value of C for all heads.
"""

import gguf

from dsv3_jax import config, errors

ARCH = 'deepseek2'
# What llama.cpp has room for.
_MOST_EXPERTS, _MOST_LAYERS = 1024, 512
# llama.cpp takes models of these depths for V2-Lite, without a query latent.
_LITE_LAYERS = (26, 27)
_BETAS = (32.0, 1.0)  # of YaRN; what a file says is not read
_SCORES = {
  'sigmoid': gguf.ExpertGatingFuncType.SIGMOID,
  'softmax': gguf.ExpertGatingFuncType.SOFTMAX,
}


def check(cfg: config.Config) -> None:
  """Refuses a model that llama.cpp would not load, or compute otherwise.

  Raises:
    InputError: names the setting, its value and the rule.
  """
  net, moe, rope = cfg.model, cfg.model.moe, cfg.model.rope
  rules = [
    (
      net.num_layers <= _MOST_LAYERS,
      f'model.num_layers={net.num_layers} must be <= {_MOST_LAYERS}',
    ),
    (
      net.num_layers not in _LITE_LAYERS or not net.mla.q_lora_rank,
      f'model.mla.q_lora_rank={net.mla.q_lora_rank} must be 0 with '
      f'model.num_layers={net.num_layers}, the depth of V2-Lite',
    ),
    (
      net.latent_norm_eps == net.norm_eps,
      f'model.latent_norm_eps={net.latent_norm_eps} must be '
      f'model.norm_eps={net.norm_eps}',
    ),
    (
      not net.yarn or rope.mscale == rope.mscale_all_dim,
      f'model.rope.mscale={rope.mscale} must be '
      f'model.rope.mscale_all_dim={rope.mscale_all_dim}',
    ),
    (
      not net.yarn or (rope.beta_fast, rope.beta_slow) == _BETAS,
      f'model.rope.beta_fast={rope.beta_fast} and '
      f'beta_slow={rope.beta_slow} must be {_BETAS[0]} and {_BETAS[1]}',
    ),
  ]
  if net.num_moe_layers:
    rules += [
      (
        moe.num_experts <= _MOST_EXPERTS,
        f'model.moe.num_experts={moe.num_experts} must be <= {_MOST_EXPERTS}',
      ),
      (
        moe.num_shared_experts > 0,
        f'model.moe.num_shared_experts={moe.num_shared_experts} must be > 0',
      ),
      (
        moe.score_func == 'sigmoid' or not _has_groups(moe),
        f'model.moe.top_groups={moe.top_groups} must be '
        f'model.moe.num_groups={moe.num_groups} with '
        f'model.moe.score_func={moe.score_func!r}: groups are scored by their '
        'best two experts',
      ),
    ]
  for holds, message in rules:
    if not holds:
      raise errors.InputError(f'--format=gguf: {message} (llama.cpp)')


def write(writer: gguf.GGUFWriter, cfg: config.Config) -> None:
  """Adds every setting that llama.cpp reads of a checked model."""
  net, mla, rope = cfg.model, cfg.model.mla, cfg.model.rope
  writer.add_vocab_size(net.vocab_size)
  writer.add_context_length(net.max_seq_len)
  writer.add_embedding_length(net.d_model)
  writer.add_block_count(net.num_layers)
  writer.add_leading_dense_block_count(net.num_dense_layers)
  writer.add_feed_forward_length(net.d_ff)
  writer.add_layer_norm_rms_eps(net.norm_eps)
  writer.add_head_count(mla.num_heads)
  writer.add_head_count_kv(1)
  writer.add_q_lora_rank(mla.q_lora_rank)
  writer.add_kv_lora_rank(mla.kv_lora_rank)
  writer.add_key_length(mla.cache_width)
  writer.add_value_length(mla.kv_lora_rank)
  writer.add_key_length_mla(mla.qk_head_dim)
  writer.add_value_length_mla(mla.v_head_dim)
  _write_experts(writer, net)
  writer.add_rope_dimension_count(mla.qk_rope_head_dim)
  writer.add_rope_freq_base(rope.theta)
  if net.yarn:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_scaling_orig_ctx_len(rope.original_seq_len)
    # llama.cpp divides the 0.1 out again.
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)
  else:
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _write_experts(writer: gguf.GGUFWriter, net: config.ModelConfig) -> None:
  """Adds the settings of the MoE layers; llama.cpp wants some without any."""
  moe = net.moe
  some = bool(net.num_moe_layers)
  writer.add_expert_feed_forward_length(moe.d_ff)
  writer.add_expert_count(some * moe.num_experts)
  writer.add_expert_used_count(some * moe.top_k)
  writer.add_expert_shared_count(some * moe.num_shared_experts)
  writer.add_expert_weights_scale(moe.route_scale)
  writer.add_expert_weights_norm(moe.norm_topk)
  # Without it, llama.cpp takes softmax.
  writer.add_expert_gating_func(_SCORES[moe.score_func])
  if some and _has_groups(moe):
    writer.add_expert_group_count(moe.num_groups)
    writer.add_expert_group_used_count(moe.top_groups)


def _has_groups(moe: config.MoeConfig) -> bool:
  """True if groups limit the choice of experts."""
  return moe.top_groups < moe.num_groups
