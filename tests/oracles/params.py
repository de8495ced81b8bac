"""Parameters, cache bytes and FLOPs from the dimensions alone (TR 2, 4.2).

`config` is any object with the attributes of a model configuration. Counting
rules, found by matching the published figures:
  main            everything outside the MTP modules, the router bias included
  active          what one token passes: main less the experts that it
                  does not choose and less the router bias
  mtp_stored      the modules as the checkpoint stores them, each with its copy
                  of embedding and head; mtp_unique without the copies
  training FLOPs  6 per active parameter, the head counted, the embedding (a
                  lookup) not, plus 6 N S (X + U) per layer for the scores and
                  their use; half of that when causal
Only models with a sigmoid router carry a bias.
"""


def attention(config):
  """One MLA layer with its two latent norms."""
  return attention_matrices(config) + attention_norms(config)


def attention_matrices(config):
  """The projections of one MLA layer (eqs. 1-11)."""
  dims, width = config.mla, config.d_model
  heads, latent = dims.num_heads, dims.kv_lora_rank
  qk_dim = dims.qk_nope_head_dim + dims.qk_rope_head_dim
  if dims.q_lora_rank:
    query = width * dims.q_lora_rank + dims.q_lora_rank * heads * qk_dim
  else:
    query = width * heads * qk_dim
  down = width * (latent + dims.qk_rope_head_dim)
  up = latent * heads * (dims.qk_nope_head_dim + dims.v_head_dim)
  return query + down + up + heads * dims.v_head_dim * width


def attention_norms(config):
  """Norm weights of the query and key-value latents."""
  return config.mla.q_lora_rank + config.mla.kv_lora_rank


def expert(config):
  """One routed expert: gate, up and down."""
  return 3 * config.d_model * config.moe.d_ff


def dense_ffn(config):
  """The SwiGLU of a dense layer."""
  return 3 * config.d_model * config.d_ff


def router(config):
  """The gate's matrix, without its bias."""
  return config.d_model * config.moe.num_experts


def bias(config):
  """The bias of one router."""
  return config.moe.num_experts if config.moe.score_func == 'sigmoid' else 0


def moe_ffn(config):
  """Router, its bias, shared and routed experts of one layer."""
  count = config.moe.num_shared_experts + config.moe.num_experts
  return count * expert(config) + router(config) + bias(config)


def embedding(config):
  """The embedding table; the head has as many."""
  return config.vocab_size * config.d_model


def mtp_module(config):
  """One module without embedding and head (eqs. 21-23)."""
  width = config.d_model
  norms = 5 * width  # enorm, hnorm, its own output norm and the block's two
  projection = 2 * width * width
  return norms + projection + attention(config) + moe_ffn(config)


def counts(config):
  """All counts of the module docstring, as a dict of ints."""
  sparse = config.num_layers - config.num_dense_layers
  per_layer = attention(config) + 2 * config.d_model
  main = config.num_layers * per_layer + config.d_model
  main += config.num_dense_layers * dense_ffn(config)
  main += sparse * moe_ffn(config) + 2 * embedding(config)
  idle = (config.moe.num_experts - config.moe.top_k) * expert(config)
  active = main - sparse * (idle + bias(config))
  depth, module = config.mtp.depth, mtp_module(config)
  return {
    'main': main,
    'router_bias': sparse * bias(config),
    'mtp_stored': depth * (module + 2 * embedding(config)),
    'mtp_unique': depth * module,
    'active': active,
    'active_without_embedding': active - embedding(config),
  }


def kv_bytes_per_token(config, bytes_per_value, with_mtp=False):
  """Latent and rotated key of every layer (TR 2.1.1)."""
  layers = config.num_layers + (config.mtp.depth if with_mtp else 0)
  width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
  return layers * width * bytes_per_value


def flops_per_token(config, seq_len):
  """Training FLOPs per token: causal, non_causal and mtp (causal), floats.

  Main model only for the first two. A causal token sees seq_len / 2 tokens.
  """
  passed = 6.0 * counts(config)['active_without_embedding']
  core = _attention_core(config, seq_len)
  idle = (config.moe.num_experts - config.moe.top_k) * expert(config)
  module = mtp_module(config) - idle - bias(config) + embedding(config)
  return {
    'causal': passed + config.num_layers * core / 2,
    'non_causal': passed + config.num_layers * core,
    'mtp': config.mtp.depth * (6.0 * module + core / 2),
  }


def _attention_core(config, seq_len):
  """Scores and weighted values of one layer, forward and backward."""
  dims = config.mla
  per_pair = dims.qk_nope_head_dim + dims.qk_rope_head_dim + dims.v_head_dim
  return 6.0 * dims.num_heads * seq_len * per_pair
