"""What the loop over ticks holds: sums once, activations as the schedule says.

The loop is that of training, its stages are small: matrices, or many tokens.
"""

import functools
import re

import jax
import jax.numpy as jnp


from benchmarks import pipeline_bubble
from dsv3_jax import sharding
from dsv3_jax.parallel import chunks, pipeline, schedule, split
from dsv3_jax.parallel import program as programs

RANKS, LAYERS = 4, 6


class Run(pipeline_bubble.Run):
  """Stages of several matrices, embedding and head of nothing."""

  def __init__(self, program, weights, shape):
    super().__init__(program, pipeline_bubble.Pace())
    self.shape = shape
    none = self.chunks[0].bias_nE
    self.chunks = [
      chunks.Chunk(chunks.Weights(each, {}), none) for each in weights
    ]
    self.ends.embed = lambda told: (jnp.ones(shape), [])
    parts = {}
    for number, kind in enumerate(program.kinds):
      function = functools.partial(stage, none, kind)
      x = (jnp.zeros(shape), [])
      layers = self.chunks[0].layers
      parts[number] = split.split_stage(
        function, layers, x, (), trained=lambda w: w.weights
      )
    self.parts = parts


def stage(none_nE, kind, w, x, consts):
  h = x[0]
  for name in sorted(w.weights):
    h = jnp.sin(h @ w.weights[name])
  told = {'balance': jnp.zeros(()), 'load': none_nE, 'mtp_load': none_nE}
  return h[None] if kind.last else h, told


def compiled(kind, microbatches, shape):
  """The step, and the bytes of a device's gradient sums and activation."""
  count = 2 if kind in ('interleaved', 'dualpipev') else 1
  made = schedule.make(
    kind,
    stages=count * RANKS,
    microbatches=microbatches,
    split_backward=kind in schedule.ONE_WAY,
  )
  kinds = tuple(
    pipeline.Kind(0, 0, at == 0, at == made.stages - 1)
    for at in range(made.stages)
  )
  program = programs.compile_schedule(made, kinds)
  width, held = shape[-1], len(programs.chunks(made)[0])
  one = jax.ShapeDtypeStruct((width, width), jnp.float32)
  weights = [{f'w{i}': one for i in range(LAYERS)} for _ in range(held)]

  def run(weights, ticks, fields_TRf, globals_Tdg):
    it = Run(program, weights, shape)

    def tick(t, state):
      return it.tick(state, fields_TRf[t, 0], globals_Tdg[t])

    state = jax.lax.fori_loop(0, ticks, tick, it.start())
    rest = {k: v for k, v in state.items() if k != 'grads'}
    told = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rest))
    return state['grads'], told[None]

  spec = jax.sharding.PartitionSpec
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((RANKS,), (chunks.AXIS,), axis_types=auto)
  specs = {
    'in_specs': (spec(), spec(), spec(None, chunks.AXIS), spec()),
    'out_specs': spec(chunks.AXIS),
  }
  step = jax.jit(sharding.mapped(run, mesh, **specs))
  table = [
    jax.ShapeDtypeStruct(each.shape, each.dtype)
    for each in (program.fields_TRf, program.globals_Tdg)
  ]
  ticks = jax.ShapeDtypeStruct((), jnp.int32)
  found = step.lower(weights, ticks, *table).compile()
  return found, 4 * width**2 * LAYERS * held


if __name__ == '__main__':
  for kind in schedule.KINDS:
    for shape in ((1, 4, 256), (4, 512, 16)):
      for m in (8, 16):
        c, sums = compiled(kind, m, shape)
        ma = c.memory_analysis()
        txt = c.as_text()
        w = shape[-1]
        copies = len(re.findall(rf'f32\[{w},{w}\]\S* copy\(', txt))
        print(
          kind,
          shape,
          m,
          'sums',
          sums,
          'temp',
          ma.temp_size_in_bytes,
          'out',
          ma.output_size_in_bytes,
          round((ma.temp_size_in_bytes) / sums, 2),
          'act',
          4 * shape[0] * shape[1] * shape[2],
          'copies',
          copies,
          flush=True,
        )
