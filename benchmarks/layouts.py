"""Does every layout train as one device does? The whole table.

Question: loss, gradients, updated weights and router biases of a step on a mesh
beside those of one device: how far apart, relative to the largest entry of each
array? (Wanted: 2e-6 in f32; biases equal to the bit after five steps.)

  dsv3 bench layouts [--only=TEXT] [--steps=5] [--rows=FILE] [--json]
    [--output=FILE]

It takes an hour or two; with `--rows` it goes on after the last row of FILE.

Eight layers (one dense), eight experts in four groups, MTP, clipping active, on
eight devices: fake ones on a CPU. Gradients are read from AdamW's first moment.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import report
from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.training import step as steps
from experiments import base
from pallas_kernels import numerics

HYPER = {'lr': 0.01, 'mtp_weight': 0.3, 'bias_rate': 0.01}
# Outside f32 a sum in another order moves numbers over the border of two codes.
# There each leaf has two bars: on 1 - cosine, and on how far its scale is off.
BARS = {'f32': 2e-6, 'bf16': 5e-3, 'fp8': 5e-3}
SCALE_BARS = {'bf16': 0.02, 'fp8': 0.05}  # measured: 0.0123 and 0.032
KINDS = ('gpipe', '1f1b', 'interleaved', 'zb1p', 'dualpipe', 'dualpipev')
_MODEL = {
  'precision': 'f32',
  'model.vocab_size': 32,
  'model.d_model': 16,
  'model.d_ff': 24,
  'model.num_layers': 8,
  'model.num_dense_layers': 1,
  'model.max_seq_len': 16,
  'model.remat': 'none',
  'model.mla.kv_lora_rank': 8,
  'model.mla.q_lora_rank': 6,
  'model.mla.qk_nope_head_dim': 4,
  'model.mla.qk_rope_head_dim': 6,
  'model.mla.v_head_dim': 5,
  'model.rope.original_seq_len': 16,
  'model.moe.num_experts': 8,
  'model.moe.top_k': 3,
  'model.moe.num_groups': 4,
  'model.moe.top_groups': 2,
  'model.moe.d_ff': 7,
  'model.moe.block_size': 4,
  'balance.alpha': 0.1,  # large enough to matter in every gradient
  'data.seq_len': 12,
  'data.tokenizer': 'none.json',  # lifts the rules on trained vocabularies
  'train.batch_size': 64,
  'train.batch_size_start': 64,
  'train.microbatch_size': 8,
  'eval.batch_size': 8,
  'eval.stride': 4,
  'optim.moments_dtype': 'float32',
  'optim.clip_norm': 0.05,  # of norms around 0.4
  # Where |g| is far below it AdamW is linear: a sign of noise is no error.
  'optim.eps': 1e-3,
}


class Case(NamedTuple):
  """A layout and what else is changed."""

  name: str
  axes: dict[str, int | str]
  changes: dict[str, object] = {}


def table() -> list[Case]:
  """Meshes of at most eight devices times schedules, then features."""
  cases = []
  for sizes in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (1, 2)):
    if not 1 < math.prod(sizes) <= 8:
      continue
    names = ('pipe', 'expert', 'node', 'data', 'context')
    mesh = dict(zip(names, sizes, strict=True))
    axes = {k: v for k, v in mesh.items() if v > 1}
    pipe = mesh['pipe']
    for kind in KINDS if pipe > 1 else ('',):
      more = {'schedule': kind} if kind else {}
      name = ' '.join([kind, *(f'{k}{v}' for k, v in axes.items())]).strip()
      cases.append(Case(name, axes | more))
  dual = {'pipe': 2, 'schedule': 'dualpipe', 'expert': 2, 'data': 2}
  flat = {'data': 2, 'node': 2, 'expert': 2}
  context = {'pipe': 2, 'schedule': 'dualpipe', 'expert': 2, 'context': 2}
  meshes = {'dualpipe': dual, 'flat': flat, 'context': context}
  for (name, axes), (word, changes) in itertools.product(
    meshes.items(), FEATURES.items()
  ):
    cases.append(Case(f'{word} {name}', axes, changes))
  return cases


FEATURES = {
  'no MTP': {'model.mtp.depth': 0},
  'MTP 2, pre-norm, valid': {
    'model.mtp.depth': 2,
    'model.mtp.hidden': 'pre_norm',
    'model.mtp.normalizer': 'valid',
  },
  'batch balance': {'balance.kind': 'batch'},
  'V2 balance': {'balance.kind': 'v2'},
  'no balance': {'balance.kind': 'none'},
  'isolated': {'data.isolate_samples': True},
  'unrolled': {'model.scan_layers': False},
  'remat': {'model.remat': 'report'},
  'FSDP': {
    'model.remat': 'report',
    'parallel.fsdp': ('data', 'node', 'expert'),
  },
  'bf16': {'precision': 'bf16'},
  'fp8': {
    'precision': 'fp8',
    'data.seq_len': 128,
    'model.max_seq_len': 128,
    'model.rope.original_seq_len': 128,
    'model.num_layers': 4,
  },
}


def make_config(axes: dict, changes: dict) -> config.Config:
  """The table's model on a mesh."""
  source = base.get_config('runlocal')
  parallel = {f'parallel.{name}': value for name, value in axes.items()}
  with source.unlocked():
    source.update_from_flattened_dict(_MODEL | parallel | changes)
  return config.from_config_dict(source)


