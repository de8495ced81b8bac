"""FP8 against BF16: a small DeepSeek-V3, wide enough for several tiles.

Claim:    FP8 with fine-grained scales trains as BF16 does: the loss differs by
          less than 0.25 % (TR 3.3, App. B.1); activation gradients in blocks of
          128 x 128 are worse (App. B.2: a 16B model diverged).
Command:  python -m benchmarks.fp8_loss_gap --folder=DIR
          (or dsv3 train --config=experiments/ablations/fp8.py --workdir=DIR
          with --config.precision=bf16, fp8 or fp8_block_dgrad)
Hardware: two CPU cores, no accelerator: FP8 matmuls are simulated exactly.
Expected: benchmarks/results/fp8_loss_gap.md
"""

from experiments import base, quickstart

STEPS = 2000


def get_config(arg: str = ''):
  config = quickstart.get_config()
  tokens = STEPS * 512
  with config.unlocked():
    config.precision = 'fp8'
    model = config.model
    # A tile is 128 wide: every width has at least two.
    model.update(d_model=512, d_ff=512, num_layers=2, max_seq_len=128)
    model.rope.original_seq_len = 128
    model.mla.update(q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64)
    model.mla.update(qk_rope_head_dim=32, v_head_dim=64)
    model.moe.update(num_experts=4, top_k=2, num_groups=2, d_ff=256)
    config.data.seq_len = 128
    config.train.update(total_tokens=tokens, log_every=1)
    config.optim.ema_decay = 0.0
    lr = config.optim.lr
    lr.update(peak=1e-3, constant_tokens=tokens * 4 // 10)
    lr.update(decay_tokens=tokens * 6 // 10, decay_lr=1e-4, final_lr=1e-4)
    config.optim.mtp_weight.first_tokens = tokens * 2 // 3
    config.optim.bias_rate.first_tokens = tokens * 143 // 148
    config.eval.stride = 64
    config.sample.max_new_tokens = 64
  if arg == 'runlocal':
    base.shrink(config)
    with config.unlocked():
      config.precision = 'fp8'
  elif arg:
    raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
  return config.lock()
