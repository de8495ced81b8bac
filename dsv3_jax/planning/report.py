"""A plan as one JSON object or as text, with its assumptions."""

import dataclasses
from typing import Any

from dsv3_jax.planning import (
  device_memory,
  flops,
  goodput,
  planner,
  posttrain,
  run_cost,
  search,
  serving,
)

ASSUMPTIONS = (
  'kernel rates are those of the public H800 trace (planning/kernels.py); '
  'other chips reach the same fractions of their peaks',
  'kernels beside matmuls reach 80 % of the HBM bandwidth',
  'the load of experts is even; a device has room for '
  'model.moe.buffer_factor times it, so that one round does',
  'gradients and new weights are exchanged after the pipeline, not hidden',
  'MFU counts the main model without MTP and recomputation, causal, against '
  'the BF16 peak, as the report does',
  f'{device_memory.RESERVE:.0%} of memory is left for runtime and fragments',
)
NOT_MODELLED = (
  'imbalance of experts, stragglers, congestion, clock throttling',
  'a common clock of ticks: see seconds_in_ticks',
  'data loading, evaluation, checkpoints, restarts: see goodput',
  'the routes of a torus: a TPU pod counts as one fast tier',
  'BF16 matmuls and Wgrad have no rate of their own in the trace',
)
# deepseek-ai/profile-data: EP128, 128 requests a device, prompts of 4K.
_DECODE = {'devices': 128, 'batch': 128, 'context': 4096}


def as_json(
  planned: planner.Planned,
  *,
  price: float | None = None,
  save_seconds: float = 60.0,
  restore_seconds: float = 600.0,
  device_hours: float = goodput.DEVICE_HOURS,
) -> dict[str, Any]:
  """The object that `dsv3 plan --json` prints.

  Args:
    price: dollars a chip-hour; None is the chip's, and `dollars` is null if
      that is not known either.
    save_seconds, restore_seconds: of a checkpoint.
    device_hours: mean hours of one device between failures.
  """
  chip, step, devices = planned.chip, planned.step, planned.layout.devices
  memory, speed = planned.memory, step.tokens_per_second
  paid = chip.price if price is None else price
  gpu_hours = run_cost.hours(devices, planned.run_seconds)
  mtbf = goodput.run_mtbf(devices, device_hours)
  interval = goodput.daly(save_seconds, mtbf)
  useful = goodput.goodput(interval, save_seconds, restore_seconds, mtbf)
  return {
    'step_seconds': step.seconds,
    'tokens_per_second': speed,
    'mfu': _mfu(planned, causal=True),
    'mfu_non_causal': _mfu(planned, causal=False),
    'gpu_hours_per_trillion_tokens': run_cost.hours(devices, 1e12 / speed),
    'gpu_hours': gpu_hours,
    'dollars': None if paid is None else gpu_hours * paid,
    'relative_error': planned.error,
    'memory_bytes_per_chip': memory.parts | {'total': memory.total},
    'memory_bytes_by_phase': memory.phases,
    'host_memory_bytes_per_chip': memory.host,
    'live_activations': memory.live,
    'fits': planned.fits,
    'memory_explained': search.binding(memory, chip.hbm_bytes),
    'step_parts_seconds': step.parts,
    'seconds_in_ticks': step.seconds_in_ticks,
    'chip': chip.name,
    'chips': devices,
    'layout': dataclasses.asdict(planned.layout),
    'goodput': {
      'share': useful,
      'checkpoint_interval_seconds': interval,
      'mtbf_seconds': mtbf,
      'gpu_hours': gpu_hours / useful if useful else None,
    },
    'serving': _serving(planned),
    'rl_step_seconds': _rl_step(planned),
    'assumptions': [
      *assumptions(planned),
      *(f'not modelled: {x}' for x in NOT_MODELLED),
    ],
  }


def _mfu(planned: planner.Planned, causal: bool) -> float:
  cfg = planned.cfg
  flop = flops.flops_per_token(cfg.model, cfg.data.seq_len, causal)
  peak = planned.layout.devices * planned.chip.bf16
  return flop * planned.step.tokens_per_second / peak


def _serving(planned: planner.Planned) -> dict[str, int | float]:
  """Bounds of inference, in the sizes of the public decode trace."""
  cfg, chip = planned.cfg, planned.chip
  model = cfg.model
  devices = min(planned.layout.devices, _DECODE['devices'])
  step = serving.decode(cfg, chip, **(_DECODE | {'devices': devices}))
  limit = lambda bandwidth: serving.limit_seconds_per_token(
    bandwidth,
    layers=model.num_layers,
    hidden=model.d_model,
    copies=model.moe.top_k + model.moe.num_shared_experts,
  )
  return {
    'cache_bytes_per_token': serving.cache_bytes_per_token(model),
    'limit_seconds_per_token_inter': limit(chip.inter),
    'limit_seconds_per_token_intra': limit(chip.intra),
    'decode_step_seconds': step.seconds,
    'decode_tokens_per_second_per_8_chips': step.tokens_per_second_per_node,
    'prefill_tokens_per_second_per_8_chips': (
      serving.prefill_tokens_per_second_per_node(cfg, chip, prompt=4096)
    ),
  }


