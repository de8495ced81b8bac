"""How long do ranks of a pipeline wait? Sleeping stages under six schedules.

Question: the part of a step in which a rank does nothing, measured with stages
that only sleep, beside what the simulator says? (Wanted: one program for all
ranks within 0.08 of its simulation in ticks.)

  dsv3 bench pipeline_bubble [--ranks=4,8] [--microbatches=16,32]
    [--kinds=NAME,...] [--milliseconds=100] [--runs=2] [--png=FILE] [--json]
    [--output=FILE]

Forward, input half and weight half sleep equally long, a pair as long as its
parts. `spmd` is the loop over ticks that training runs (`executor.TickLoop`
with its table, branches, buffers and exchange; embedding and head do nothing),
`threaded` a thread a rank (`pipeline.threaded`), both on fake CPU devices. The
bubble is 1 - (work of a rank) / (total time), the best of the runs; it includes
the cost of starting an action and of exchanging its result. `ideal` is the
schedule without a common clock, `in_ticks` the schedule in ticks, each as long
as its longest action.
"""

import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from benchmarks.common import report
from dsv3_jax import errors
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel.pipeline import (
  activation_buffers,
  executor,
  gradient_sums,
  instructions,
  stage_compute,
  stage_params,
  threaded,
)
from dsv3_jax.parallel.schedules import actions, simulate
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import ticks as tick_tables

BAR = 0.08
TIMES = simulate.Times(f=1, b=2, w=1)  # in units of what a half sleeps
_SHAPE = (1, 1, 1)  # of an activation


@dataclasses.dataclass
class Pace:
  """How long a half sleeps; not part of what is compiled."""

  seconds: float = 0.0


class Sleeping:
  """Parts of a stage, as `SplitStage` has them; all that they do is sleep."""

  residuals = carry = (jax.ShapeDtypeStruct((), jnp.float32),)

  def __init__(self, pace: Pace, shape: tuple[int, ...], stats: dict):
    self._pace, self._shape, self._stats = pace, shape, stats

  def _sleep(self, units: int, value: jax.Array) -> jax.Array:
    def rest(_):  # a look at the value may have to wait for a thread
      time.sleep(units * self._pace.seconds)
      return np.float32(1.0)

    # A pure one would be moved out of the loops that stand for branches.
    shape = jax.ShapeDtypeStruct((), np.float32)
    return jax.experimental.io_callback(rest, shape, value)

  def _dx(self, value: jax.Array) -> tuple:
    return jnp.full(_SHAPE, value), []

  def forward(self, params, x, consts):
    y = self._sleep(1, jnp.sum(jax.tree.leaves((x, consts))[0]))
    return jnp.full(self._shape, y), self._stats, (y,)

  def backward(self, params, residuals, dy, daux):
    done = self._sleep(2, residuals[0])
    return self._dx(done), {'w': done}

  def backward_input(self, params, residuals, dy, daux):
    done = self._sleep(1, residuals[0])
    return self._dx(done), (done,)

  def backward_weight(self, params, carry):
    return {'w': self._sleep(1, carry[0])}


class NoVocab:
  """An embedding and a head that cost nothing."""

  def __init__(self, shape: tuple[int, ...]):
    self._shape = shape

  def embed(self, microbatches):
    return jnp.ones(self._shape), []

  def head(self, direction, microbatch, row, state):
    head = activation_buffers.write_slot(
      state['head'], row[f'head_{direction}'], state['hidden']
    )
    return state | {'head': head}

  def embed_gradient(self, direction, microbatches, state):
    return state


@dataclasses.dataclass(frozen=True)
class ChunkOperands:
  """Stages that read their chunk's weights and nothing else."""

  program: instructions.PipelineProgram
  chunks: list[stage_params.ChunkParams]

  def weights(self, stage_pass):
    return self.chunks[stage_pass.chunk].layers

  def consts(self, stage_pass, microbatch):
    return ()


class NoMasters(stage_params.MasterConverter):
  """Stands for the converter, which is used only after the loop."""

  def __init__(self):
    pass


