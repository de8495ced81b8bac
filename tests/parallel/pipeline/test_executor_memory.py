"""What the loop over ticks holds: sums once, activations as the schedule says.

The loop is that of training, its stages are small: matrices, or many tokens.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from benchmarks import pipeline_bubble
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel.pipeline import (
  instructions,
  split_backward,
  stage_compute,
  stage_params,
)
from dsv3_jax.parallel.schedules import make as schedules

RANKS, LAYERS = 4, 6
KINDS = [
  pytest.param('1f1b', marks=pytest.mark.nightly),
  'zb1p',
  'dualpipe',
  pytest.param('dualpipev', marks=pytest.mark.nightly),
]
ACTIVATION = 4 * 4 * 512 * 16  # bytes, where activations are long
ACTIVATIONS = 2 * LAYERS  # of a stage: input and cosine of every product


def matrix_loop(program, weights, shape):
  """Stages of several matrices, embedding and head of nothing."""
  layers = stage_params.StageWeights(weights[0], {})
  split_stages = {
    number: split_backward.split_stage(
      functools.partial(stage, kind),
      layers,
      (jnp.zeros(shape), []),
      (),
      trained=lambda w: w.weights,
    )
    for number, kind in enumerate(program.kinds)
  }
  return pipeline_bubble.tick_loop(program, weights, split_stages, shape)


def stage(kind, w, x, consts):
  h = x[0]
  for name in sorted(w.weights):
    h = jnp.sin(h @ w.weights[name])
  return h[None] if kind.last else h, pipeline_bubble.no_stats()


class CompiledStep(NamedTuple):
  """A step before and after XLA, and the bytes of a rank's gradient sums."""

  lowered: jax.stages.Lowered
  compiled: jax.stages.Compiled
  sums: int


def compiled(kind, microbatches, shape):
  """The step of a schedule of such stages on four ranks."""
  count = schedules.stages_per_rank(kind)
  schedule = schedules.make_schedule(
    kind,
    stages=count * RANKS,
    microbatches=microbatches,
    split_backward=kind in schedules.UNIDIRECTIONAL,
  )
  kinds = tuple(
    stage_compute.StageKind(0, 0, at == 0, at == schedule.stages - 1)
    for at in range(schedule.stages)
  )
  program = instructions.compile_schedule(schedule, kinds)
  width, held = shape[-1], len(instructions.chunks(schedule)[0])
  one = jax.ShapeDtypeStruct((width, width), jnp.float32)
  weights = [{f'w{i}': one for i in range(LAYERS)} for _ in range(held)]

  def run(weights, ticks, fields_tick_rank, vocab_fields_tick_direction):
    loop = matrix_loop(program, weights, shape)

    def tick(t, state):
      return loop.tick(
        state, fields_tick_rank[t, 0], vocab_fields_tick_direction[t]
      )

    state = jax.lax.fori_loop(0, ticks, tick, loop.start())
    rest = {k: v for k, v in state.items() if k != 'grads'}
    rest_sum = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rest))
    return state['grads'], rest_sum[None]

  spec = jax.sharding.PartitionSpec
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((RANKS,), (stage_params.AXIS,), axis_types=auto)
  specs = {
    'in_specs': (spec(), spec(), spec(None, stage_params.AXIS), spec()),
    'out_specs': spec(stage_params.AXIS),
  }
  step = jax.jit(sharding.shard_map_step(run, mesh, **specs))
  table = [
    jax.ShapeDtypeStruct(fields.shape, fields.dtype)
    for fields in (
      program.fields_tick_rank,
      program.vocab_fields_tick_direction,
    )
  ]
  ticks = jax.ShapeDtypeStruct((), jnp.int32)
  lowered = step.lower(weights, ticks, *table)
  return CompiledStep(lowered, lowered.compile(), 4 * width**2 * LAYERS * held)


def copies(compiled, shape):
  """How many arrays the loops copy that end in this shape."""
  inside = compiled.as_text().split('\nENTRY ')[0]
  text = ','.join(map(str, shape))
  return len(re.findall(rf'f32\[(?:\d+,)*{text}\]\S* copy\(', inside))


@functools.cache
def wide(kind, microbatches=8):
  """Gradient sums are nearly all there is."""
  return compiled(kind, microbatches, (1, 4, 256))


@functools.cache
def long(kind, microbatches=8):
  """Activations are nearly all there is."""
  return compiled(kind, microbatches, (4, 512, 16))


def temporary(step):
  return step.compiled.memory_analysis().temp_size_in_bytes


def products(step):
  """Products of each computation of the compiled step."""
  counts, name = {}, ''
  for line in step.compiled.as_text().splitlines():
    if line[:1] in ('%', 'E'):
      name = line.split(' (')[0]
      counts[name] = 0
    counts[name] = counts.get(name, 0) + (' dot(' in line)
  return counts


def loop_of_ticks(step):
  """Products in the body of the loop over ticks, outside of all branches."""
  # It alone exchanges activations.
  text, name, bodies = step.compiled.as_text(), '', set()
  for line in text.splitlines():
    if line[:1] in ('%', 'E'):
      name = line.split(' (')[0]
    if 'collective-permute(' in line:
      bodies.add(name)
  return sum(products(step)[body] for body in bodies)


@pytest.mark.parametrize('kind', KINDS)
def test_a_tick_does_only_what_its_branch_does(kind):
  step = wide(kind)
  assert sum(products(step).values()) > 4 * LAYERS
  assert loop_of_ticks(step) == 0


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_sums_stay_in_place(kind):
  step = wide(kind)
  one = step.sums / (1 if kind in ('1f1b', 'zb1p') else 2)  # of a stage
  assert copies(step.compiled, (256, 256)) == 0
  # They are the step's result; besides there are one stage's new gradients and
  # small activations, and no room for the sums once more.
  slack = temporary(step) - one
  assert 0 < slack < 0.9 * one


@pytest.mark.nightly
def test_memory_does_not_grow_with_ticks():
  assert temporary(wide('1f1b', 16)) == temporary(wide('1f1b', 8))
  assert temporary(long('1f1b', 16)) == temporary(long('1f1b', 8))
  # Nor does the program, which a longer table leaves as it is.
  longer, shorter = (wide('1f1b', m).lowered.as_text() for m in (16, 8))
  assert longer.count('\n') == shorter.count('\n')
  # But where every micro-batch is kept, and the gradient of its output.
  grown = temporary(long('gpipe', 16)) - temporary(long('gpipe', 8))
  assert grown == 8 * (ACTIVATIONS + 1) * ACTIVATION


@pytest.mark.parametrize(
  'kind', [pytest.param('gpipe', marks=pytest.mark.nightly), *KINDS[:3]]
)
def test_activations_are_as_many_as_the_schedule_keeps(kind):
  step = long(kind)
  assert copies(step.compiled, (4, 512, 16)) == 0
  # Of all stages together: kept, then carried to W.
  slots = {
    'gpipe': 8 + 1,
    '1f1b': 4 + 1,
    'zb1p': 4 + 4,
    'dualpipe': 5 + 1 + 2,  # R + 1, one of them until its pair is over
  }[kind]
  assert slots <= temporary(step) / (ACTIVATIONS * ACTIVATION) < slots + 2.5
