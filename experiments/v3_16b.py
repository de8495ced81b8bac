"""16B: V2-Lite's shape with V3's sigmoid gate, bias balancing and MTP.

Claim:    the small model of TR tables 4 and 5 is "similar to V2-Lite"; its
          exact shape is not published. This one has 15.7B parameters, 2.66B
          of them active.
Command:  dsv3 train --config=experiments/v3_16b.py --workdir=DIR
Hardware: 64 accelerators of 80 GB.
Expected: Pile-test 0.724 bits per byte after 1.33T tokens (TR table 5); not
          re-run by us. LR and batch are V2-Lite's (V2 report, appendix B).
"""

from experiments import base


def get_config(arg: str = ''):
  config = base.get_config()
  with config.unlocked():
    config.precision = 'bf16'
    model = config.model
    model.update(vocab_size=102400, d_model=2048, d_ff=10944)
    model.update(num_layers=27, num_dense_layers=1)
    model.mla.update(num_heads=16, q_lora_rank=0)
    model.rope.update(mscale=0.707, mscale_all_dim=0.707)
    model.moe.update(num_experts=64, num_shared_experts=2, top_k=6)
    model.moe.update(num_groups=1, top_groups=1, d_ff=1408, route_scale=1.0)
    config.data.tokenizer_vocab = 102400
    tokens = 1_330_000_000_000
    config.train.update(total_tokens=tokens, batch_size=4608)
    config.train.update(batch_size_start=4608, batch_ramp_tokens=0)
    lr = config.optim.lr
    # V2's steps: times 0.316 after 80 % and after 90 % of the tokens.
    lr.update(peak=4.2e-4, constant_tokens=tokens * 8 // 10, decay_tokens=0)
    lr.update(decay_lr=1.33e-4, hold_tokens=tokens // 10, final_lr=4.2e-5)
    config.optim.mtp_weight.first_tokens = tokens * 2 // 3
    config.optim.bias_rate.first_tokens = tokens * 143 // 148
  if arg == 'runlocal':
    base.shrink(config)
  elif arg:
    raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
  return config.lock()
