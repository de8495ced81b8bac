"""Quickstart: a small but complete DeepSeek-V3 on the standard library's text.

Claim:    every part of the system works together: MLA, DeepSeekMoE with
          bias balancing, MTP; the model beats a bigram within minutes.
Command:  make quickstart
Hardware: two CPU cores, no accelerator.
Expected: see README (held-out bits per byte, measured).
"""

from experiments import base


def get_config(arg: str = ''):
  config = base.get_config()
  with config.unlocked():
    config.precision = 'f32'
    model = config.model
    model.update(vocab_size=2048, d_model=192, d_ff=512)
    model.update(num_layers=4, num_dense_layers=1, init_std=0.02)
    model.update(max_seq_len=256, scan_layers=False, remat='none')
    model.rope.original_seq_len = 256
    model.mla.update(num_heads=4, q_lora_rank=96, kv_lora_rank=64)
    model.mla.update(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    model.moe.update(num_experts=16, top_k=4, num_groups=4, top_groups=2)
    model.moe.update(d_ff=96, route_scale=1.0)
    config.data.update(tokenizer_vocab=2048, seq_len=256, packing_bins=256)
    config.data.shuffle_window = 4096
    tokens = 1_200_000
    config.train.update(total_tokens=tokens, batch_size=4, batch_size_start=4)
    config.train.update(microbatch_size=4, batch_ramp_tokens=0, log_every=20)
    lr = config.optim.lr
    lr.update(peak=4e-3, warmup_steps=40, constant_tokens=tokens * 4 // 10)
    lr.update(decay_tokens=tokens * 6 // 10, decay_lr=2e-4, hold_tokens=0)
    lr.final_lr = 2e-4
    config.optim.mtp_weight.first_tokens = tokens * 2 // 3
    config.optim.bias_rate.first_tokens = tokens * 143 // 148
    config.checkpoint.every_steps = 400
    config.eval.update(every_steps=0, stride=128)
    config.sample.prompts = ('def ', 'import ', 'The ')
  if arg == 'runlocal':
    base.shrink(config)
  elif arg:
    raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
  return config.lock()