def _rl_step(planned: planner.Planned) -> dict[str, float]:
  """One RL step of the sizes in `posttrain.RECIPE` on all chips."""
  recipe, devices = posttrain.RECIPE, planned.layout.devices
  times = posttrain.rl_step(
    planned.cfg,
    planned.chip,
    devices=devices,
    outputs=recipe['outputs of a step'],
    mean_tokens=recipe['tokens of an instance'],
    longest=recipe['longest output'],
    training_speed=planned.step.tokens_per_second / devices,
  )
  return dataclasses.asdict(times) | {'total': times.seconds}


def assumptions(planned: planner.Planned) -> list[str]:
  """What holds for every plan, and for this one."""
  chip, layout = planned.chip, planned.layout
  where = {
    'last': 'embedding on the first and head on the last stage, and a program '
    "for each rank, as in the report (--vocabulary=sharded: this project's)",
    'sharded': 'embedding and head over pipe, one program for all ranks',
  }[layout.vocabulary]
  text = [*ASSUMPTIONS, where, f'chip {chip.name}: {chip.sources}']
  if chip.unverified:
    names = ', '.join(chip.unverified)
    text.append(f'chip {chip.name}: not verified: {names}')
  least = planned.cfg.train.batch_size_start / layout.microbatch
  if layout.pipe > 1 and least < 2 * layout.pipe:
    text.append(
      f'the batch ramp starts with {least:g} micro-batches, extrapolated where '
      'the schedule needs more'
    )
  return text


def render(planned: planner.Planned, summary: dict[str, Any]) -> str:
  """The same for people."""
  step, memory = planned.step, planned.memory
  dollars = summary['dollars']
  money = 'no price known: give --price'
  if dollars is not None:
    money = f'{dollars:,.7g} dollars'
  rows = [
    f'{summary["chips"]:,} x {planned.chip.name}: {planned.layout.describe()}',
    '',
    f'step               {step.seconds:10.4g} s +- {planned.error:.0%}',
  ]
  for name, seconds in step.parts.items():
    rows.append(f'  {name:16} {seconds:10.4g} s {seconds / step.seconds:6.1%}')
  per_trillion = summary['gpu_hours_per_trillion_tokens']
  useful, inference = summary['goodput'], summary['serving']
  rl = summary['rl_step_seconds']
  rows += [
    f'tokens a second    {step.tokens_per_second:14,.0f}',
    f'MFU                {summary["mfu"]:10.2%} causal, '
    f'{summary["mfu_non_causal"]:.2%} non-causal',
    f'chip-hours         {per_trillion:14,.6g} per trillion tokens',
    f'                   {summary["gpu_hours"]:14,.7g} for '
    f'{planned.cfg.train.total_tokens:.4g} tokens; {money}',
    f'goodput            {useful["share"]:10.1%}, a checkpoint every '
    f'{useful["checkpoint_interval_seconds"] / 60:.0f} minutes',
    f'decode             '
    f'{inference["decode_tokens_per_second_per_8_chips"]:14,.0f} tokens a '
    'second and 8 chips at most (roofline); all-to-alls alone take '
    f'{1e3 * inference["limit_seconds_per_token_inter"]:.2f} ms a token',
    f'RL step            {rl["total"]:10.1f} s: rollout {rl["rollout"]:.1f}, '
    f'update {rl["update"]:.1f}, refit {rl["refit"]:.1f}',
    '',
    f'memory of a chip, GB (of {planned.chip.hbm_bytes / 1e9:.0f})',
  ]
  for name, size in memory.parts.items():
    rows.append(f'  {name:16} {size / 1e9:10.2f}')
  rows.append(f'  {"total":16} {memory.total / 1e9:10.2f}')
  rows += [summary['memory_explained'], '', 'assumptions']
  rows += [f'  {text}' for text in summary['assumptions']]
  return '\n'.join(rows)


def render_costs(rows: list[run_cost.Row]) -> str:
  """The report's cost table beside its predictions, as Markdown."""
  lines = [
    '| | predicted | | report | residual | within 8 % | if not, probably |',
    '| --- | ---: | --- | ---: | ---: | --- | --- |',
  ]
  for row in rows:
    lines.append(
      f'| {row.name.strip()}, {row.unit} | {row.predicted:,.2f} | '
      f'+- {row.error:.0%} | {row.published:,.2f} | {row.residual:+.1%} | '
      f'{"yes" if row.met else "no"} | {"" if row.met else row.why} |'
    )
  return '\n'.join(lines)


def render_search(candidates: list[search.Candidate]) -> str:
  """A line a layout, fastest first."""
  lines = [f'{"step, s":>8} {"GB":>7}  layout']
  for c in candidates:
    lines.append(
      f'{c.seconds:8.2f} {c.memory.total / 1e9:7.1f}  {c.layout.describe()}'
    )
  return '\n'.join(lines)


def costs_as_json(rows: list[run_cost.Row]) -> dict[str, Any]:
  """The same as one object: name and unit -> figures."""
  return {
    f'{row.name.strip()}, {row.unit}': {
      'predicted': row.predicted,
      'published': row.published,
      'residual': row.residual,
      'relative_error': row.error,
      'within_target': row.met,
      'why': row.why,
    }
    for row in rows
  }
