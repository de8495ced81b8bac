"""How long does the step of a pipeline take to compile?

Question: seconds to trace and to compile the training step of a model on a
pipeline, and whether more micro-batches make it longer? (Wanted: below 60 s on
two cores for the `runlocal` model with 8 layers on 8 ranks under DualPipe, and
as many lines of program for any number of micro-batches.)

  dsv3 bench pipeline_compile [--pipe=8] [--schedule=dualpipe] [--layers=8]
    [--microbatches=16,32] [--steps=3] [--json] [--output=FILE]

On fake CPU devices, without a cache of compiled programs. `lines` are those of
StableHLO. A step is run `steps` times; the least seconds of all cores together
are reported.
"""

import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.common import report
from dsv3_jax import config, errors
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.training import step as steps
from experiments import base

BAR_SECONDS = 60
HYPER = {'lr': 1e-3, 'mtp_weight': 0.3, 'bias_rate': 1e-3}


def make_config(
  pipe: int, kind: str, layers: int, microbatches: int
) -> config.Config:
  """`runlocal` with micro-batches of one row."""
  source = base.get_config('runlocal')
  with source.unlocked():
    source.train.microbatch_size = 1
    source.train.batch_size = source.train.batch_size_start = microbatches
    source.model.num_layers = layers
    source.parallel.pipe, source.parallel.schedule = pipe, kind
  return config.from_config_dict(source)


def arguments(cfg: config.Config, trainer: steps.Trainer) -> tuple:
  """A fresh state, and zeros for tokens."""
  state = jax.jit(lambda: steps.init_state(cfg, jax.random.key(0)))()
  state = trainer.from_model(jax.device_put(state, trainer.model_shardings()))
  count, length = cfg.train.batch_size, cfg.data.seq_len
  ints = jnp.ones((count, 1, length), jnp.int32)
  rows = model.Batch(
    tokens_BT=ints,
    targets_BT=ints,
    positions_BT=ints * jnp.arange(length),
    segments_BT=ints,
    weights_BT=ints.astype(jnp.float32),
  )
  rows = jax.device_put(rows, trainer.batch_sharding())
  hyper = {name: jnp.float32(x) for name, x in HYPER.items()}
  return state, rows, trainer.num_microbatches(count), hyper


def measure(cfg: config.Config, num_steps: int) -> report.Row:
  """Traces, compiles and runs one step."""
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  args, begun = arguments(cfg, trainer), time.monotonic()
  traced = trainer.jit().trace(*args)
  lowered, middle = traced.lower(), time.monotonic()
  cpu = time.process_time()
  compiled, end = lowered.compile(), time.monotonic()
  compile_cpu, best = time.process_time() - cpu, float('inf')
  for _ in range(num_steps):
    cpu = time.process_time()
    state, _ = jax.block_until_ready(compiled(*args))
    args, best = (state, *args[1:]), min(best, time.process_time() - cpu)
  return {
    'microbatches': cfg.train.batch_size,
    'branches': len(trainer.accumulation.pipe.program.branches),
    'lines': lowered.as_text().count('\n'),
    'trace_seconds': middle - begun,
    'compile_seconds': end - middle,
    'compile_cpu_seconds': compile_cpu,
    'step_cpu_seconds': best,
    'temporary_MB': compiled.memory_analysis().temp_size_in_bytes / 1e6,
  }


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('pipeline_compile', __doc__)
  parser.add_argument('--pipe', type=int, default=8)
  parser.add_argument('--schedule', default='dualpipe')
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--microbatches', default='16,32')
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args(argv)
  counts = args.microbatches.split(',')
  if not all(count.isdecimal() for count in counts):
    parser.error(f'--microbatches={args.microbatches!r} must be like 16,32')
  if args.steps < 1:
    parser.error(f'--steps={args.steps} must be at least 1')
  jax.config.update('jax_num_cpu_devices', max(args.pipe, 1))
  jax.config.update('jax_enable_compilation_cache', False)
  rows = report.Rows(args)
  try:
    for count in counts:
      cfg = make_config(args.pipe, args.schedule, args.layers, int(count))
      rows.append(measure(cfg, args.steps))
  except errors.InputError as error:
    parser.error(str(error))
  report.publish('pipeline_compile', __doc__.split('\n\n')[1], rows, args)
  slow = any(row['compile_seconds'] > BAR_SECONDS for row in rows)
  return int(slow or len({row['lines'] for row in rows}) > 1)


if __name__ == '__main__':
  sys.exit(main())
