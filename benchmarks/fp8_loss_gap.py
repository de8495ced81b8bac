"""Does FP8 train? BF16, FP8 and block-wise Dgrad on the same data (TR App. B).

  dsv3 bench fp8_loss_gap --folder=DIR [--seeds=3] [--steps=2000]

Trains `experiments/ablations/fp8.py` in each precision from each seed, in runs
of `dsv3_jax.train` below DIR; a run that is there already is read, one that was
stopped goes on. Seeds differ in initialisation, order of data, FIM and splits;
the precisions of one seed share all of them. Then, of the main training loss:

  gap_n = (EMA of the arm's loss - EMA of BF16's) / EMA of BF16's

with the report's decay of 0.9, for each seed and for the mean over seeds. The
spread beside it is that of the same EMA between BF16 runs of different seeds.
Writes a table and a figure beside it.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import matplotlib
import numpy as np

from benchmarks.common import report
from dsv3_jax import config, train
from experiments.ablations import fp8 as experiment

matplotlib.use('agg')

ARMS = ('bf16', 'fp8', 'fp8_block_dgrad')
MEMORY = 0.9  # of the smoothed loss, as in the report's figure 10
BAR = 0.25  # per cent


def configured(arm: str, seed: int, args: argparse.Namespace) -> config.Config:
  """The experiment in one precision and from one seed."""
  source = experiment.get_config()
  with source.unlocked():
    source.precision, source.seed = arm, seed
    for change in args.set:
      path, value = change.split('=')
      *keys, last = path.split('.')
      node = source
      for key in keys:
        node = node[key]
      node[last] = json.loads(value)
    rows = source.train.batch_size * source.data.seq_len
    source.train.total_tokens = args.steps * rows
    source.sample.prompts = ()
    source.checkpoint.update(every_steps=500, keep=1)
  return config.from_config_dict(source)


def losses(
  arm: str, seed: int, args: argparse.Namespace
) -> tuple[np.ndarray, float]:
  """Main loss of every step [nats], and held-out bits per byte."""
  workdir = args.folder / f'{arm}-{seed}'
  path = workdir / 'metrics.jsonl'
  if len(_train_rows(path)) < args.steps:
    train.run(configured(arm, seed, args), workdir)
  rows = _train_rows(path)
  found = np.array([rows[n] for n in range(1, args.steps + 1)])
  held_out = [
    row['bits_per_byte']
    for row in map(json.loads, path.read_text().splitlines())
    if 'bits_per_byte' in row
  ]
  return found, held_out[-1]


def _train_rows(path: pathlib.Path) -> dict[int, float]:
  """Step -> loss, of what has been written so far."""
  if not path.exists():
    return {}
  rows = map(json.loads, path.read_text().splitlines())
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def smoothed(loss_N: np.ndarray, memory: float = MEMORY) -> np.ndarray:
  """Exponential mean; the first entries are means of what there is."""
  out_N, value, weight = np.empty(len(loss_N)), 0.0, 0.0
  for n, loss in enumerate(loss_N):
    value = memory * value + (1 - memory) * loss
    weight = memory * weight + (1 - memory)
    out_N[n] = value / weight
  return out_N


@dataclasses.dataclass(frozen=True)
class Gap:
  """Relative differences from BF16 in per cent, a row a seed."""

  curves_SN: np.ndarray

  def after_warmup(self) -> np.ndarray:
    return self.curves_SN[:, self.curves_SN.shape[1] // 10 :]

  def mean_curve(self) -> np.ndarray:
    return np.mean(self.after_warmup(), axis=0)


def gap(arm_SN: np.ndarray, base_SN: np.ndarray) -> Gap:
  """Of smoothed losses, seed by seed."""
  return Gap(100.0 * (arm_SN / base_SN - 1.0))


def spread(base_SN: np.ndarray) -> Gap:
  """Of every pair of BF16 seeds."""
  count = len(base_SN)
  pairs = [(i, j) for i in range(count) for j in range(i)]
  if not pairs:
    return Gap(np.full((1, base_SN.shape[1]), np.nan))
  return Gap(
    np.stack([100.0 * (base_SN[i] / base_SN[j] - 1.0) for i, j in pairs])
  )


def row(name: str, told: Gap, bits: list[float]) -> report.Row:
  """What the table says of one arm, after the first tenth of the steps."""
  after_SN, mean_N = told.after_warmup(), told.mean_curve()
  last_SN = after_SN[:, -max(1, after_SN.shape[1] // 9) :]
  return {
    'against_bf16': name,
    'largest_of_mean_percent': float(np.max(np.abs(mean_N))),
    'largest_of_any_seed_percent': float(np.max(np.abs(after_SN))),
    'mean_magnitude_percent': float(np.mean(np.abs(after_SN))),
    'steps_of_mean_within_0.25_percent': float(np.mean(np.abs(mean_N) < BAR)),
    'last_tenth_percent': float(np.mean(last_SN)),
    'heldout_bits_per_byte': ' '.join(f'{b:.4f}' for b in bits),
  }


def plot(path: pathlib.Path, gaps: dict[str, Gap], base: Gap) -> None:
  """Gap curves of the arms, the band between seeds behind them."""
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
  count = base.curves_SN.shape[1]
  steps = np.arange(1, count + 1)
  band_N = np.max(np.abs(base.curves_SN), axis=0)
  colours = {'fp8': 'tab:blue', 'fp8_block_dgrad': 'tab:red'}
  for axis, with_band in zip(axes, (True, False), strict=True):
    if with_band:
      axis.fill_between(
        steps, -band_N, band_N, color='0.85', label='BF16, between seeds'
      )
    for name, told in gaps.items():
      for curve in told.curves_SN:
        axis.plot(steps, curve, color=colours[name], lw=0.4, alpha=0.5)
      mean_N = np.mean(told.curves_SN, axis=0)
      axis.plot(steps, mean_N, color=colours[name], lw=1.4, label=name)
    for sign in (-1, 1):
      axis.axhline(sign * BAR, color='k', lw=0.8, ls='--')
    axis.axvline(count // 10, color='k', lw=0.5, ls=':')
    axis.set_ylabel('loss against BF16, per cent')
    axis.legend(loc='upper right')
  axes[0].set_ylim(-8, 8)
  axes[1].set_ylim(-1, 1)
  axes[1].set_xlabel('step')
  figure.suptitle(f'EMA({MEMORY}) of the training loss, same seed and data')
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs what is missing, then compares."""
  parser = report.parser('fp8_loss_gap', __doc__)
  parser.add_argument(
    '--folder', type=pathlib.Path, required=True, help='workdirs of the runs'
  )
  parser.add_argument('--seeds', type=int, default=3, help='runs of each arm')
  parser.add_argument('--steps', type=int, default=experiment.STEPS)
  parser.add_argument(
    '--set', action='append', default=[], help='a.b=JSON, for trials'
  )
  args = parser.parse_args(argv)
  jax.config.update('jax_compilation_cache_dir', str(args.folder / 'compiled'))
  found, bits = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
  for seed in range(args.seeds):
    for arm in ARMS:
      loss_N, held_out = losses(arm, seed, args)
      found[arm].append(smoothed(loss_N))
      bits[arm].append(held_out)
  found = {arm: np.stack(curves) for arm, curves in found.items()}
  base = spread(found['bf16'])
  gaps = {arm: gap(found[arm], found['bf16']) for arm in ARMS[1:]}
  rows = report.Rows(args)
  for arm, told in gaps.items():
    rows.append(row(arm, told, bits[arm]))
  rows.append(row('bf16, between seeds', base, bits['bf16']))
  output = args.output or report.RESULTS / 'fp8_loss_gap.md'
  plot(output.with_suffix('.png'), gaps, base)
  about = (
    f'`dsv3 bench fp8_loss_gap --folder=DIR --seeds={args.seeds} '
    f'--steps={args.steps}`; after the first tenth of the steps.'
  )
  args.output = output
  report.publish('fp8_loss_gap', about, rows, args)


if __name__ == '__main__':
  main()
