"""Time of a training step, from kernel times and the pipeline's table.

The table of the schedule runs with the times of uneven stages
(`parallel.schedules.simulate`, no common clock). Its parts are means over the
ranks: the times of F, of backwards, of W, of overlapped F&B, and the idle rest.
"""

import dataclasses
import functools
import math

from dsv3_jax import config, precision
from dsv3_jax.parallel.schedules import actions, simulate, ticks
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.planning import (
  chips,
  device_layout,
  device_memory,
  flops,
  kernels,
)

DeviceLayout = device_layout.DeviceLayout
_PART = {
  actions.FORWARD: 'forward',
  actions.BACKWARD: 'backward',
  actions.INPUT: 'backward',
  actions.WEIGHT: 'weight',
  actions.OVERLAPPED: 'overlapped',
}
PARTS = ('forward', 'bubble', 'backward', 'weight', 'overlapped', 'optimizer')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
  """A step in seconds; `parts` has the keys `PARTS` and adds up to it.

  Attributes:
    microbatch_seconds: what one more micro-batch adds to the step.
    minimum: fewest micro-batches of the schedule.
    seconds_in_ticks: of the step if one program runs all ranks tick by tick,
      as ours does; None without a pipeline.
  """

  parts: dict[str, float]
  tokens: int
  microbatches: int
  microbatch_seconds: float
  seconds_in_ticks: float | None

  @property
  def seconds(self) -> float:
    return sum(self.parts.values())

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds

  def with_microbatches(self, count: int | float) -> float:
    """Seconds of a step of another batch: the bubble stays the same."""
    fewer = self.microbatches - count
    return self.seconds - fewer * self.microbatch_seconds


def stage_times(times: kernels.KernelTimes) -> list[kernels.StageTimes]:
  """Of every stage: layers, MTP modules, and the head where it is."""
  model, layout = times.model, times.layout
  dense, moe = times.layer(False), times.layer(True)
  stages = [
    dense * num_dense + moe * num_moe
    for num_dense, num_moe in device_layout.stage_layers(model, layout)
  ]
  for _ in range(model.mtp.depth):
    stages[-1] += times.mtp()
  head = times.head() * (1 + model.mtp.depth)
  if layout.vocabulary == 'last' or layout.stages == 1:
    stages[-1] += head
    return stages
  share = kernels.StageTimes(rest=tuple(x / layout.stages for x in head.rest))
  return [stage + share for stage in stages]


def kernel_times(
  cfg: config.Config,
  chip: chips.Chip,
  layout: DeviceLayout,
  rates: kernels.Rates | None = None,
) -> kernels.KernelTimes:
  """Times of an experiment's kernels; rates: None: those of the trace."""
  return kernels.KernelTimes(
    model=cfg.model,
    policy=precision.POLICIES[cfg.precision],
    chip=chip,
    layout=layout,
    seq_len=cfg.data.seq_len,
    rates=rates or kernels.Rates(),
  )


def step_time(
  cfg: config.Config,
  chip: chips.Chip,
  layout: DeviceLayout,
  rates: kernels.Rates | None = None,
) -> StepTime:
  """Time of one step of the full batch."""
  times = kernel_times(cfg, chip, layout, rates)
  stages = stage_times(times)
  if layout.pipe == 1:
    (stage,) = stages
    once = per_microbatch(times, stages)
    count = layout.microbatches
    parts = {'forward': count * stage.forward, 'bubble': 0.0}
    parts |= {'backward': count * (stage.backward - stage.weight)}
    parts |= {'weight': count * stage.weight, 'overlapped': 0.0}
    in_ticks = None
  else:
    parts, once, in_ticks = _pipeline(times, stages)
  parts['optimizer'] = optimizer_seconds(cfg, chip, layout, times.rates)
  if in_ticks is not None:
    in_ticks += parts['optimizer']
  return StepTime(
    parts=parts,
    tokens=layout.batch * cfg.data.seq_len,
    microbatches=layout.microbatches,
    microbatch_seconds=once,
    seconds_in_ticks=in_ticks,
  )


@functools.lru_cache(maxsize=64)
def _table(kind: str, stages: int, microbatches: int) -> actions.Schedule:
  return schedules.make_schedule(kind, stages=stages, microbatches=microbatches)


def _pipeline(
  times: kernels.KernelTimes, stages: list[kernels.StageTimes]
) -> tuple[dict[str, float], float, float]:
  """Parts without the optimizer, seconds of a micro-batch, total in ticks."""
  layout, overlap = times.layout, times.rates.overlap
  table = _table(layout.schedule, layout.stages, layout.microbatches)
  row = times.tokens * times.model.d_model * times.sizes()[0]
  sent = row / (times.chip.inter * times.rates.combine)
  if layout.devices <= times.chip.node_size:
    sent = row / (times.chip.intra * times.rates.intra)
  pairs = tuple(
    stage.beside(other, overlap)
    for stage, other in zip(stages, stages[::-1], strict=True)
  )
  durations = simulate.Times(
    f=tuple(stage.forward for stage in stages),
    b=tuple(stage.backward for stage in stages),
    w=tuple(stage.weight for stage in stages),
    fb=pairs if layout.overlapped else None,
    comm=sent,
  )
  timeline = simulate.simulate(table, durations)
  parts = dict.fromkeys(PARTS[:-1], 0.0)
  for order, starts, ends in zip(
    table.orders, timeline.starts, timeline.ends, strict=True
  ):
    for action, start, end in zip(order, starts, ends, strict=True):
      parts[_PART[action.kind]] += (end - start) / table.ranks
  parts['bubble'] = timeline.total - sum(parts.values())
  clock = ticks.timeline(table, ticks.to_ticks(table), durations)
  once = per_microbatch(times, stages)
  return parts, once, clock.total


