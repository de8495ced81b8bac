"""Do all-to-alls of a fused pair hide behind compute? Compiled, not run.

Question: DualPipe's branch F&B runs a forward and a backward pass of two
micro-batches in one computation, so that what one sends can travel while the
other multiplies (TR 3.2.1). Between how many all-to-alls' start and done does
XLA place products? (Wanted: half of them.) Forward and backward alone are the
controls: there only shared experts and other layers' work are left to hide it.

  JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.overlap --target=h100
  TPU_SKIP_MDS_QUERY=1 python -m benchmarks.overlap --target=v5p

needs the wheels of jax[cuda13] or libtpu beside JAX, and no device. The real
branch of the real pipeline: two stages on 16 devices, experts over 8 of them,
two MoE layers a stage, 2,048 tokens, BF16. Says nothing about time.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import report, targets
from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel import state_layout, zero
from dsv3_jax.parallel.pipeline import executor
from dsv3_jax.training import step as steps
from experiments import base

SETTINGS = {
  'precision': 'bf16',
  'model.vocab_size': 1024,
  'model.d_model': 2048,
  'model.num_layers': 4,
  'model.num_dense_layers': 0,
  'model.mtp.depth': 0,
  'model.mla.num_heads': 16,
  'model.mla.q_lora_rank': 512,
  'model.moe.num_experts': 64,
  'model.moe.d_ff': 1408,
  # XLA cannot compile `ragged_dot` without the partitioner that crashes on it.
  'model.moe.product': 'dense',
  'data.tokenizer': 'none.json',  # lifts the rules on trained vocabularies
  'data.seq_len': 2048,
  'eval.batch_size': 16,
  'eval.stride': 1024,
  'train.batch_size': 64,
  'train.batch_ramp_tokens': 0,
  'train.microbatch_size': 8,
  'parallel.pipe': 2,
  'parallel.expert': 8,
}
# By target: what JAX calls the backend, then options by the row's name.
_BACKENDS = {'h100': 'gpu', 'v5p': 'tpu'}
_OPTIONS = {
  'h100': {
    'default': {},
    'latency hiding': {'xla_gpu_enable_latency_hiding_scheduler': True},
  },
  'v5p': {'async all-to-all': {'xla_tpu_enable_async_all_to_all': True}},
}
_PRODUCTS = re.compile(
  r'gemm|triton|cublas|cudnn|mosaic|convolution|ragged|\bdot\(| while\('
)
_START = re.compile(
  r'\s*(?:ROOT )?%?(\S+) = .* (?:(?:ragged-)?all-to-all|async)-start\('
)
_DONE = re.compile(r' (?:(?:ragged-)?all-to-all|async)-done\(%?([\w.\-]+)')
_BLOCKING = re.compile(r' (?:ragged-)?all-to-all\(')


class Count(NamedTuple):
  """All-to-alls of a scheduled program.

  hidden: with products between start and done. products: how many in all.
  blocking: without a start of their own.
  """

  started: int
  hidden: int
  products: int
  blocking: int


def count(text: str) -> Count:
  """Reads a scheduled module, whose lines are in order of execution."""
  started = hidden = products = 0
  for computation in re.split(r'\n(?=%|ENTRY )', text):
    lines, open_ = computation.split('\n'), {}
    for at, line in enumerate(lines):
      if (start := _START.match(line)) and 'all-to-all' in line:
        open_[start.group(1)] = at
      done = _DONE.search(line)
      if done and done.group(1) in open_:
        between = lines[open_[done.group(1)] + 1 : at]
        inside = sum(
          bool(_PRODUCTS.search(x)) and 'all-to-all' not in x for x in between
        )
        started, hidden = started + 1, hidden + bool(inside)
        products += inside
  return Count(started, hidden, products, len(_BLOCKING.findall(text)))


def make_config() -> config.Config:
  """Two stages, experts on eight devices."""
  source = base.get_config()
  with source.unlocked():
    source.update_from_flattened_dict(SETTINGS)
  return config.from_config_dict(source)


def lower(
  cfg: config.Config, mesh: jax.sharding.Mesh, halves: str
) -> jax.stages.Lowered:
  """One branch of the pipeline: 'F&B', or 'F' or 'B' of it alone."""
  layout = state_layout.make(cfg, mesh.shape)
  pipe = layout.accumulation.pipe
  branch = next(b for b in pipe.program.branches if b.overlapped)
  if halves != 'F&B':
    other = {'F': 'backward', 'B': 'forward'}[halves]
    branch = branch._replace(**{other: None})

  def body(params, router_biases, batch_nBT):
    one = jnp.float32(1.0)
    scales = {'main': one, 'balance': one, 'mtp': [], 'mtp_weight': one}
    loop = executor.make_tick_loop(
      pipe, params, router_biases, batch_nBT, scales
    )
    # Numbers that XLA does not know, or it would compute with zeros.
    unknown = batch_nBT.weights_BT[0, 0, 0]
    state = jax.tree.map(
      lambda x: (
        x | (unknown > 0) if x.dtype == bool else x + unknown.astype(x.dtype)
      ),
      loop.start(),
    )
    x_BTD = jnp.zeros(loop.shape, loop.dtype) + unknown.astype(loop.dtype)
    row = dict.fromkeys(
      (*loop.field_names(), 'iteration'), unknown.astype(jnp.int32)
    )
    embedded = [(x_BTD, [])] * len(pipe.program.schedule.homes)
    state = loop.act(branch, embedded, row, state)
    return jax.tree.map(lambda x: x[None], state)

  is_place = lambda x: isinstance(x, zero.Placement)
  specs = jax.tree.map(lambda p: p.compute, layout.placed, is_leaf=is_place)
  specs = (specs, layout.router_biases_specs(), steps.BATCH_SPEC)
  run = sharding.shard_map_step(
    body,
    mesh,
    layout.rules,
    in_specs=specs,
    out_specs=sharding.Spec(mesh.axis_names),
  )
  return jax.jit(run).lower(*_arguments(cfg, pipe, mesh, specs))


def _arguments(cfg, pipe, mesh, specs):
  """Shapes of parameters, biases and batch, and where they are."""
  layout = pipe.layout
  net, train = model.build(cfg), cfg.train
  params = jax.eval_shape(layout.from_model, model.param_shapes(net))
  bias = model.init_router_biases(cfg.model)['moe']
  router_biases = {'moe': jax.eval_shape(lambda: layout.to_slots('moe', bias))}
  shape = (train.batch_size // train.microbatch_size, train.microbatch_size)
  shape = (*shape, cfg.data.seq_len)
  ints = jax.ShapeDtypeStruct(shape, 'int32')
  floats = jax.ShapeDtypeStruct(shape, 'float32')
  batch_nBT = model.Batch(ints, ints, ints, ints, floats)

  def place(tree, spec):
    placement = jax.sharding.NamedSharding(mesh, spec)
    put = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placement)
    return jax.tree.map(put, tree)

  return (
    jax.tree.map(place, params, specs[0]),
    jax.tree.map(place, router_biases, specs[1]),
    place(batch_nBT, specs[2]),
  )


@contextlib.contextmanager
def _gspmd() -> Iterator[None]:
  """The newer partitioner crashes on a forward branch for CUDA (JAX 0.11.2)."""
  name = 'jax_use_shardy_partitioner'
  before = getattr(jax.config, name)
  jax.config.update(name, False)
  try:
    yield
  finally:
    jax.config.update(name, before)


def measure(target: str, scheduler: str, halves: str) -> report.Row:
  """Compiles one branch, see `lower`, with the options of a scheduler."""
  begun, cfg = time.monotonic(), make_config()
  devices = targets.h100(2, 8) if target == 'h100' else targets.v5p('2x2x4')
  shape = [getattr(cfg.parallel, axis) for axis in sharding.AXES]
  mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.AXES)
  options, backend = _OPTIONS[target][scheduler], _BACKENDS[target]
  with _gspmd(), targets.without_cache():
    with mock.patch.object(jax, 'default_backend', return_value=backend):
      lowered = lower(cfg, mesh, halves)
    text = lowered.compile(compiler_options=options).as_text()
  row = {'target': target, 'scheduler': scheduler, 'branch': halves}
  row |= count(text)._asdict()
  return row | {'seconds_to_compile': time.monotonic() - begun}


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('overlap', __doc__)
  parser.add_argument('--target', choices=list(_OPTIONS), default='h100')
  args = parser.parse_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  rows = report.Rows(args)
  for name in _OPTIONS[args.target]:
    for halves in ('F&B', 'F', 'B'):
      rows.append(measure(args.target, name, halves))
  report.publish('overlap', __doc__.split('\n\n')[1], rows, args)
  return 0


if __name__ == '__main__':
  sys.exit(main())
