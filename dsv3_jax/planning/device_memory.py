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


@functools.lru_cache(maxsize=1024)
def _of_parts(
  parts: tuple[flops.Part, ...],
  policy: precision.Policy,
  shards: int,
  expert_shards: int,
  f32_forms: bool = False,
) -> StageBytes:
  """Of some parameters; experts are sharded apart from the rest.

  With `f32_forms` the form is f32: FSDP gathers masters and casts afterwards.
  """
  values = forms = total = 0.0
  for part in parts:
    count = expert_shards if part.name.endswith('experts') else shards
    read = part.copies * memory.compute_bytes(part, policy)
    if f32_forms:
      read = 4 * part.size
    values += part.size / count
    forms += (read or 4 * part.size) / count  # 0: the f32 master is read
    total += part.size
  return StageBytes(parameters=values, forms=forms, master_values=total)


def _sum(*parts: tuple[int | float, StageBytes]) -> StageBytes:
  """The sum of parts, each a number of times."""
  return StageBytes(
    parameters=float(sum(n * part.parameters for n, part in parts)),
    forms=float(sum(n * part.forms for n, part in parts)),
    master_values=float(sum(n * part.master_values for n, part in parts)),
  )


@functools.cache
def _parts(
  model: config.ModelConfig,
) -> dict[str, tuple[flops.Part, ...]]:
  embedding, norm, head = flops.vocab_parts(model)
  return {
    'dense': tuple(flops.layer_parts(model, False)),
    'moe': tuple(flops.layer_parts(model, True)),
    'mtp': (norm, *flops.mtp_parts(model)),
    'embedding': (embedding,),
    'head': (head,),
  }


def stage_bytes(
  model: config.ModelConfig, policy: precision.Policy, layout: DeviceLayout
) -> list[StageBytes]:
  """Weights of each stage; embedding and head where `vocabulary` says."""
  # FSDP shards experts over axes that they are not sharded over already.
  shards = {
    'shards': layout.fsdp_devices,
    'expert_shards': layout.expert_devices * layout.fsdp_beside_experts,
    'f32_forms': layout.fsdp_devices > 1,
  }
  # A pipeline has embedding and head over `pipe` alone.
  vocab = shards if layout.pipe == 1 else {'shards': 1, 'expert_shards': 1}
  of = {
    name: _of_parts(
      parts, policy, **(vocab if name in ('embedding', 'head') else shards)
    )
    for name, parts in _parts(model).items()
  }
  stages = [
    _sum((num_dense, of['dense']), (num_moe, of['moe']))
    for num_dense, num_moe in device_layout.stage_layers(model, layout)
  ]
  stages[-1] = _sum((1, stages[-1]), (1, of['mtp']))
  if layout.vocabulary == 'last' or layout.stages == 1:
    stages[0] = _sum((1, stages[0]), (1, of['embedding']))
    stages[-1] = _sum((1, stages[-1]), (1, of['head']))
    return stages
  # A rank has 1 / P of both, once, whatever stages it holds.
  per_rank = len(layout.held(0))
  both = _sum((1, of['embedding']), (1, of['head']))
  share = _sum((1 / layout.pipe / per_rank, both))
  share = dataclasses.replace(
    share, master_values=both.master_values / layout.stages
  )
  return [_sum((1, stage), (1, share)) for stage in stages]


def activation_bytes(
  model: config.ModelConfig,
  policy: precision.Policy,
  layout: DeviceLayout,
  is_moe: bool,
) -> float:
  """Bytes per token that a layer saves on a device."""
  factor = layout.buffer_factor if layout.expert_devices > 1 else None
  return _activation_bytes(model, policy, layout.remat, factor, is_moe)


@functools.lru_cache(maxsize=256)
def _activation_bytes(
  model: config.ModelConfig,
  policy: precision.Policy,
  remat: str,
  buffer_factor: float | None,
  is_moe: bool,
) -> float:
  """`buffer_factor` None: all experts are on the device."""
  size = 4 if policy.compute == 'float32' else 2
  if remat == 'full':
    return float(model.d_model * size)
  rows = model.moe.top_k * (buffer_factor or 1.0)
  kinds = memory.activation_bytes(
    model, policy, is_moe=is_moe, expert_rows=rows if is_moe else None
  )
  total = sum(kinds.values())
  if is_moe and buffer_factor:
    total += rows * row_bytes(model, policy)
  if remat == 'none':
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
  buffers = {
    has_head: _buffers(model, policy, layout, tokens, has_head)
    for has_head in (False, True)
  }
  stages = stage_bytes(model, policy, layout)
  moment = {'bfloat16': 2, 'float32': 4}[cfg.optim.moments_dtype]
  zero = layout.devices / layout.pipe
  ranks = []
  for rank in range(layout.pipe):
    held = layout.held(rank)
    mine = _sum(*((1, stages[stage]) for stage in held))
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
      weights | {'live activations': slots * largest} | buffers[ends]
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
  gathered = 0.0
  if layout.fsdp_devices > 1:
    layer = _parts(model)['moe' if model.num_moe_layers else 'dense']
    gathered = sum(
      _of_parts(layer, policy, 1, layout.expert_devices, f32).forms
      for f32 in (True, False)
    )
  return {
    'gathered layer': gathered,
    'exchange buffers': exchange * (2 if layout.overlapped else 1),
    'logits': logits if has_head else 0.0,
    'recomputed layer': recomputed,
  }