def per_microbatch(
  times: kernels.KernelTimes, stages: list[kernels.StageTimes]
) -> float:
  """What one more micro-batch costs the slowest rank."""
  layout, costs = times.layout, []
  for rank in range(layout.pipe):
    held = layout.held(rank)
    if layout.overlapped:
      pairs = [
        stages[stage].beside(stages[-1 - stage], times.rates.overlap)
        for stage in held
      ]
      # Under DualPipe half of the micro-batches pass each of its stages.
      costs.append(sum(pairs) / (2 if layout.schedule == 'dualpipe' else 1))
    else:
      costs.append(sum(stages[s].forward + stages[s].backward for s in held))
  return max(costs)


def optimizer_seconds(
  cfg: config.Config,
  chip: chips.Chip,
  layout: DeviceLayout,
  rates: kernels.Rates,
) -> float:
  """Gradient exchange, AdamW, and new forms of the weights (ZeRO-1).

  Sums over devices of a node first, then between nodes. Nothing of it is
  hidden. Forms are gathered in one orientation.
  """
  policy = precision.POLICIES[cfg.precision]
  stages = device_memory.stage_bytes(cfg.model, policy, layout)
  mirror = 2 if layout.schedule == 'dualpipe' and layout.pipe > 1 else 1
  experts = _expert_values(cfg.model)
  share = experts * mirror / layout.pipe / layout.expert_devices
  share /= layout.fsdp_beside_experts
  held = max(
    sum(stages[stage].parameters for stage in layout.held(rank))
    for rank in range(layout.pipe)
  )
  forms = max(
    sum(stages[stage].forms for stage in layout.held(rank))
    for rank in range(layout.pipe)
  )
  replicas = layout.devices // layout.pipe * mirror
  copies = layout.data * layout.context * mirror
  exchanged = 4 * held + forms / (2 if policy.fp8 else 1)
  part = min(1.0, share / held)
  beside = copies if layout.devices <= chip.node_size else 1  # in one node
  seconds = _reduce(part * exchanged, copies, beside, chip, rates)
  per_node = min(chip.node_size, layout.devices // layout.pipe)
  rest = (1 - part) * exchanged
  seconds += _reduce(rest, replicas, per_node, chip, rates)
  moment = {'bfloat16': 2, 'float32': 4}[cfg.optim.moments_dtype]
  masters = sum(stage.master_values for stage in stages) / layout.devices
  moved = masters * (12 + 4 * moment)
  return seconds + moved / (chip.hbm_bandwidth * rates.hbm)


@functools.lru_cache(maxsize=64)
def _expert_values(model: config.ModelConfig) -> int:
  return sum(
    part.size
    for part in (*flops.main_parts(model), *flops.mtp_parts(model))
    if part.name.endswith('experts')
  )


def _reduce(
  size: float,
  devices: int,
  per_node: int,
  chip: chips.Chip,
  rates: kernels.Rates,
) -> float:
  """A reduce-scatter of `size` bytes, within nodes first."""
  if devices <= 1:
    return 0.0
  per_node = min(per_node, devices)
  nodes = max(1, devices // per_node)
  seconds = size * (per_node - 1) / per_node / (chip.intra * rates.intra)
  slow = chip.inter * rates.combine
  return seconds + size / per_node * (nodes - 1) / nodes / slow


def uncertainty(
  cfg: config.Config, chip: chips.Chip, layout: DeviceLayout
) -> dict[str, float]:
  """Relative errors of a step and of its parts, from the rates' ranges.

  Each rate moves alone to both ends of its range; half the differences are
  added in squares. The step's key is 'step'.
  """
  plain = kernels.Rates()

  def seconds(rates: kernels.Rates) -> dict[str, float]:
    step = step_time(cfg, chip, layout, rates)
    return step.parts | {'step': step.seconds}

  middle = seconds(plain)
  squares = dict.fromkeys(middle, 0.0)
  for name, factors in kernels.RANGES.items():
    low, high = (
      seconds(dataclasses.replace(plain, **{name: getattr(plain, name) * x}))
      for x in factors
    )
    for part in squares:
      squares[part] += ((low[part] - high[part]) / 2) ** 2
  return {
    part: math.sqrt(square) / middle[part] if middle[part] else 0.0
    for part, square in squares.items()
  }
