"""Share of a layer's training time that its quantisation takes.

Question: of forward and backward pass of one MoE layer at DeepSeek-V3's sizes,
how much is spent on quantising activations and gradients? (Aim: 8 %.)

  dsv3 bench fp8_layer [--tokens=4096] [--json] [--output=FILE]

Every call of a quantiser is recorded while the layer is traced; each is then
timed alone, on its own shapes, and counted as often as it is called. Inside the
layer XLA may fuse it with its neighbours, so the share is an upper bound.
Weights are quantised once a step, whatever the number of micro-batches: a row
of its own.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import sys
from typing import Any
from unittest import mock

# As in the other benchmarks of a device.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp

from benchmarks.common import clock, report
from dsv3_jax import config
from dsv3_jax.nn import attention, block, model
from experiments import v3_671b
from pallas_kernels.fp8_matmul import e5m6, quantizers

QUANTISERS = (
  (quantizers, 'rows'),
  (quantizers, 'columns'),
  (quantizers, 'both'),
  (quantizers, 'transposed'),
  (e5m6, 'quantize'),
  (e5m6, 'unpack'),
)
EXPERTS = 8  # all chosen by every token: of as many rows as tokens
ABOUT = """Milliseconds of one call; `share_percent`: calls times that, of the
layer's. `all` is the sum, `weights` the layer's matrices in both orientations,
once a step.
"""


@dataclasses.dataclass(frozen=True)
class Call:
  """A quantiser with what it was called with."""

  name: str
  function: Any
  shapes: Any  # of the array, or of the quantised tensor
  options: tuple[tuple[str, Any], ...]

  def key(self) -> tuple:
    leaves, tree = jax.tree.flatten(self.shapes)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    return self.name, shapes, str(tree), self.options


def make_config(tokens: int, tiny: bool = False) -> config.Config:
  """One MoE layer of the 671B model with as many experts as a token takes."""
  source = v3_671b.get_config('runlocal' if tiny else '')
  with source.unlocked():
    source.precision = 'fp8'
    net = source.model
    net.update(num_layers=1, num_dense_layers=0, scan_layers=False)
    net.update(remat='none')
    net.mtp.depth = 0
    net.moe.update(num_experts=EXPERTS, top_k=EXPERTS)
    net.moe.update(num_groups=1, top_groups=1)
    source.data.seq_len = tokens
  return config.from_config_dict(source)


class Layer:
  """A layer with random weights; `grads` is all of its training work."""

  def __init__(self, cfg: config.Config):
    net = model.build(cfg, training=True)
    fields = (cfg.model, cfg.balance, net.policy, True, False)
    self._block, self._cfg, self._policy = block.Block(*fields), cfg, net.policy
    length, dim = cfg.data.seq_len, cfg.model.d_model
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: jax.random.normal(key, (1, length, dim), jnp.bfloat16)
    self.x_BTD, self.dy_BTD = draw(keys[0]), draw(keys[1])
    bf16 = dataclasses.replace(net.policy, fp8=False)
    initializer = block.Block(*fields[:2], bf16, *fields[3:])
    short = jnp.zeros((1, 2, dim), jnp.bfloat16)
    init = lambda key: initializer.init(key, (short, None), *self._rest(2))
    partitioned = jax.jit(init)(keys[2])['params']
    self.params = jax.tree.map(
      lambda x: x.value, partitioned, is_leaf=lambda x: hasattr(x, 'names')
    )
    self.quantize = functools.partial(model.quantize, net.policy)

  def grads(self, params, quantized, x_BTD, dy_BTD):
    """Output, and gradients of the parameters and of x."""

    def forward(params, x_BTD):
      (y_BTD, _), _ = self._block.apply(
        {'params': params} | quantized,
        (x_BTD, None),
        *self._rest(x_BTD.shape[1]),
      )
      return y_BTD

    y_BTD, pull = jax.vjp(forward, params, x_BTD)
    return y_BTD, pull(dy_BTD)

  def _rest(self, length: int):
    """Router bias, number of the layer and context of one sequence."""
    cfg = self._cfg.model
    positions_BT = jnp.arange(length, dtype=jnp.int32)[None]
    context = attention.make_context(cfg, positions_BT, jnp.ones((1, length)))
    return jnp.zeros(cfg.moe.num_experts), jnp.array(0), context


def trace(layer: Layer) -> list[tuple[Call, int]]:
  """Quantisers that the layer's training work calls, and how often each."""
  calls, depth = [], [0]

  def recorded(module, name):
    function = getattr(module, name)

    def run(x, **options):
      if not depth[0]:  # columns are made by rows: one call
        shapes = jax.eval_shape(lambda: x)
        title = f'{module.__name__.split(".")[-1]}.{name}'
        calls.append(
          Call(title, function, shapes, tuple(sorted(options.items())))
        )
      depth[0] += 1
      try:
        return function(x, **options)
      finally:
        depth[0] -= 1

    return mock.patch.object(module, name, run)

  with contextlib.ExitStack() as stack:
    for module, name in QUANTISERS:
      stack.enter_context(recorded(module, name))
    quantized = jax.eval_shape(layer.quantize, layer.params)
    jax.eval_shape(
      layer.grads, layer.params, quantized, layer.x_BTD, layer.dy_BTD
    )
  counts = collections.Counter(call.key() for call in calls)
  return [
    (next(call for call in calls if call.key() == key), count)
    for key, count in counts.items()
  ]


