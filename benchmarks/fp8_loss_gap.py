"""Does FP8 train? BF16, FP8 and block-wise Dgrad on the same data (TR App. B).

  dsv3 bench fp8_loss_gap --folder=DIR [--seeds=3] [--steps=2000]

Trains `experiments/ablations/fp8.py` in each precision from each seed, in runs
of `training.loop` below DIR; a finished run is read, an interrupted one is
resumed. Seeds differ in initialisation, order of data, FIM and splits;
the arms of one seed share all of them. Of the main training loss:

  gap_n = (EMA of the arm's loss - EMA of BF16's) / EMA of BF16's

with the report's decay of 0.9 and with 0.99, for each seed and for their mean.
Two networks that differ at all soon answer the few hundred tokens of a step
differently. The gap from that alone is measured by `bf16_twin`, a second BF16
run whose initial matrices are larger by a thousandth. Beside them stands
the spread between BF16 runs of different seeds. Writes a table, a figure and
the losses themselves.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import jax
import matplotlib
import numpy as np

from benchmarks.common import report
from dsv3_jax import config
from dsv3_jax.training import loop
from experiments.ablations import fp8 as experiment

matplotlib.use('agg')

ARMS = ('bf16', 'fp8', 'fp8_block_dgrad', 'bf16_twin')
MEMORIES = (0.9, 0.99)  # of the smoothed loss; the first as in figure 10
BAR = 0.25  # per cent
NUDGE = 1.001  # of the twin's initial matrices


def configured(arm: str, seed: int, args: argparse.Namespace) -> config.Config:
  """The experiment in one precision and from one seed."""
  source = experiment.get_config()
  with source.unlocked():
    source.precision, source.seed = arm.removesuffix('_twin'), seed
    if arm.endswith('_twin'):
      source.model.init_std *= NUDGE
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
    loop.run(configured(arm, seed, args), workdir)
  rows = _train_rows(path)
  loss_N = np.array([rows[n] for n in range(1, args.steps + 1)])
  held_out = [
    row['bits_per_byte']
    for row in map(json.loads, path.read_text().splitlines())
    if 'bits_per_byte' in row
  ]
  return loss_N, held_out[-1]


def _train_rows(path: pathlib.Path) -> dict[int, float]:
  """Step -> loss, of what has been written so far."""
  if not path.exists():
    return {}
  rows = map(json.loads, path.read_text().splitlines())
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def smoothed(loss_by_seed_step: np.ndarray, memory: float) -> np.ndarray:
  """Exponential mean over steps; the first entries are of what there is."""
  out_by_seed_step, value, weight = np.empty(loss_by_seed_step.shape), 0.0, 0.0
  for n in range(loss_by_seed_step.shape[1]):
    value = memory * value + (1 - memory) * loss_by_seed_step[:, n]
    weight = memory * weight + (1 - memory)
    out_by_seed_step[:, n] = value / weight
  return out_by_seed_step


def gap(arm_by_seed_step, base_by_seed_step, memory: float = 0.0) -> np.ndarray:
  """Relative difference of smoothed losses in per cent, a row a seed."""
  return 100.0 * (
    smoothed(arm_by_seed_step, memory) / smoothed(base_by_seed_step, memory)
    - 1.0
  )


def between_seeds(
  loss_by_seed_step: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Every pair of runs, as (arm, base) of `gap`."""
  pairs = [(i, j) for i in range(len(loss_by_seed_step)) for j in range(i)]
  first, second = zip(*pairs, strict=True)
  return loss_by_seed_step[list(first)], loss_by_seed_step[list(second)]


