"""How a step is laid out on devices: mesh, schedule, stages, micro-batches.

Letters: P ranks of the pipeline, M tokens of a device and micro-batch.
"""

import dataclasses
import functools
import math

from dsv3_jax import config, errors
from dsv3_jax.parallel.schedules import layer_partition
from dsv3_jax.parallel.schedules import make as schedules

AXES = ('pipe', 'data', 'context', 'node', 'expert')
# Of a stage beside its layers, in MoE layers: docs/pipelines.md.
_COSTS = {
  'last': layer_partition.Costs(head=1.4, mtp=2.5),
  'sharded': layer_partition.Costs(head=0, mtp=1.1),
}
VOCABULARIES = tuple(_COSTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLayout:
  """One legal way to run a step.

  Attributes:
    pipe, data, context, node, expert: devices along each mesh axis.
    microbatch: sequences of a micro-batch on all devices.
    batch: sequences of a step.
    vocabulary: 'last': embedding on the first and head on the last stage, as in
      the report; 'sharded': both over `pipe`, as in `parallel.pipeline`.
    buffer_factor: `model.moe.buffer_factor`, room for received rows, times the
      even load M * top_k.
  """

  pipe: int
  data: int
  context: int
  node: int
  expert: int
  schedule: str
  microbatch: int
  batch: int
  remat: str
  buffer_factor: float
  fsdp: tuple[str, ...] = ()
  vocabulary: str = 'last'

  @property
  def devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in AXES)

  @property
  def sequence_shards(self) -> int:
    """Devices over which the sequences of a micro-batch are sharded."""
    return self.data * self.node * self.expert

  @property
  def expert_devices(self) -> int:
    return self.node * self.expert

  @property
  def microbatches(self) -> int:
    return self.batch // self.microbatch

  @property
  def stages(self) -> int:
    per_rank = schedules.stages_per_rank(self.schedule)
    return self.pipe * per_rank if self.pipe > 1 else 1

  @property
  def overlapped(self) -> bool:
    """True if forwards overlap backwards."""
    return self.pipe > 1 and self.schedule.startswith('dualpipe')

  @property
  def fsdp_devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in self.fsdp)

  @property
  def fsdp_beside_experts(self) -> int:
    """Devices over which FSDP shards each expert."""
    return math.prod(
      getattr(self, axis) for axis in self.fsdp if axis in ('data', 'context')
    )

  def tokens(self, seq_len: int) -> float:
    """M: tokens of a device and micro-batch."""
    return self.microbatch * seq_len / (self.sequence_shards * self.context)

  def held(self, rank: int) -> tuple[int, ...]:
    """Stages of a rank, as in `Schedule.held`."""
    if self.pipe == 1:
      return (0,)
    last = self.stages - 1
    match self.schedule:
      case 'dualpipe' | 'dualpipev':
        return (rank, last - rank)
      case 'interleaved':
        return tuple(range(rank, self.stages, self.pipe))
    return (rank,)

  def live(self, rank: int) -> int:
    """The most activations of a stage that a rank holds (`make`'s table)."""
    ranks, count = self.pipe, self.microbatches
    if ranks == 1:
      return 1
    chunks = schedules.stages_per_rank(self.schedule)
    return {
      'gpipe': count,
      '1f1b': min(count, ranks - rank),
      'interleaved': min(count * chunks, ranks * chunks + ranks - 1 - 2 * rank),
      'zb1p': ranks,
      'dualpipe': ranks + 1,
      'dualpipev': 2 * ranks + 1,
    }[self.schedule]

  def describe(self) -> str:
    """Axes above 1, schedule, micro-batches, in one line."""
    axes = [f'{a}={getattr(self, a)}' for a in AXES if getattr(self, a) > 1]
    kind = [self.schedule] if self.pipe > 1 else []
    shards = [f'fsdp={",".join(self.fsdp)}'] if self.fsdp else []
    rows = self.microbatch / self.sequence_shards
    counts = f'{self.microbatches} x {rows:g} sequences'
    return ' '.join([*axes, *kind, counts, f'remat={self.remat}', *shards])


@functools.cache
def layer_ranges(
  num_layers: int, mtp_depth: int, stages: int, vocabulary: str
) -> layer_partition.LayerRanges:
  """First and past-last layer of each stage."""
  costs = _COSTS[vocabulary]
  costs = dataclasses.replace(costs, mtp=costs.mtp * mtp_depth)
  return layer_partition.split_layers(num_layers, stages, costs)


def stage_layers(
  model: config.ModelConfig, layout: DeviceLayout
) -> list[tuple[int, int]]:
  """(dense layers, MoE layers) of each stage, without MTP modules."""
  ranges = layer_ranges(
    model.num_layers, model.mtp.depth, layout.stages, layout.vocabulary
  )
  counts = []
  for first, end in ranges:
    dense = max(0, min(end, model.num_dense_layers) - first)
    counts.append((dense, end - first - dense))
  return counts


def from_config(cfg: config.Config, chips: int, **changes) -> DeviceLayout:
  """The layout of an experiment on a number of chips.

  `data` and the micro-batch grow if there are more chips than the mesh has.

  Raises:
    InputError: chips is not a multiple of the mesh, or the batch has too few
      micro-batches for the schedule.
  """
  p = cfg.parallel
  layout = DeviceLayout(
    **{axis: getattr(p, axis) for axis in AXES},
    schedule=p.schedule,
    microbatch=cfg.train.microbatch_size,
    batch=cfg.train.batch_size,
    remat=cfg.model.remat,
    buffer_factor=cfg.model.moe.buffer_factor,
    fsdp=p.fsdp,
    **changes,
  )
  mesh = layout.devices
  if chips < 1 or chips % mesh:
    below = chips // mesh * mesh
    near = ' or '.join(str(n) for n in (below, below + mesh) if n > 0)
    raise errors.InputError(
      f'chips={chips} must be a multiple of {mesh}, the devices of '
      f'config.parallel: use {near}'
    )
  times = chips // mesh
  layout = dataclasses.replace(
    layout, data=layout.data * times, microbatch=layout.microbatch * times
  )
  check(layout)
  return layout


def check(layout: DeviceLayout) -> None:
  """Raises InputError if the batch does not fit mesh and schedule."""
  if layout.batch % layout.microbatch:
    raise errors.InputError(
      f'train.batch_size={layout.batch} must be a multiple of '
      f'{layout.microbatch}, the micro-batch of {layout.devices} chips'
    )
  if layout.pipe > 1:
    try:
      schedules.check_sizes(layout.schedule, layout.stages, layout.microbatches)
    except errors.InputError as error:
      raise errors.InputError(
        f'train.batch_size={layout.batch} in micro-batches of '
        f'{layout.microbatch}: {error}'
      ) from error
