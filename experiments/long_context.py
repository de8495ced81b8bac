"""Long context: the report's two phases after pre-training, 32K and 128K.

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

The meshes are ours (NP) and have not been run. With the 128 data ranks of
pre-training, a step would have 15 and 3.75 micro-batches, fewer than the 32
that DualPipe needs with 16 stages, each of 8 and 32 times as many tokens. So
sequences are sharded over `context` and experts over 32 devices, and layers are
recomputed in the backward pass. At 32K, DualPipeV runs 60 micro-batches,
without a second copy of the weights. At 128K, the 480 sequences give 15
micro-batches, too few for both schedules. ZB1P runs them on 8 stages, with
weights also sharded over `context` (FSDP).

`32k,runlocal` and `128k,runlocal` have a laptop's size, on two devices: set
JAX_NUM_CPU_DEVICES=2, and start from a run of experiments/v3_671b.py:runlocal.
"""

from experiments import base

_STEPS = 1000
_LR = 7.3e-6
_PHASES = {'32k': (32768, 1920), '128k': (131072, 480)}


def get_config(arg: str = ''):
  """`arg`: '32k' or '128k', optionally with ',runlocal'; '' is '32k'."""
  phase, _, size = arg.partition(',')
  if phase in ('', 'runlocal'):  # every experiment accepts these
    phase, size = '32k', phase
  if phase not in _PHASES or size not in ('', 'runlocal'):
    raise ValueError(
      f"config argument {arg!r} must be '32k' or '128k', or one of them "
      "followed by ',runlocal'"
    )
  config = base.get_config()
  length, rows = _PHASES[phase]
  with config.unlocked():
    if size == 'runlocal':
      base.shrink(config)
      times = length // 4096  # the factor of the report
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
  """Sets long sequences and a constant learning rate."""
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
