"""Long context: the report's two phases behind pre-training, 32K and 128K.

Claim:    TR 4.3: YaRN and 1,000 steps at 32K, then 1,000 at 128K, make a
          model of 4K contexts one of 128K.
Command:  dsv3 train --config=experiments/long_context.py:32k --workdir=B \\
            --config.checkpoint.init_from=A
          dsv3 train --config=experiments/long_context.py:128k --workdir=C \\
            --config.checkpoint.init_from=B
          where A is a workdir of experiments/v3_671b.py.
Hardware: 2,048 H800 in the report.
Expected: needles found at all depths to 128K (TR figure 8); not re-run by
          us at this size. At a laptop's: benchmarks/results/needle.md.

The layouts are ours (NP) and have not run. On the 128 data ranks of
pre-training a step would have 15 and 3.75 micro-batches, fewer than the 32 of
DualPipe with 16 stages, and a micro-batch would be 8 and 32 times as large. So
rows are cut over `context`, experts over 32 devices, and layers are made again
in the backward pass. At 32K, 60 micro-batches go through DualPipeV, without a
second copy of the weights; at 128K the 480 rows give 15, too few for either,
which ZB1P runs on 8 stages, their weights cut over `context` as well (FSDP).

`32k,runlocal` and `128k,runlocal` are the same at a size for a laptop, on two
devices: JAX_NUM_CPU_DEVICES=2, from a run of experiments/v3_671b.py:runlocal.
"""

from experiments import base

_STEPS = 1000
_LR = 7.3e-6
_PHASES = {'32k': (32768, 1920), '128k': (131072, 480)}


def get_config(arg: str = ''):
  """`arg`: '32k' or '128k', and ',runlocal' behind it; '' is '32k'."""
  phase, _, size = arg.partition(',')
  if phase in ('', 'runlocal'):  # what every experiment has
    phase, size = '32k', phase
  if phase not in _PHASES or size not in ('', 'runlocal'):
    raise ValueError(
      f"config argument {arg!r} must be '32k' or '128k', or one of them with "
      "',runlocal' behind it"
    )
  config = base.get_config()
  length, rows = _PHASES[phase]
  with config.unlocked():
    if size == 'runlocal':
      base.shrink(config)
      times = length // 4096  # as much longer as in the report
      length = times * config.model.rope.original_seq_len
      _take(config, length=length, rows=4, steps=10, lr=3e-4)
      config.train.microbatch_size = 2
      config.parallel.context = 2
    else:
      _take(config, length=length, rows=rows, steps=_STEPS, lr=_LR)
      config.train.microbatch_size = 32
      config.model.remat = 'full'
      config.eval.batch_size = 512
      config.sample.prompts = ()  # one device cannot hold the model
      mesh = config.parallel
      mesh.update(node=4, expert=8, pipe=16, context=4, schedule='dualpipev')
      if phase == '128k':
        mesh.update(pipe=8, context=8, schedule='zb1p', fsdp=('context',))
  return config.lock()


def _take(config, *, length, rows, steps, lr):
  """Constant learning rate on long rows; the rest as pre-training ends."""
  tokens = steps * rows * length
  config.model.max_seq_len = length  # beyond the original: YaRN is on
  config.data.seq_len = length
  config.eval.stride = length // 2
  config.train.update(batch_size=rows, batch_size_start=rows)
  config.train.update(batch_ramp_tokens=0, total_tokens=tokens)
  config.optim.lr.update(peak=lr, decay_lr=lr, final_lr=lr)
  config.optim.lr.update(warmup_steps=0, constant_tokens=tokens)
  config.optim.lr.update(decay_tokens=0, hold_tokens=0)
  # NP; these are the values of the last pre-training steps.
  config.optim.mtp_weight.first_tokens = 0
  config.optim.bias_rate.first_tokens = 0
