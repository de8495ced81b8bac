"""Where a training state is on a mesh, and how a step runs on it.

Two things depend on whether there is a pipeline: the form of the parameters
(`param_layout`) and how gradients of micro-batches are summed
(`accumulation`). `make` chooses both; their callers do not distinguish the two
cases. In both cases masters and moments exist once (`zero`). Checkpoints,
evaluation and sampling see the model's own form only.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from dsv3_jax import config, errors
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel import accumulation, zero
from dsv3_jax.parallel.pipeline import (
  executor,
  instructions,
  param_layout,
  stage_compute,
)
from dsv3_jax.parallel.schedules import layer_partition
from dsv3_jax.parallel.schedules import make as schedules

Tree = Any
Spec = sharding.Spec
# 1 is an MoE layer. Embedding and head cost no stage anything: all ranks share
# them.
COSTS = layer_partition.Costs(head=0, mtp=1.1)


@dataclasses.dataclass(frozen=True)
class StateLayout:
  """Form and placement of a training state, and how its gradients are summed.

  Attributes:
    placed: a `zero.Placement` for every parameter, in the state's form.
    sizes: devices along each mesh axis.
    rules: the sharding rules of `placed`.
  """

  cfg: config.Config
  param_layout: param_layout.ParamLayout
  accumulation: accumulation.Accumulation
  placed: Tree
  sizes: Mapping[str, int]
  rules: sharding.ShardingRules

  @functools.cached_property
  def model_placed(self) -> Tree:
    """Placements in the model's form, on a mesh without a pipeline."""
    if self.sizes['pipe'] == 1:
      return self.placed
    # The mesh is `sharding.without_pipe`.
    data = self.sizes['pipe'] * self.sizes['data']
    sizes = {**self.sizes, 'pipe': 1, 'data': data}
    return zero.model_placements(model.build(self.cfg), sizes)

  def from_model(self, params: Tree, router_biases: Tree) -> tuple[Tree, Tree]:
    """Parameters and router biases in the state's form."""
    layout = self.param_layout
    router_biases = layout.router_biases_from_model(router_biases)
    return layout.from_model(params), router_biases

  def to_model(self, params: Tree, router_biases: Tree) -> tuple[Tree, Tree]:
    """The inverse of `from_model`."""
    layout = self.param_layout
    return layout.to_model(params), layout.router_biases_to_model(router_biases)

  def router_biases_specs(self) -> Tree:
    """Partitions of the router biases in the state's form."""
    router_biases = model.init_router_biases(self.cfg.model)
    return self.param_layout.router_biases_specs(router_biases)


def make(cfg: config.Config, sizes: Mapping[str, int]) -> StateLayout:
  """The layout of an experiment on a mesh with these sizes."""
  net, rules = model.build(cfg), sharding.RULES
  fsdp = tuple(axis for axis in cfg.parallel.fsdp if sizes[axis] > 1)
  rules = dataclasses.replace(rules, fsdp=fsdp)
  if cfg.parallel.deterministic:  # experts are replicated
    rules = dataclasses.replace(rules, experts=None)
  if sizes['pipe'] == 1:
    placed = zero.model_placements(net, sizes, rules)
    return StateLayout(
      cfg,
      param_layout.IdentityLayout(),
      accumulation.SequentialAccumulation(cfg),
      placed,
      sizes,
      rules,
    )
  pipe = make_pipeline(cfg)
  shapes = jax.eval_shape(pipe.layout.from_model, model.param_shapes(net))
  specs = model.param_specs(net, rules, sizes)
  # Embedding and head are sharded over the vocabulary on all ranks. No module
  # all-gathers them, so they are not sharded over `fsdp`.
  replicated = model.param_specs(net)
  specs |= {name: replicated[name] for name in ('embed', 'head')}
  specs = _slot_specs(pipe.layout, specs)
  return StateLayout(
    cfg,
    pipe.layout,
    accumulation.PipelinedAccumulation(
      pipe, functools.partial(_compile_program, pipe)
    ),
    zero.placements(specs, shapes, sizes),
    sizes,
    rules,
  )


def make_pipeline(cfg: config.Config) -> executor.Pipeline:
  """Stages of about equal time, and the table of a full step."""
  train = cfg.train
  if train.batch_ramp_tokens:
    # Raises if the first batch of the ramp does not fit the schedule.
    make_schedule(cfg, train.batch_size_start // train.microbatch_size)
  schedule = make_schedule(cfg, train.batch_size // train.microbatch_size)
  costs = dataclasses.replace(COSTS, mtp=COSTS.mtp * cfg.model.mtp.depth)
  layer_ranges = layer_partition.split_layers(
    cfg.model.num_layers, schedule.stages, costs
  )
  held = instructions.chunks(schedule)
  if len(schedule.homes) > 1:  # two ranks run a stage, one has its master
    held = tuple((rank,) for rank in range(schedule.ranks))
  layout = param_layout.make(cfg.model, layer_ranges, held)
  program = instructions.compile_schedule(schedule, _kinds(layout))
  return executor.Pipeline(cfg, layout, program)


def _compile_program(
  pipe: executor.Pipeline, num_microbatches: int
) -> instructions.PipelineProgram:
  """The program of a step, with the branches of a full one."""
  return instructions.compile_schedule(
    make_schedule(pipe.cfg, num_microbatches),
    _kinds(pipe.layout),
    pipe.program.branches,
  )


def make_schedule(
  cfg: config.Config, num_microbatches: int
) -> schedules.Schedule:
  """The schedule of a step with this number of micro-batches.

  Raises:
    InputError: the schedule does not allow this number of micro-batches or
      ranks.
  """
  kind = cfg.parallel.schedule
  per_rank = schedules.stages_per_rank(kind)
  sizes = {
    'stages': per_rank * cfg.parallel.pipe,
    'microbatches': num_microbatches,
  }
  # A tick lasts as long as its longest action. Split backwards take about as
  # long as forwards; beside a full backward a forward would wait.
  halves = kind in schedules.UNIDIRECTIONAL
  try:
    return schedules.make_schedule(kind, **sizes, split_backward=halves)
  except errors.InputError as error:
    raise errors.InputError(
      f'parallel.pipe={cfg.parallel.pipe} with '
      f'parallel.schedule={kind!r} and {num_microbatches} micro-batches of '
      f'train.microbatch_size={cfg.train.microbatch_size}: {error}'
    ) from error


def _kinds(
  layout: param_layout.PipelineLayout,
) -> tuple[stage_compute.StageKind, ...]:
  last = len(layout.stages) - 1
  return tuple(
    stage_compute.StageKind(
      stage.count('dense'), stage.count('moe'), at == 0, at == last
    )
    for at, stage in enumerate(layout.stages)
  )


def _slot_specs(layout: param_layout.PipelineLayout, specs: Tree) -> Tree:
  """Partitions of the pipeline's form from those of the model's."""
  is_spec = lambda x: isinstance(x, Spec)
  slot_specs = {
    k: v for k, v in specs.items() if k not in param_layout.STACKS.values()
  }
  for stack, name in param_layout.STACKS.items():
    if name not in specs:
      continue
    one = specs[name]['layers' if layout.scanned else 'layer_0']
    lead = 1 if layout.scanned else 0
    put = lambda spec, lead=lead: Spec('pipe', None, None, *spec[lead:])
    slot_specs[stack] = jax.tree.map(put, one, is_leaf=is_spec)
  return slot_specs
