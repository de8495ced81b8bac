"""Overhead of expert parallelism's all-to-all on one device, and its rows.

Question: how much longer does a MoE layer take, forward and backward, on the
path of experts over devices than on the plain one, both on one device? (Aim: at
most 1.10.) And how many rows and bytes does a token send over nodes, against
the bound of node-limited routing (TR 3.2.2)?

  dsv3 bench ep_overhead [--rounds=15] [--threads=2] [--json] [--output=FILE]

The layer is router, shared and routed experts. With one device the library
takes the plain path by itself; here the all-to-all is forced on a mesh of one
device, in one hop and in two: the paths take turns in one process. Rows are
those of the library's plans, made for up to 8 nodes of 8 devices at once on
this one; bytes of a row are those of the collectives in the traced program, at
DeepSeek-V3's sizes.
"""

import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import clock, report
from dsv3_jax import config, precision
from dsv3_jax.distributed import sharding
from dsv3_jax.ops import all_to_all, fp8_linear, linear, routing
from dsv3_jax.ops import experts as expert_ops
from experiments import v3_671b
from pallas_kernels.fp8_matmul import reference

AXES = ('node', 'expert')
PATHS = {'plain': None, 'one hop': (AXES,), 'two hops': AXES}
PRECISIONS = ('bf16', 'fp8')
PEERS = 8  # devices of a node
NODES = (1, 2, 4, 8)
ABOUT = (
  'Milliseconds of one MoE layer, forward and backward. The ratios are to the '
  'plain path in the same precision; the aim is at most 1.10. '
  '`ratio_of_cpu_medians` is of seconds of all cores in this process, which '
  'other work on the machine changes least.'
)
TRAFFIC = (
  'Rows are those that leave a device, a token, one way; bytes are of forward '
  'and backward together, in FP8. `bound`: of rows over nodes, the other nodes '
  'or the groups that the routing is limited to.'
)


class Sizes(NamedTuple):
  """Of a layer: tokens on the device, model, experts' width, experts, top-k."""

  tokens: int = 1024
  d_model: int = 512
  d_ff: int = 256
  experts: int = 16
  top_k: int = 4


DRY = Sizes(tokens=16, d_model=24, d_ff=20, experts=4, top_k=2)


def published() -> config.MoeConfig:
  """The experts of DeepSeek-V3."""
  return config.from_config_dict(v3_671b.get_config()).model.moe


def routed_ffn(
  x_MD: jax.Array,
  chosen: routing.Routing,
  experts: expert_ops.Experts,
  policy: precision.Policy,
  axes: all_to_all.Axes,
) -> jax.Array:
  """The routed experts' output, in the policy's precision."""
  args = x_MD, chosen.ids_MK, chosen.gates_MK, experts
  options = expert_ops.ExpertOptions(axes=axes, policy=policy)
  return expert_ops.expert_ffn(*args, options)


class Layer:
  """A MoE layer with random weights; `time` runs its paths in turns."""

  def __init__(self, sizes: Sizes, name: str):
    self._policy, self._sizes = precision.POLICIES[name], sizes
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *s: jax.random.normal(next(keys), s) * 0.05
    dim, width = sizes.d_model, sizes.d_ff
    matrices = ((dim, width), (dim, width), (width, dim))
    self._params = {
      'router': draw(dim, sizes.experts),
      'shared': [draw(*s) for s in matrices],
      'experts': [draw(sizes.experts, *s) for s in matrices],
    }
    dtype = jnp.dtype(self._policy.compute)
    self._x_MD, self._dy_MD = (
      (20 * draw(sizes.tokens, dim)).astype(dtype) for _ in range(2)
    )
    self._moe = dataclasses.replace(
      published(),
      num_experts=sizes.experts,
      top_k=sizes.top_k,
      num_groups=1,
      top_groups=1,
    )

  def run(self, path: str) -> Callable[[], Any]:
    """Output and all gradients on this path, compiled and run once."""
    axes = PATHS[path]
    step = functools.partial(self._step, () if axes is None else axes)
    if axes is not None:
      ones = dict.fromkeys(sharding.AXES, 1)
      ones = config.ParallelConfig(
        **ones, schedule='dualpipe', fsdp=(), deterministic=False
      )
      replicated = jax.sharding.PartitionSpec()
      step = jax.shard_map(
        step,
        mesh=sharding.make_mesh(ones),
        in_specs=replicated,
        out_specs=replicated,
        check_vma=False,
      )
    args = self._params, self._x_MD, self._dy_MD
    with forced():
      compiled = jax.jit(step).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return lambda: compiled(*args)

  def _step(self, axes, params, x_MD, dy_MD):
    def forward(params, x_MD):
      zeros_E = jnp.zeros(self._sizes.experts)
      chosen = routing.route(x_MD, params['router'], zeros_E, self._moe)
      experts = expert_ops.Experts(*map(self._weight, params['experts']))
      shared = map(self._weight, params['shared'])
      y_MD = routed_ffn(x_MD, chosen, experts, self._policy, axes)
      return y_MD + linear.swiglu(x_MD, *shared, self._policy)

    y_MD, pull = jax.vjp(forward, params, x_MD)
    return y_MD, pull(dy_MD)

  def _weight(self, w):
    if not self._policy.fp8:
      return w
    return fp8_linear.Weight(w, *reference.quantize_weight(w))