def no_stats() -> dict:
  """What a stage without experts says of its balance and its loads."""
  none_nE = jnp.zeros((0, 1))
  return {'balance': jnp.zeros(()), 'load': none_nE, 'mtp_load': none_nE}


def tick_loop(
  program: instructions.PipelineProgram,
  weights: Sequence[dict],
  split_stages: dict,
  shape: tuple[int, ...],
) -> executor.TickLoop:
  """The loop over ticks of training, with other stages and no vocabulary.

  Args:
    weights: of each chunk. split_stages: of each kind of stage.
  """
  none_nE = jnp.zeros((0, 1))
  chunks = [
    stage_params.ChunkParams(stage_params.StageWeights(named, {}), none_nE)
    for named in weights
  ]
  scales = {'balance': jnp.zeros(())}
  vocab_params = {'embed': jnp.zeros(()), 'head': jnp.zeros(())}
  tail = stage_params.StageWeights({}, {})
  return executor.TickLoop(
    program=program,
    vocab=NoVocab(shape),
    stages=stage_compute.StageCompute(
      ChunkOperands(program, chunks),
      split_stages,
      scales,
      mtp_depth=0,
      num_experts=1,
    ),
    sums=gradient_sums.GradientSums(
      program,
      chunks,
      tail,
      vocab_params,
      scales,
      mtp_depth=0,
      num_experts=1,
      converter=NoMasters(),
    ),
    shape=shape,
    dtype='float32',
  )


def sleeping_loop(
  program: instructions.PipelineProgram, pace: Pace
) -> executor.TickLoop:
  """The loop over ticks of training, with stages that sleep."""
  count = len(instructions.chunks(program.schedule)[0])
  shape_of = lambda kind: (1, *_SHAPE) if kind.last else _SHAPE
  split_stages = {
    number: Sleeping(pace, shape_of(kind), no_stats())
    for number, kind in enumerate(program.kinds)
  }
  return tick_loop(
    program, [{'w': jnp.zeros(())}] * count, split_stages, _SHAPE
  )


def spmd(schedule: actions.Schedule, pace: Pace) -> Callable[[], float]:
  """Runs the schedule's table; returns how long it took [s]."""
  last = schedule.stages - 1
  kinds = tuple(
    stage_compute.StageKind(0, 0, at == 0, at == last) for at in range(last + 1)
  )
  program = instructions.compile_schedule(schedule, kinds)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((schedule.ranks,), (stage_params.AXIS,), axis_types=auto)

  def run(fields_tick_rank, vocab_fields_tick_direction):
    loop = sleeping_loop(program, pace)

    def tick(t, state):
      return loop.tick(
        state, fields_tick_rank[t, 0], vocab_fields_tick_direction[t]
      )

    state = jax.lax.fori_loop(
      0, len(vocab_fields_tick_direction), tick, loop.start()
    )
    # All of it is wanted, or the compiler would leave out what is not.
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))[None]

  spec = jax.sharding.PartitionSpec
  specs = {
    'in_specs': (spec(None, stage_params.AXIS), spec()),
    'out_specs': spec(stage_params.AXIS),
  }
  step = jax.jit(sharding.shard_map_step(run, mesh, **specs))
  args = program.fields_tick_rank, program.vocab_fields_tick_direction

  def measure():
    begun = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - begun

  return measure


def threads(schedule: actions.Schedule, pace: Pace) -> Callable[[], float]:
  """Likewise, with a thread a rank."""
  one = jnp.ones(())
  stage = threaded.ThreadedStage(
    Sleeping(pace, _SHAPE, {}), {}, [one] * schedule.microbatches, {}
  )
  devices = jax.devices()[: schedule.ranks]
  executor = threaded.ThreadedExecutor(
    schedule, [stage] * schedule.stages, devices
  )
  return lambda: executor.run().timeline.total


def simulated(schedule: actions.Schedule) -> tuple[float, float]:
  """Bubbles without a common clock and in ticks, as parts of the whole."""
  table = tick_tables.to_ticks(schedule)
  free = simulate.simulate(schedule, TIMES)
  ticks = tick_tables.timeline(schedule, table, TIMES)
  return tuple(float(clock.bubble / clock.total) for clock in (free, ticks))


