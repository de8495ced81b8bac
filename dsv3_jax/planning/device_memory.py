"""Bytes of one device in a training step, by part and by phase.

Forms are what matmuls read (`memory.compute_bytes`). Gradients are f32 sums
over the micro-batches of a step. Master weights and moments exist once over the
mesh (ZeRO-1). The EMA is in host memory. Activations are those that `remat`
saves. A device has room for `buffer_factor` times the even load of received
rows, and saves them with both SwiGLU inputs of all of this room, since shapes
are static. With `vocabulary='sharded'` one program serves all ranks, as ours
does, so each has room for the largest stage (docs/pipelines.md); with 'last'
each rank has room for its own stages.
"""

import dataclasses
import functools

from dsv3_jax import config, precision
from dsv3_jax.planning import device_layout, flops, memory

DeviceLayout = device_layout.DeviceLayout
RESERVE = 0.05  # of the capacity: runtime, programs, fragments; assumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageBytes:
  """Of one stage on one device, activations for one micro-batch."""

  parameters: float  # held on the device, number of values
  forms: float
  master_values: float  # of the whole stage, over all its devices


def _of_parts(
  parts: list[flops.Part], policy: precision.Policy, layout: DeviceLayout
) -> StageBytes:
  values = forms = total = 0.0
  for part in parts:
    experts = part.name.endswith('experts')
    # Experts are sharded over their axes, and no further by those in fsdp.
    shards = layout.expert_devices if experts else layout.fsdp_devices
    if experts:
      rest = (a for a in layout.fsdp if a in ('data', 'context'))
      for axis in rest:
        shards *= getattr(layout, axis)
    read = part.copies * memory.compute_bytes(part, policy)
    values += part.size / shards
    forms += (read or 4 * part.size) / shards  # 0: the f32 master is read
    total += part.size
  return StageBytes(parameters=values, forms=forms, master_values=total)


def _add(*parts: StageBytes) -> StageBytes:
  fields = [f.name for f in dataclasses.fields(StageBytes)]
  return StageBytes(**{n: sum(getattr(p, n) for p in parts) for n in fields})


def _scale(times: int | float, stage: StageBytes) -> StageBytes:
  values = {n: times * v for n, v in dataclasses.asdict(stage).items()}
  return StageBytes(**values)


def stage_bytes(
  model: config.ModelConfig, policy: precision.Policy, layout: DeviceLayout
) -> list[StageBytes]:
  """Weights of each stage; embedding and head where `vocabulary` says."""
  of = functools.partial(_of_parts, policy=policy, layout=layout)
  dense, moe = (of(flops.layer_parts(model, m)) for m in (False, True))
  stages = [
    _add(_scale(num_dense, dense), _scale(num_moe, moe))
    for num_dense, num_moe in device_layout.stage_layers(model, layout)
  ]
  embedding, norm, head = (of([p]) for p in flops.vocab_parts(model))
  stages[-1] = _add(stages[-1], norm, of(flops.mtp_parts(model)))
  if layout.vocabulary == 'last' or layout.stages == 1:
    stages[0] = _add(stages[0], embedding)
    stages[-1] = _add(stages[-1], head)
    return stages
  # A rank has 1 / P of both, once, whatever stages it holds.
  per_rank = layout.stages // layout.pipe
  per_rank *= 2 if layout.schedule == 'dualpipe' else 1
  share = _scale(1 / layout.pipe / per_rank, _add(embedding, head))
  masters = (embedding.master_values + head.master_values) / layout.stages
  share = dataclasses.replace(share, master_values=masters)
  return [_add(stage, share) for stage in stages]


def activation_bytes(
  model: config.ModelConfig,
  policy: precision.Policy,
  layout: DeviceLayout,
  is_moe: bool,
) -> float:
  """Bytes per token that a layer saves on a device."""
  size = 4 if policy.compute == 'float32' else 2
  if layout.remat == 'full':
    return float(model.d_model * size)
  rows = float(model.moe.top_k)
  if layout.expert_devices > 1:
    rows *= layout.buffer_factor
  kinds = memory.activation_bytes(
    model, policy, is_moe=is_moe, expert_rows=rows if is_moe else None
  )
  total = sum(kinds.values())
  if is_moe and layout.expert_devices > 1:
    total += rows * row_bytes(model, policy)
  if layout.remat == 'none':
    m = model.mla
    heads = m.num_heads * (2 * m.qk_head_dim + m.v_head_dim)
    product = model.d_ff
    if is_moe:
      product = (rows + model.moe.num_shared_experts) * model.moe.d_ff
    total += (2 * model.d_model + heads + product) * size
  return float(total)