def forced():
  """Hops over one device are taken, not left out."""
  tuples = lambda axes: tuple(
    (hop,) if isinstance(hop, str) else hop for hop in axes
  )
  return mock.patch.object(all_to_all, 'live', tuples)


class Sample(NamedTuple):
  """Seconds of a run, and those that all cores spent on it."""

  seconds: float
  cpu: float


def measure(sizes: Sizes, rounds: int) -> list[report.Row]:
  """Each path in each precision, in turns; the first turn is not counted."""
  layers = {name: Layer(sizes, name) for name in PRECISIONS}
  runs = {(n, path): layers[n].run(path) for n in layers for path in PATHS}
  samples = {key: [] for key in runs}
  keys = list(runs)
  for turn in range(rounds + 1):
    at = turn % len(keys)
    for key in (keys[at:] + keys[:at])[:: 1 if turn % 2 else -1]:
      start = Sample(time.perf_counter(), time.process_time())
      jax.block_until_ready(runs[key]())
      end = Sample(time.perf_counter(), time.process_time())
      if turn:
        pairs = zip(start, end, strict=True)
        samples[key].append(Sample(*(b - a for a, b in pairs)))
  return to_rows(samples)


def to_rows(samples: dict[tuple[str, str], list[Sample]]) -> list[report.Row]:
  """Ratios are to the plain path of the same precision."""
  times = {k: clock.summary([s.seconds for s in v]) for k, v in samples.items()}
  cpu = {k: statistics.median(s.cpu for s in v) for k, v in samples.items()}
  rows = []
  for (name, path), timing in times.items():
    base = times[name, 'plain']
    rows.append(
      {
        'precision': name,
        'path': path,
        **timing.row(),
        'ratio_of_medians': timing.median / base.median,
        'ratio_of_minima': timing.minimum / base.minimum,
        'ratio_of_cpu_medians': cpu[name, path] / cpu[name, 'plain'],
      }
    )
  return rows


class Rows(NamedTuple):
  """Of one token, one way: what leaves its device, by the axis it goes over."""

  over_nodes: float
  within_node: float


def rows_of(plan_rows: np.ndarray, nodes: int, peers: int) -> Rows:
  """Splits the counts of one hop over all, [nodes, peers, nodes * peers]."""
  to = plan_rows.reshape(nodes, peers, nodes, peers)
  same = np.eye(nodes)[:, None, :, None]
  own = same * np.eye(peers)[None, :, None]
  return Rows(np.sum(to * (1 - same)), np.sum(to * (same - own)))


def count(
  moe: config.MoeConfig, nodes: int, peers: int, tokens: int
) -> dict[str, Rows]:
  """Rows of a token in one hop and in two, by the library's plans.

  Devices are dims of arrays here; each has `tokens` random ones.
  """
  num_local = moe.num_experts // (nodes * peers)
  dim = 64  # of the router's input: any
  keys = jax.random.split(jax.random.key(1), 2)
  w_DE = jax.random.normal(keys[0], (dim, moe.num_experts))
  x = jax.random.normal(keys[1], (nodes, peers, tokens, dim))

  def device(x_MD):
    bias_E = jnp.zeros(moe.num_experts)
    ids_MK = routing.route(x_MD, w_DE, bias_E, moe).ids_MK
    rows = lambda axes: all_to_all.rows_sent(
      all_to_all.make_plan(ids_MK, num_local, axes, 'padded')
    )
    return rows((AXES,)), rows(AXES)

  devices = jax.vmap(jax.vmap(device, axis_name='expert'), axis_name='node')
  with forced():
    sent = jax.tree.map(np.array, jax.jit(devices)(x))
  (joint,), (to_node, to_peer) = sent
  total = nodes * peers * tokens
  others = lambda rows, own: np.sum(rows * (1 - own))
  two = Rows(
    others(to_node, np.eye(nodes)[:, None]),
    others(to_peer, np.eye(peers)[None]),
  )
  one = rows_of(joint, nodes, peers)
  return {
    'one hop': Rows(*(n / total for n in one)),
    'two hops': Rows(*(n / total for n in two)),
  }


