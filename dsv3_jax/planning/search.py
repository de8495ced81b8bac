"""Legal layouts of a number of chips, ranked by time; which fit; the fewest.

All layouts get a closed-form time: the slowest rank's work and the formula of
the schedule's bubble. The best of those that fit are then simulated.
"""

import dataclasses
import functools
from collections.abc import Iterator

from dsv3_jax import config, errors
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.planning import (
  chips,
  device_layout,
  device_memory,
  step_time,
)

DeviceLayout = device_layout.DeviceLayout
_LONG = 16384  # tokens from which sequences may be sharded
_ROWS = (1, 2, 4)  # sequences of a device and micro-batch
_MOST_RANKS = 64
_MOST_CHIPS = 1 << 17
_SIMULATED = 12
# What to change if a part is the largest.
_REMEDIES = {
  'live activations': "model.remat='full', a smaller buffer factor, a schedule "
  'with fewer live activations (1f1b), or more parallel.pipe',
  'compute forms': 'more parallel.pipe or experts on more devices, or fsdp',
  'gradients': 'more parallel.pipe or experts on more devices, or fsdp',
  'master weights': 'more chips: they exist once over the mesh',
  'moments': 'more chips: they exist once over the mesh',
  'exchange buffers': 'a smaller micro-batch or buffer factor',
  'logits': "vocabulary='sharded', or a smaller micro-batch",
  'gathered layer': 'experts on more devices, or no fsdp',
  'recomputed layer': 'a smaller micro-batch or buffer factor',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A legal layout, its bytes and its time."""

  layout: DeviceLayout
  memory: device_memory.DeviceMemory
  seconds: float


def layouts(
  cfg: config.Config, chip: chips.Chip, num_chips: int, like: DeviceLayout
) -> Iterator[DeviceLayout]:
  """Every legal layout that is searched.

  Args:
    like: gives batch, vocabulary and buffer factor.
  """
  model = cfg.model
  powers = [1 << n for n in range(18)]
  pipes = [
    p
    for p in powers
    if p <= min(_MOST_RANKS, model.num_layers) and model.vocab_size % p == 0
  ]
  contexts = [1]
  if cfg.data.seq_len >= _LONG or like.batch < num_chips:
    contexts = [c for c in (1, 2, 4, 8) if cfg.data.seq_len % (2 * c) == 0]
  for pipe in pipes:
    for context in contexts:
      for node, expert in _expert_axes(model, chip):
        shards, left = divmod(num_chips, pipe * context)
        data, rest = divmod(shards, node * expert)
        if left or rest or not data:
          continue
        mesh = {'pipe': pipe, 'data': data, 'context': context}
        mesh |= {'node': node, 'expert': expert}
        yield from _schedules(cfg, dataclasses.replace(like, **mesh))


def _expert_axes(
  model: config.ModelConfig, chip: chips.Chip
) -> Iterator[tuple[int, int]]:
  """Sizes of (node, expert) that divide groups and experts."""
  moe = model.moe
  if not model.num_moe_layers:
    yield 1, 1
    return
  for node in range(1, moe.num_groups + 1):
    for expert in range(1, min(chip.node_size, 64) + 1):
      devices = node * expert
      if expert & (expert - 1) or moe.num_groups % node:
        continue
      if moe.num_experts % devices == 0:
        yield node, expert


def _schedules(
  cfg: config.Config, mesh: DeviceLayout
) -> Iterator[DeviceLayout]:
  """Schedules, micro-batches, recomputation and FSDP on one mesh."""
  kinds = schedules.KINDS if mesh.pipe > 1 else ('1f1b',)
  fsdp = [(), ('data',)] if mesh.data > 1 else [()]
  remats = dict.fromkeys(('report', 'full'))
  for kind in kinds:
    for rows in _ROWS:
      for remat in remats:
        for axes in fsdp:
          layout = dataclasses.replace(
            mesh,
            schedule=kind,
            microbatch=rows * mesh.sequence_shards,
            remat=remat,
            fsdp=axes,
          )
          if layout.stages > cfg.model.num_layers:
            continue
          try:
            device_layout.check(layout)
          except errors.InputError:
            continue
          yield layout


def quick_seconds(
  cfg: config.Config, chip: chips.Chip, layout: DeviceLayout
) -> float:
  """Closed-form time of a step."""
  times = step_time.kernel_times(cfg, chip, layout)
  stages = step_time.stage_times(times)
  seconds = step_time.optimizer_seconds(cfg, chip, layout, times.rates)
  seconds += layout.microbatches * step_time.per_microbatch(times, stages)
  if layout.pipe == 1:
    return seconds
  mean = lambda values: sum(values) / len(stages)
  f = mean([s.forward for s in stages])
  b = mean([s.backward for s in stages])
  fb = mean([s.beside(s, times.rates.overlap) for s in stages])
  return seconds + schedules.closed_form_bubble(
    layout.schedule,
    ranks=layout.pipe,
    f=f,
    b=b,
    w=mean([s.weight for s in stages]),
    fb=fb,
  )


def search(
  cfg: config.Config,
  chip: chips.Chip,
  num_chips: int,
  like: DeviceLayout,
  most: int = 10,
) -> list[Candidate]:
  """The fastest layouts that fit, fastest first; empty if none fits."""
  fitting = [
    Candidate(
      layout=layout, memory=memory, seconds=quick_seconds(cfg, chip, layout)
    )
    for layout, memory in _fitting(cfg, chip, num_chips, like)
  ]
  fitting.sort(key=lambda candidate: candidate.seconds)
  simulated = [
    dataclasses.replace(
      candidate,
      seconds=step_time.step_time(cfg, chip, candidate.layout).seconds,
    )
    for candidate in fitting[: max(most, _SIMULATED)]
  ]
  simulated.sort(key=lambda candidate: candidate.seconds)
  return simulated[:most]


def _fitting(
  cfg: config.Config, chip: chips.Chip, num_chips: int, like: DeviceLayout
) -> Iterator[tuple[DeviceLayout, device_memory.DeviceMemory]]:
  for layout in layouts(cfg, chip, num_chips, like):
    memory = device_memory.device_memory(cfg, layout)
    if memory.fits(chip.hbm_bytes):
      yield layout, memory


def nearest(
  cfg: config.Config, chip: chips.Chip, layout: DeviceLayout
) -> Candidate | None:
  """The layout that fits with the fewest changed settings, then the fastest."""
  fitting = list(_fitting(cfg, chip, layout.devices, layout))
  if not fitting:
    return None
  changes = lambda other: len(changed(layout, other))
  least = min(changes(other) for other, _ in fitting)
  candidates = [
    Candidate(
      layout=other, memory=memory, seconds=quick_seconds(cfg, chip, other)
    )
    for other, memory in fitting
    if changes(other) == least
  ]
  return min(candidates, key=lambda candidate: candidate.seconds)


def changed(layout: DeviceLayout, other: DeviceLayout) -> dict[str, object]:
  """Settings of `other` that differ, `microbatch` as sequences of a device."""
  values = {}
  for field in dataclasses.fields(DeviceLayout):
    mine, new = (getattr(x, field.name) for x in (layout, other))
    if field.name == 'microbatch':
      mine, new = (x.microbatch / x.sequence_shards for x in (layout, other))
    if mine != new:
      values[field.name] = new
  return values


def binding(memory: device_memory.DeviceMemory, capacity: float) -> str:
  """Which part of the memory decides, and what makes it smaller."""
  name, size = max(memory.parts.items(), key=lambda item: item[1])
  share = size / memory.total
  room = capacity * (1 - device_memory.RESERVE)
  over = memory.total - room
  verdict = f'{over / 1e9:.1f} GB too much' if over > 0 else 'it fits'
  return (
    f'{memory.total / 1e9:.1f} of {room / 1e9:.1f} GB: {verdict}. Largest: '
    f'{name}, {size / 1e9:.1f} GB ({share:.0%}); smaller with {_REMEDIES[name]}'
  )


@functools.lru_cache(maxsize=8)
def fewest_chips(
  cfg: config.Config, chip: chips.Chip, like: DeviceLayout
) -> tuple[int, DeviceLayout] | None:
  """The smallest power of two of chips with a layout that fits."""
  num_chips = 1
  while num_chips <= _MOST_CHIPS:
    for layout, _ in _fitting(cfg, chip, num_chips, like):
      return num_chips, layout
    num_chips *= 2
  return None
