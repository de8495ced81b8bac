"""Do the gate and the permutation leave time for a kernel to save?

Question: how long do choosing experts and bringing tokens into their order
take, beside the bytes that they must move and the experts' own products?

  dsv3 bench routing [--tokens=N] [--json] [--output=FILE]

A layer of DeepSeek-V3, forward, on one device: 256 experts in 8 groups, 8 of
each token, tokens in BF16. `floor_ms` is the time of a part's bytes at the rate
of a device copy, `of_experts` the part beside the routed products at the rate
of a square product, `to_save` what a kernel at the floor would gain of these.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import clock, report
from dsv3_jax import config
from dsv3_jax.ops import expert_blocks, routing
from experiments import v3_671b

ABOUT = (
  '{tokens} tokens. `logits` is the part of `gate` that multiplies; the rest '
  'of it chooses. Experts: {experts:.3g} ms at {rate:.3g} TFLOP/s of a square '
  '{dtype} product; bytes at {copy:.3g} GB/s of a copy.'
)


class Part(NamedTuple):
  """What runs, and the bytes that it must read and write."""

  run: Callable[[], Any]
  num_bytes: int


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('routing', __doc__)
  on_cpu = jax.default_backend() == 'cpu'
  parser.add_argument('--tokens', type=int, default=1024 if on_cpu else 4096)
  parser.add_argument('--dry_run', action='store_true', help='16 tokens')
  args = parser.parse_args(argv)
  if args.tokens < 1:
    parser.error(f'--tokens={args.tokens} must be at least 1')
  rows = report.Rows(args)
  net = config.from_config_dict(v3_671b.get_config()).model
  timer = clock.DRY if args.dry_run else clock.default()
  ceilings = measure(net, 16 if args.dry_run else args.tokens, timer, rows)
  report.publish('routing', ABOUT.format(**ceilings), rows, args)
  return 0


def measure(
  net: config.ModelConfig, tokens: int, timer: clock.Clock, rows: list
) -> dict[str, Any]:
  """Adds a row for each part; returns the ceilings."""
  # Without units for BF16, a CPU's best product is that of f32.
  on_cpu = jax.default_backend() == 'cpu'
  dtype = 'float32' if on_cpu else 'bfloat16'
  size = 128 if timer is clock.DRY else 2048 if on_cpu else 8192
  a = jnp.ones((size, size), dtype)
  dot, copy = jax.jit(jnp.dot), jax.jit(lambda x: x ^ 1)
  words = jnp.zeros(1 << (16 if timer is clock.DRY else 26), jnp.uint32)
  runs = {name: part.run for name, part in parts(net, tokens).items()} | {
    'dot': lambda: dot(a, a),
    'copy': lambda: copy(words),
  }
  for run in runs.values():
    jax.block_until_ready(run())
  times = timer.time(runs, dict.fromkeys(runs, 1))
  rate = 2 * size**3 / times['dot'].median
  bandwidth = 2 * words.nbytes / times['copy'].median
  products = 6 * tokens * net.moe.top_k * net.d_model * net.moe.d_ff
  experts = products / rate
  for name, part in parts(net, tokens).items():
    seconds, floor = times[name].median, part.num_bytes / bandwidth
    rows.append(
      {
        'part': name,
        'ms': 1e3 * seconds,
        'floor_ms': 1e3 * floor,
        'of_experts': seconds / experts,
        'to_save': max(seconds - floor, 0.0) / experts,
      }
    )
  return {
    'tokens': tokens,
    'experts': 1e3 * experts,
    'rate': rate / 1e12,
    'dtype': dtype,
    'copy': bandwidth / 1e9,
  }


@functools.cache
def parts(net: config.ModelConfig, tokens: int) -> dict[str, Part]:
  """What the library runs around the routed products."""
  moe, keys = net.moe, jax.random.split(jax.random.key(0), 3)
  x_MD = jax.random.normal(keys[0], (tokens, net.d_model), jnp.bfloat16)
  shape = (net.d_model, moe.num_experts)
  w_DE = jax.random.normal(keys[1], shape) / net.d_model**0.5
  bias_E = jnp.zeros(moe.num_experts)
  gate = jax.jit(lambda x, w, b: routing.route(x, w, b, moe))
  logits = jax.jit(
    lambda x, w: jnp.einsum(
      'md,de->me',
      x.astype(jnp.float32),
      w,
      precision=jax.lax.Precision.HIGHEST,
    )
  )
  ids_MK = gate(x_MD, w_DE, bias_E).ids_MK
  rows = 1  # as for `ragged_dot`; on a CPU, blocks
  if jax.default_backend() == 'cpu':
    rows = expert_blocks.block_rows(ids_MK.size, moe.num_experts, 128)
  sort = jax.jit(
    lambda ids: expert_blocks.make_blocks(ids, moe.num_experts, rows)
  )
  layout = sort(ids_MK)
  if rows == 1:
    layout = layout._replace(source_J=layout.source_J[: ids_MK.size])
  permute = jax.jit(lambda x, at: expert_blocks.permute(x, at, moe.top_k))
  unpermute = jax.jit(
    lambda y, at: expert_blocks.unpermute(y, at, moe.top_k, moe.num_experts)
  )
  y_JD = permute(x_MD, layout)
  copied = ids_MK.size * net.d_model * x_MD.dtype.itemsize
  return {
    'gate': Part(lambda: gate(x_MD, w_DE, bias_E), x_MD.nbytes + w_DE.nbytes),
    'logits': Part(lambda: logits(x_MD, w_DE), x_MD.nbytes + w_DE.nbytes),
    'layout': Part(
      lambda: sort(ids_MK),
      ids_MK.nbytes + sum(x.nbytes for x in jax.tree.leaves(layout)),
    ),
    'permute': Part(lambda: permute(x_MD, layout), x_MD.nbytes + copied),
    'unpermute': Part(lambda: unpermute(y_JD, layout), copied + x_MD.nbytes),
  }


if __name__ == '__main__':
  sys.exit(main())
