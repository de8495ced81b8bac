"""Laptop: the quickstart's model, trained for half an hour to an hour.

Claim:    the same network, given eight times the tokens, compresses
          held-out text better than xz.
Command:  dsv3 train --config=experiments/laptop.py --workdir=runs/laptop
Hardware: two CPU cores, no accelerator.
Expected: benchmarks/results/laptop.md (curve, figures and samples).

The batch grows from 4 to 16 sequences, as the report's does (TR 4.2): the
number of micro-batches is an input, so nothing is compiled twice.
"""

from experiments import base, quickstart


def get_config(arg: str = ''):
  config = quickstart.get_config()
  tokens = 10_000_000
  with config.unlocked():
    config.train.update(total_tokens=tokens, batch_size=16)
    config.train.update(batch_ramp_tokens=tokens // 3, batch_size_step=4)
    config.train.log_every = 50
    lr = config.optim.lr
    lr.update(warmup_steps=100, constant_tokens=tokens * 4 // 10)
    lr.update(decay_tokens=tokens * 6 // 10, decay_lr=1e-4, final_lr=1e-4)
    config.optim.mtp_weight.first_tokens = tokens * 2 // 3
    config.optim.bias_rate.first_tokens = tokens * 143 // 148
    config.eval.every_steps = 250
    config.sample.max_new_tokens = 160
  if arg == 'runlocal':
    base.shrink(config)
  elif arg:
    raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
  return config.lock()