def row_bytes(model: config.ModelConfig, policy: precision.Policy) -> int:
  """Of one row that is sent to an expert: FP8 and f32 scales, or BF16, f32."""
  dim = model.d_model
  if policy.fp8:
    return dim + memory.scale_bytes(dim)
  return dim * (4 if policy.compute == 'float32' else 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
  """Bytes of the fullest device.

  Attributes:
    parts: on the device at the peak, while the pipeline runs.
    host: in host memory, a device's share.
    live: activations of one stage that each rank holds at most.
    phases: total bytes in each phase of a step.
  """

  parts: dict[str, float]
  host: dict[str, float]
  live: list[int]
  phases: dict[str, float]

  @property
  def total(self) -> float:
    return sum(self.parts.values())

  def fits(self, capacity: float) -> bool:
    return self.total <= capacity * (1 - RESERVE)


def device_memory(cfg: config.Config, layout: DeviceLayout) -> DeviceMemory:
  """Bytes of the fullest device under a layout."""
  model, policy = cfg.model, precision.POLICIES[cfg.precision]
  tokens = layout.tokens(cfg.data.seq_len)
  live = [layout.live(rank) for rank in range(layout.pipe)]
  saved = _activations(model, policy, layout, tokens)
  stages = stage_bytes(model, policy, layout)
  moment = {'bfloat16': 2, 'float32': 4}[cfg.optim.moments_dtype]
  zero = layout.devices / layout.pipe
  ranks = []
  for rank in range(layout.pipe):
    held = layout.held(rank)
    mine = _add(*(stages[stage] for stage in held))
    owned = [rank] if layout.schedule == 'dualpipe' else held
    owned = sum(stages[stage].master_values for stage in owned) / zero
    weights = {
      'compute forms': mine.forms,
      'gradients': 4 * mine.parameters,
      'master weights': 4 * owned,
      'moments': 2 * moment * owned,
    }
    largest = max(saved[stage] for stage in held)
    slots = live[rank]
    if layout.vocabulary == 'sharded':
      largest, slots = max(saved), max(live) + layout.overlapped
    ends = layout.vocabulary == 'sharded' or layout.stages - 1 in held
    ranks.append(
      weights
      | {'live activations': slots * largest}
      | _buffers(model, policy, layout, tokens, ends)
    )
  parts = max(ranks, key=lambda parts: sum(parts.values()))
  resident = sum(parts[name] for name in weights)
  return DeviceMemory(
    parts=parts,
    host={'ema': parts['master weights'] if cfg.optim.ema_decay else 0.0},
    live=live,
    phases={
      'between steps': resident - parts['gradients'],
      'pipeline': sum(parts.values()),
      'optimizer': resident,
    },
  )


def _activations(
  model: config.ModelConfig,
  policy: precision.Policy,
  layout: DeviceLayout,
  tokens: float,
) -> list[float]:
  """What one micro-batch saves at each stage."""
  dense, moe = (
    tokens * activation_bytes(model, policy, layout, is_moe)
    for is_moe in (False, True)
  )
  per_stage = [
    num_dense * dense + num_moe * moe
    for num_dense, num_moe in device_layout.stage_layers(model, layout)
  ]
  per_stage[-1] += model.mtp.depth * moe
  return per_stage


def _buffers(
  model: config.ModelConfig,
  policy: precision.Policy,
  layout: DeviceLayout,
  tokens: float,
  has_head: bool,
) -> dict[str, float]:
  """What one layer and the head need while they run."""
  size = 4 if policy.compute == 'float32' else 2
  exchange = 0.0
  if layout.expert_devices > 1 and model.num_moe_layers:
    rows = layout.buffer_factor * model.moe.top_k * tokens
    exchange = rows * (row_bytes(model, policy) + model.d_model * size)
  shards = layout.pipe if layout.vocabulary == 'sharded' else 1
  logits = 2 * 4 * tokens * model.vocab_size / shards  # f32, and gradients
  recomputed = 0.0
  if layout.remat == 'full':  # one layer at a time saves as under 'report'
    whole = dataclasses.replace(layout, remat='report')
    is_moe = bool(model.num_moe_layers)
    recomputed = tokens * activation_bytes(model, policy, whole, is_moe)
  return {
    'exchange buffers': exchange * (2 if layout.overlapped else 1),
    'logits': logits if has_head else 0.0,
    'recomputed layer': recomputed,
  }