def payload(axes: all_to_all.Axes, d_model: int, moe: config.MoeConfig) -> int:
  """Bytes of a row in all collectives of one hop, forward and backward, FP8."""
  mesh = jax.sharding.AbstractMesh((2, 2), AXES)
  shape = jax.ShapeDtypeStruct
  up = (moe.num_experts, d_model, moe.d_ff)
  ws = [shape(s, jnp.float32) for s in (up, up, (up[0], up[2], up[1]))]
  x_MD = shape((8, d_model), jnp.bfloat16)
  ids_MK = shape((8, moe.top_k), jnp.int32)
  gates_MK = shape(ids_MK.shape, jnp.float32)

  def device(x_MD, ids_MK, gates_MK, ws):
    def forward(x_MD, gates_MK):
      experts = expert_ops.Experts(
        *(fp8_linear.Weight(w, *reference.quantize_weight(w)) for w in ws)
      )
      chosen = routing.Routing(ids_MK, gates_MK, gates_MK)
      return routed_ffn(x_MD, chosen, experts, precision.POLICIES['fp8'], axes)

    y_MD, pull = jax.vjp(forward, x_MD, gates_MK)
    return pull(y_MD)

  by_token = jax.sharding.PartitionSpec(AXES)
  sharded = jax.shard_map(
    device, mesh=mesh, in_specs=by_token, out_specs=by_token, check_vma=False
  )
  traced = jax.make_jaxpr(sharded)(x_MD, ids_MK, gates_MK, ws)
  hops = len(axes)
  avals = [v.aval for v in _all_to_all_inputs(traced.jaxpr)]
  row_bytes = lambda a: a.dtype.itemsize * int(np.prod(a.shape[1:]))
  return sum(map(row_bytes, avals)) // hops


def _all_to_all_inputs(jaxpr):
  """Inputs of all all-to-alls of a program, also of inner ones."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'all_to_all':
      yield eqn.invars[0]
    for inner in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from _all_to_all_inputs(inner)


def traffic(
  moe: config.MoeConfig, d_model: int, tokens: int, peers: int
) -> list[report.Row]:
  """Rows and bytes for growing numbers of nodes, routing limited and not."""
  size = payload((AXES,), d_model, moe)
  rows = []
  for nodes in NODES:
    for groups in (moe.top_groups, moe.num_groups):
      limited = dataclasses.replace(moe, top_groups=groups)
      counts = count(limited, nodes, peers, tokens)
      one, two = counts['one hop'], counts['two hops']
      rows.append(
        {
          'nodes': nodes,
          'devices': nodes * peers,
          'routing_groups': groups,
          'bound': min(nodes - 1, groups),
          'rows_over_nodes_one_hop': one.over_nodes,
          'rows_over_nodes_two_hops': two.over_nodes,
          'rows_within_node_two_hops': two.within_node,
          'kilobytes_over_nodes_one_hop': one.over_nodes * size / 1e3,
          'kilobytes_over_nodes_two_hops': two.over_nodes * size / 1e3,
          'kilobytes_within_node_two_hops': two.within_node * size / 1e3,
        }
      )
  return rows


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('ep_overhead', __doc__)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--dry_run', action='store_true', help='a tiny layer')
  args = parser.parse_args(argv)
  if args.rounds < 1:
    parser.error(f'--rounds={args.rounds} must be at least 1')
  if hasattr(os, 'sched_setaffinity'):  # what XLA counts; Linux only
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)
  sizes = DRY if args.dry_run else Sizes()
  rows = report.Rows(args)
  for row in measure(sizes, args.rounds):
    rows.append(row)
  net = config.from_config_dict(v3_671b.get_config()).model
  tokens = 2 if args.dry_run else 64
  traffic_rows = report.Rows(args)
  for row in traffic(net.moe, net.d_model, tokens, PEERS):
    traffic_rows.append(row)
  about = (
    f'{ABOUT} {sizes}.\n\n{report.table(traffic_rows)}\n\n{TRAFFIC} '
    f'{tokens} random tokens a device, d_model {net.d_model}, '
    f'{net.moe.num_experts} experts top-{net.moe.top_k} in '
    f'{net.moe.num_groups} groups.\n'
  )
  report.publish('ep_overhead', about, rows, args)
  return 0


if __name__ == '__main__':
  sys.exit(main())