def measure(
  kind: str, ranks: int, microbatches: int, seconds: float, runs: int
) -> report.Row:
  """Bubbles of a schedule, as parts of the total time."""
  per_rank = schedules.stages_per_rank(kind)
  schedule = schedules.make_schedule(
    kind,
    stages=per_rank * ranks,
    microbatches=microbatches,
    split_backward=kind in schedules.UNIDIRECTIONAL,
  )
  row = {'schedule': kind, 'ranks': ranks, 'micro-batches': microbatches}
  row['ideal'], row['in_ticks'] = simulated(schedule)
  work = microbatches * per_rank * (TIMES.f + TIMES.b) * seconds
  for name, start in (('spmd', spmd), ('threaded', threads)):
    pace = Pace()
    run = start(schedule, pace)
    run()  # compiles
    pace.seconds = seconds
    row[name] = 1.0 - work / min(run() for _ in range(runs))
  return row | {'wrong': abs(row['spmd'] - row['in_ticks']) > BAR}


def draw(rows: Sequence[report.Row], path: pathlib.Path) -> None:
  """Bars of all four figures, a panel for each number of ranks and batches."""
  from matplotlib import pyplot

  panels = list(dict.fromkeys((r['ranks'], r['micro-batches']) for r in rows))
  figure, axes = pyplot.subplots(
    len(panels), figsize=(9, 2.4 * len(panels)), sharex=True, squeeze=False
  )
  for axis, panel in zip(axes[:, 0], panels, strict=True):
    panel_rows = [r for r in rows if (r['ranks'], r['micro-batches']) == panel]
    for i, name in enumerate(('ideal', 'in_ticks', 'spmd', 'threaded')):
      at = np.arange(len(panel_rows)) + 0.2 * (i - 1.5)
      axis.bar(at, [row[name] for row in panel_rows], 0.18, label=name)
    axis.set_xticks(
      range(len(panel_rows)), [row['schedule'] for row in panel_rows]
    )
    axis.set_title(f'{panel[0]} ranks, {panel[1]} micro-batches', fontsize=9)
    axis.set_ylabel('bubble')
  axes[0, 0].legend(ncols=4, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
  numbers = lambda text: [int(number) for number in text.split(',')]
  parser = report.parser('pipeline_bubble', __doc__)
  parser.add_argument('--ranks', type=numbers, default=[4, 8])
  parser.add_argument('--microbatches', type=numbers, default=[16, 32])
  parser.add_argument('--kinds', default=','.join(schedules.KINDS))
  parser.add_argument('--milliseconds', type=float, default=100.0)
  parser.add_argument('--runs', type=int, default=2)
  parser.add_argument('--png', type=pathlib.Path)
  args = parser.parse_args(argv)
  if args.milliseconds <= 0 or args.runs < 1:
    parser.error('--milliseconds must be above 0 and --runs at least 1')
  cases = list(
    itertools.product(args.ranks, args.microbatches, args.kinds.split(','))
  )
  try:  # before anything runs
    for ranks, microbatches, kind in cases:
      stages = ranks * schedules.stages_per_rank(kind)
      schedules.check_sizes(kind, stages, microbatches)
  except errors.InputError as error:
    parser.error(str(error))
  most = max(args.ranks)
  jax.config.update('jax_num_cpu_devices', most)  # nothing has run so far
  if len(jax.devices()) < most:
    parser.error(f'{most} devices are needed, {len(jax.devices())} are here')
  rows = report.Rows(args)
  for ranks, microbatches, kind in cases:
    seconds = args.milliseconds / 1000
    rows.append(measure(kind, ranks, microbatches, seconds, args.runs))
  if args.png:
    draw(rows, args.png)
  report.publish('pipeline_bubble', __doc__.split('\n\n')[1], rows, args)
  return int(any(row['wrong'] for row in rows))


if __name__ == '__main__':
  sys.exit(main())