def row(
  name: str, arm_by_seed_step, base_by_seed_step, bits: list[float]
) -> report.Row:
  """The table's row of one arm, after the first tenth of the steps."""
  count = arm_by_seed_step.shape[1]
  row: report.Row = {'against_bf16': name}
  for memory in MEMORIES:
    curves_by_seed_step = gap(arm_by_seed_step, base_by_seed_step, memory)[
      :, count // 10 :
    ]
    mean_by_step = np.abs(np.mean(curves_by_seed_step, axis=0))
    key = f'ema_{memory}'
    row[f'{key}_largest_of_mean_percent'] = float(np.max(mean_by_step))
    row[f'{key}_steps_within_bar_percent'] = float(
      100 * np.mean(mean_by_step < BAR)
    )
    row[f'{key}_largest_of_seeds_percent'] = float(
      np.max(np.abs(curves_by_seed_step))
    )
  raw_by_seed_step = gap(arm_by_seed_step, base_by_seed_step)
  for title, part in (
    ('from_tenth_to_half', slice(count // 10, count // 2)),
    ('second_half', slice(count // 2, count)),
  ):
    mean_by_seed = np.mean(raw_by_seed_step[:, part], axis=1)
    row[f'{title}_percent'] = float(np.mean(mean_by_seed))
    # Between seeds: two networks of one seed that part stay apart for long.
    if mean_by_seed.size > 1:
      error = np.std(mean_by_seed, ddof=1) / np.sqrt(mean_by_seed.size)
      row[f'{title}_standard_error'] = float(error)
  row['heldout_bits_per_byte'] = ' '.join(f'{b:.4f}' for b in bits)
  return row


def plot(path: pathlib.Path, losses_of: dict[str, np.ndarray]) -> None:
  """Gap curves of the arms for both decays."""
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(2, 1, figsize=(8, 8), sharex=True)
  base_by_seed_step = losses_of['bf16']
  count = base_by_seed_step.shape[1]
  steps = np.arange(1, count + 1)
  colours = {
    'bf16_twin': '0.45',
    'fp8_block_dgrad': 'tab:red',
    'fp8': 'tab:blue',
  }
  for axis, memory in zip(axes, MEMORIES, strict=True):
    for name, colour in colours.items():
      if name not in losses_of:
        continue
      curves_by_seed_step = gap(losses_of[name], base_by_seed_step, memory)
      for curve_by_step in curves_by_seed_step:
        axis.plot(steps, curve_by_step, color=colour, lw=0.3, alpha=0.4)
      mean_by_step = np.mean(curves_by_seed_step, axis=0)
      axis.plot(steps, mean_by_step, color=colour, lw=1.4, label=name)
    for sign in (-1, 1):
      axis.axhline(sign * BAR, color='k', lw=0.8, ls='--')
    axis.axvline(count // 10, color='k', lw=0.5, ls=':')
    axis.set_ylabel(f'against BF16, per cent; EMA {memory}')
    axis.set_ylim(-2, 2)
    axis.legend(loc='lower right')
  axes[1].set_xlabel('step')
  figure.suptitle('Training loss, same seed and data; thick: mean of seeds')
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def save(path: pathlib.Path, losses_of: dict[str, np.ndarray]) -> None:
  """The loss of every step, a column a run."""
  columns = {
    f'{arm}-{seed}': loss_by_step
    for arm, loss_by_seed_step in losses_of.items()
    for seed, loss_by_step in enumerate(loss_by_seed_step)
  }
  table = np.stack(list(columns.values()), axis=1)
  steps = np.arange(1, len(table) + 1)[:, None]
  np.savetxt(
    path,
    np.hstack([steps, table]),
    fmt=['%d', *['%.5f'] * len(columns)],
    delimiter=',',
    header=','.join(['step', *columns]),
    comments='',
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs what is missing, then compares."""
  parser = report.parser('fp8_loss_gap', __doc__)
  parser.add_argument(
    '--folder', type=pathlib.Path, required=True, help='workdirs of the runs'
  )
  parser.add_argument(
    '--arms', default=','.join(ARMS), help='which, the first of them bf16'
  )
  parser.add_argument('--seeds', type=int, default=3, help='runs of each arm')
  parser.add_argument('--steps', type=int, default=experiment.STEPS)
  parser.add_argument(
    '--set', action='append', default=[], help='a.b=JSON, for trials'
  )
  args = parser.parse_args(argv)
  jax.config.update('jax_compilation_cache_dir', str(args.folder / 'compiled'))
  arms = args.arms.split(',')
  if arms[0] != ARMS[0] or not set(arms) <= set(ARMS):
    parser.error(f'--arms={args.arms} must be bf16 and some of {ARMS[1:]}')
  by_arm, bits = {arm: [] for arm in arms}, {arm: [] for arm in arms}
  for seed in range(args.seeds):
    for arm in arms:
      loss_by_step, held_out = losses(arm, seed, args)
      by_arm[arm].append(loss_by_step)
      bits[arm].append(held_out)
  losses_of = {arm: np.stack(curves) for arm, curves in by_arm.items()}
  base_by_seed_step = losses_of['bf16']
  rows = report.Rows(args)
  for arm in arms[1:]:
    rows.append(row(arm, losses_of[arm], base_by_seed_step, bits[arm]))
  if args.seeds > 1:
    pairs = between_seeds(base_by_seed_step)
    rows.append(row('bf16, between seeds', *pairs, bits['bf16']))
  output = args.output or report.RESULTS / 'fp8_loss_gap.md'
  plot(output.with_suffix('.png'), losses_of)
  save(output.with_suffix('.csv'), losses_of)
  about = (
    f'`dsv3 bench fp8_loss_gap --folder=DIR --arms={args.arms} '
    f'--seeds={args.seeds} --steps={args.steps}`; after the first tenth of '
    'the steps. The standard error is that between seeds.'
  )
  args.output = output
  report.publish('fp8_loss_gap', about, rows, args)


if __name__ == '__main__':
  main()
