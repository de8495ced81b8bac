"""What a training step costs more when its FP8 is simulated on a CPU.

Question: how much longer does a step take with precision 'fp8' than with
'bf16', same model and batch, where no FP8 unit exists? (Wanted: at most 2.5.)

  dsv3 bench fp8_step [--rounds=9] [--threads=2] [--json] [--output=FILE]

Both precisions live in one process and take turns, A B A B ..., so that other
load of the machine affects both equally. The model is at least 512 wide: below
that a tile of 128 spans much of a row. Tokens are random; a step is forward,
backward, clipping and AdamW, as training runs it.
"""

import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import clock, report
from dsv3_jax import config
from dsv3_jax.nn import model
from dsv3_jax.training import step as steps
from experiments import quickstart

PRECISIONS = ('f32', 'bf16', 'fp8')
ABOUT = (
  'Seconds of one training step. `ratio_of_medians` and `ratio_of_minima` are '
  'to the BF16 step; the aim is at most 2.5. The f32 step shows what XLA does '
  'with BF16 on a CPU.'
)


def make_config(precision: str, runlocal: bool = False) -> config.Config:
  """The quickstart, 512 wide, 2 layers, 8 experts; or tiny, for tests."""
  source = quickstart.get_config('runlocal' if runlocal else '')
  with source.unlocked():
    source.precision = precision
    if not runlocal:
      net = source.model
      net.update(d_model=512, d_ff=1536, num_layers=2, num_dense_layers=1)
      net.mla.update(num_heads=4, q_lora_rank=256, kv_lora_rank=128)
      net.mla.update(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
      net.moe.update(num_experts=8, top_k=2, num_groups=1, top_groups=1)
      net.moe.update(d_ff=256)
  return config.from_config_dict(source)


class Trainer:
  """A model and its state; `step` trains once on the same batch."""

  def __init__(self, cfg: config.Config):
    self._cfg = cfg
    init = functools.partial(steps.init_state, cfg)
    self._state = jax.jit(init)(jax.random.key(0))
    self._args = (batch(cfg), jnp.int32(1), _hyper())
    self._step = jax.jit(steps.make_train_step(cfg), donate_argnums=0)

  def step(self) -> float:
    """The loss, which has to be there before this returns."""
    self._state, metrics = self._step(self._state, *self._args)
    jax.block_until_ready(self._state)
    return metrics['loss'].item()


def batch(cfg: config.Config) -> model.Batch:
  """One micro-batch of random tokens, [1, B, T]."""
  shape = (1, cfg.train.microbatch_size, cfg.data.seq_len)
  rng = np.random.default_rng(0)
  tokens = lambda: jnp.asarray(
    rng.integers(1, cfg.model.vocab_size, shape), jnp.int32
  )
  return model.Batch(
    tokens_BT=tokens(),
    targets_BT=tokens(),
    positions_BT=jnp.broadcast_to(jnp.arange(shape[-1]), shape),
    segments_BT=jnp.ones(shape, jnp.int32),
    weights_BT=jnp.ones(shape, jnp.float32),
  )


def _hyper() -> steps.Hyper:
  return {
    'lr': jnp.float32(1e-4),
    'mtp_weight': jnp.float32(0.3),
    'bias_rate': jnp.float32(1e-3),
  }


def measure(rounds: int, runlocal: bool = False) -> dict[str, list[float]]:
  """Seconds of each step of each precision, in turns; two are not counted."""
  trainers = {p: Trainer(make_config(p, runlocal)) for p in PRECISIONS}
  seconds = {p: [] for p in PRECISIONS}
  for turn in range(rounds + 2):
    at = turn % len(PRECISIONS)
    for name in PRECISIONS[at:] + PRECISIONS[:at]:
      start = time.perf_counter()
      loss = trainers[name].step()
      if turn >= 2:
        seconds[name].append(time.perf_counter() - start)
      assert np.isfinite(loss), (name, loss)
  return seconds


def to_rows(seconds: dict[str, list[float]], tokens: int) -> list[report.Row]:
  """One for each precision; ratios are to BF16."""
  times = {name: clock.summary(samples) for name, samples in seconds.items()}
  base = times['bf16']
  return [
    {
      'precision': name,
      **timing.row(),
      'tokens_per_second': tokens / timing.median,
      'ratio_of_medians': timing.median / base.median,
      'ratio_of_minima': timing.minimum / base.minimum,
    }
    for name, timing in times.items()
  ]


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('fp8_step', __doc__)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--dry_run', action='store_true', help='a tiny model')
  args = parser.parse_args(argv)
  if args.rounds < 1:
    parser.error(f'--rounds={args.rounds} must be at least 1')
  if hasattr(os, 'sched_setaffinity'):  # what XLA counts; Linux only
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)
  cfg = make_config('bf16', args.dry_run)
  tokens = cfg.train.microbatch_size * cfg.data.seq_len
  rows = report.Rows(args)
  for row in to_rows(measure(args.rounds, args.dry_run), tokens):
    rows.append(row)
  report.publish('fp8_step', f'{ABOUT} {_shape(cfg)}', rows, args)
  return 0


def _shape(cfg: config.Config) -> str:
  net = cfg.model
  return (
    f'd_model {net.d_model}, {net.num_layers} layers and {net.mtp.depth} MTP, '
    f'{net.moe.num_experts} experts top-{net.moe.top_k} of width '
    f'{net.moe.d_ff}, batch {cfg.train.microbatch_size} x '
    f'{cfg.data.seq_len}, {os.cpu_count()} cores.'
  )


if __name__ == '__main__':
  sys.exit(main())
