"""An experiment on a number of chips: its layout, bytes and times."""

import dataclasses

from dsv3_jax import config, errors
from dsv3_jax.planning import (
  chips,
  device_layout,
  device_memory,
  run_cost,
  search,
  step_time,
)

DeviceLayout = device_layout.DeviceLayout
# TR 3.2: for an experiment that names no mesh.
_REPORT_MESH = {'pipe': 16, 'context': 1, 'node': 8, 'expert': 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """An experiment on chips: layout, bytes and times."""

  cfg: config.Config
  chip: chips.Chip
  layout: DeviceLayout
  memory: device_memory.DeviceMemory
  step: step_time.StepTime
  error: float
  run_seconds: float

  @property
  def fits(self) -> bool:
    return self.memory.fits(self.chip.hbm_bytes)


def choose_layout(
  cfg: config.Config, chip: chips.Chip, num_chips: int, **changes
) -> DeviceLayout:
  """The experiment's mesh; if it names none, the report's, else the fastest.

  Raises:
    InputError: the chips do not fit the mesh, or no layout is legal.
  """
  axes = device_layout.AXES
  if num_chips == 1 or any(getattr(cfg.parallel, a) > 1 for a in axes):
    return device_layout.from_config(cfg, num_chips, **changes)
  like = DeviceLayout(
    **dict.fromkeys(axes, 1),
    schedule=cfg.parallel.schedule,
    microbatch=1,
    batch=cfg.train.batch_size,
    remat=cfg.model.remat,
    buffer_factor=cfg.model.moe.buffer_factor,
    **changes,
  )
  legal = list(search.layouts(cfg, chip, num_chips, like))
  if not legal:
    raise errors.InputError(
      f'chips={num_chips} has no legal layout for train.batch_size='
      f'{like.batch}: use a divisor of it, or set config.parallel'
    )
  for layout in legal:
    mesh = all(getattr(layout, a) == n for a, n in _REPORT_MESH.items())
    rows = layout.microbatch == layout.sequence_shards
    kind = (layout.schedule, layout.remat) == (like.schedule, like.remat)
    if mesh and rows and kind and not layout.fsdp:
      return layout
  fitting = search.search(cfg, chip, num_chips, like, most=1)
  if fitting:
    return fitting[0].layout
  return min(legal, key=lambda x: device_memory.device_memory(cfg, x).total)


def plan(cfg: config.Config, chip: chips.Chip, layout: DeviceLayout) -> Planned:
  """Bytes and times of an experiment under a layout."""
  step = step_time.step_time(cfg, chip, layout)
  return Planned(
    cfg=cfg,
    chip=chip,
    layout=layout,
    memory=device_memory.device_memory(cfg, layout),
    step=step,
    error=step_time.uncertainty(cfg, chip, layout)['step'],
    run_seconds=run_cost.run_seconds(cfg, layout, step),
  )