def measure(layer: Layer, timer: clock.Clock) -> list[report.Row]:
  """The layer, its weights, each kind of call, and their sum."""
  quantize = jax.jit(layer.quantize)
  quantized = quantize(layer.params)
  layer_time = _median(
    timer, layer.grads, layer.params, quantized, layer.x_BTD, layer.dy_BTD
  )
  rows = [{'what': 'layer, forward and backward', **layer_time.row()}]
  total, number = 0.0, 0
  for call, count in trace(layer):
    leaves, tree = jax.tree.flatten(call.shapes)
    x = tree.unflatten([_random(leaf, at) for at, leaf in enumerate(leaves)])
    timing = _median(
      timer, functools.partial(call.function, **dict(call.options)), x
    )
    total += count * timing.median
    number += count
    rows.append(
      {
        'what': call.name,
        'shape': 'x'.join(map(str, leaves[0].shape)),
        'calls': count,
        **timing.row(),
        'share_percent': 100 * count * timing.median / layer_time.median,
      }
    )
  share = 100 * total / layer_time.median
  rows.append({'what': 'all', 'calls': number, 'share_percent': share})
  weights_time = _median(timer, layer.quantize, layer.params)
  rows.append({'what': 'weights, once a step', **weights_time.row()})
  return rows


def _median(timer: clock.Clock, function, *args) -> clock.Times:
  run = jax.jit(function)
  jax.block_until_ready(run(*args))
  return timer.time({'': lambda: run(*args)}, {'': 1})['']


def _random(like: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
  """Normal numbers; codes and scales are as good as any others."""
  key = jax.random.key(seed)
  if jnp.issubdtype(like.dtype, jnp.integer):
    return jax.random.bits(key, like.shape, like.dtype)
  return jax.random.normal(key, like.shape).astype(like.dtype)


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('fp8_layer', __doc__)
  parser.add_argument('--tokens', type=int, default=4096)
  parser.add_argument('--dry_run', action='store_true', help='a tiny layer')
  args = parser.parse_args(argv)
  if args.tokens < 1:
    parser.error(f'--tokens={args.tokens} must be at least 1')
  cfg = make_config(32 if args.dry_run else args.tokens, args.dry_run)
  rows = report.Rows(args)
  timer = clock.DRY if args.dry_run else clock.default()
  for row in measure(Layer(cfg), timer):
    rows.append(row)
  about = (
    f'{ABOUT}{cfg.data.seq_len} tokens, {EXPERTS} experts of as many rows.'
  )
  report.publish('fp8_layer', about, rows, args)
  return 0


if __name__ == '__main__':
  sys.exit(main())