def alone(cfg: config.Config) -> config.Config:
  """The same experiment on one device."""
  ones = dict.fromkeys(sharding.AXES, 1)
  unsharded = {'schedule': 'dualpipe', 'fsdp': ()}
  parallel = dataclasses.replace(cfg.parallel, **ones, **unsharded)
  return dataclasses.replace(cfg, parallel=parallel)


def batch(cfg: config.Config, seed: int) -> model.Batch:
  """All micro-batches of a step: rows of samples, some with padding behind."""
  rng, train = np.random.default_rng(seed), cfg.train
  count = train.batch_size // train.microbatch_size
  shape = (count, train.microbatch_size, cfg.data.seq_len)
  tokens = rng.integers(1, cfg.model.vocab_size, (*shape[:2], shape[2] + 1))
  at = np.arange(shape[2])
  boundary = rng.integers(2, shape[2], (*shape[:2], 1))
  end = rng.integers(shape[2] // 2, 2 * shape[2], (*shape[:2], 1))
  segments = np.where(at < boundary, 1, 2) * (at < end)
  isolated = cfg.data.isolate_samples
  positions = np.where((at >= boundary) & isolated, at - boundary, at)
  weights = segments > 0
  if isolated:  # the next sample's first token is no target
    weights &= at != boundary - 1
  ints = lambda x: jnp.asarray(np.broadcast_to(x, shape), jnp.int32)
  return model.Batch(
    tokens_BT=ints(tokens[..., :-1]),
    targets_BT=ints(tokens[..., 1:]),
    positions_BT=ints(positions),
    segments_BT=ints(segments),
    weights_BT=jnp.asarray(np.broadcast_to(weights, shape), jnp.float32),
  )


@functools.lru_cache(maxsize=4)
def start(cfg: config.Config) -> steps.State:
  """A fresh state with uneven norms and biases, on the host.

  Larger weights would make rounding grow from layer to layer.
  """
  state = jax.jit(functools.partial(steps.init_state, cfg))(jax.random.key(0))
  state = jax.device_get(state)
  rng = np.random.default_rng(1)
  spread = lambda w: w + rng.normal(0.0, 0.02, w.shape).astype(np.float32)
  router_biases = jax.tree.map(
    lambda b: rng.normal(0.0, 0.05, b.shape).astype(np.float32), state['router']
  )
  params = jax.tree.map(spread, state['params'])
  return state | {'params': params, 'router': router_biases}


@functools.lru_cache(maxsize=4)
def compiled(cfg: config.Config) -> tuple[steps.Trainer, jax.stages.Wrapped]:
  """The trainer of a layout and its step."""
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  return trainer, trainer.jit()


@functools.lru_cache(maxsize=4)
def run(cfg: config.Config, num_steps: int) -> list[tuple[dict, dict]]:
  """States in the model's form and metrics after each step."""
  trainer, step = compiled(cfg)
  state = jax.device_put(start(alone(cfg)), trainer.model_shardings())
  state, results = trainer.from_model(state), []
  hyper = {name: jnp.float32(x) for name, x in HYPER.items()}
  count = cfg.train.batch_size // cfg.train.microbatch_size
  for number in range(num_steps):
    rows = jax.device_put(batch(cfg, number), trainer.batch_sharding())
    state, metrics = step(state, rows, trainer.num_microbatches(count), hyper)
    results.append(jax.device_get((trainer.to_model(state), metrics)))
  return results


def compare(cfg: config.Config, num_steps: int) -> report.Row:
  """The largest differences of all leaves; biases are equal or not.

  In f32 that of any entry, relative to the leaf's largest. Else 1 - cosine of a
  leaf and, apart, how far its scale is off.
  """
  got, want = run(cfg, num_steps), run(alone(cfg), num_steps)
  (state, metrics), (plain, expected) = got[0], want[0]
  assert expected['grad_norm'] > cfg.optim.clip_norm, 'clipping must be active'
  last, right = got[-1][0]['router'], want[-1][0]['router']
  pairs = zip(jax.tree.leaves(last), jax.tree.leaves(right), strict=True)
  row = {
    'metrics': float(
      np.max([error(metrics[name], expected[name]) for name in expected])
    )
  }
  trees = {
    'gradients': (state['opt'].mean, plain['opt'].mean),
    'weights': (state['params'], plain['params']),
  }
  for name, pair in trees.items():
    if cfg.precision == 'f32':
      row[name] = _largest(*pair, error)
    else:
      apart = numerics.scale_and_direction
      row[f'{name}_scale'] = _largest(*pair, lambda x, y: apart(x, y)[0])
      row[name] = _largest(*pair, lambda x, y: apart(x, y)[1])
  row['biases_equal'] = all(np.array_equal(a, b) for a, b in pairs)
  return row


def error(got, want) -> float:
  """Largest difference over the largest magnitude of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  scale = np.max(np.abs(want), initial=1e-30)
  return float(np.max(np.abs(got - want), initial=0.0) / scale)


def _largest(got, want, measure) -> float:
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return float(np.max([measure(a, b) for a, b in pairs]))  # NaN too


def is_wrong(row: report.Row, precision: str) -> bool:
  """Above the bar of its precision; outside f32 a choice may flip."""
  errors = [row[name] for name in ('metrics', 'gradients', 'weights')]
  right = all(e <= BARS[precision] for e in errors)
  if precision == 'f32':
    return not (right and row['biases_equal'])
  scales = [row[f'{name}_scale'] for name in ('gradients', 'weights')]
  return not (right and all(e <= SCALE_BARS[precision] for e in scales))


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('layouts', __doc__)
  parser.add_argument('--only', default='', help='part of a name')
  parser.add_argument('--steps', type=int, default=5)
  args = parser.parse_args(argv)
  if args.steps < 1:
    parser.error(f'--steps={args.steps} must be at least 1')
  cases = [case for case in table() if args.only in case.name]
  if not cases:
    parser.error(f'--only={args.only!r} leaves nothing')
  jax.config.update('jax_num_cpu_devices', 8)  # nothing has run so far
  if len(jax.devices()) < 8:
    parser.error(f'eight devices are needed, {len(jax.devices())} are here')
  rows = report.Rows(args)
  if args.rows is not None and args.rows.exists():
    rows.extend(report.read_rows(args.rows.read_text().splitlines()))
  known = {row['layout'] for row in rows}
  for case in (case for case in cases if case.name not in known):
    cfg, begun = make_config(case.axes, case.changes), time.monotonic()
    row = {'layout': case.name, 'precision': cfg.precision}
    row |= compare(cfg, args.steps)
    row |= {'seconds': time.monotonic() - begun}
    rows.append(row | {'wrong': is_wrong(row, cfg.precision)})
  report.publish('layouts', __doc__.split('\n\n')[1], rows, args)
  return int(any(row['wrong'] for row in rows))


if __name__ == '__main__':
  sys.exit(main())
