"""How one training step is spread over a mesh.

Without a pipeline the state has the model's own form; with one its layers lie
by rank and slot (`layout`), and a step is told what to do by a schedule's table
(`program`). Either way masters and moments exist once (`zero`). Checkpoints,
evaluation and sampling see the model's form only.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel import zero
from dsv3_jax.parallel.pipeline import (
  executor,
  instructions,
  layer_partition,
  param_layout,
  stage_compute,
)
from dsv3_jax.parallel.schedules import make as schedules

Tree = Any
Spec = sharding.Spec
# In MoE layers; embedding and head are shared out over all ranks.
COSTS = layer_partition.Costs(head=0, mtp=1.1)


@dataclasses.dataclass(frozen=True)
class StateLayout:
  """The placement of a model; `pipe` is None without a pipeline.

  placed: a `zero.Placement` for every parameter, in the state's form. rules:
  by which these were made.
  """

  cfg: config.Config
  pipe: executor.Pipeline | None
  placed: Tree
  rules: sharding.ShardingRules

  def from_model(self, params: Tree, router: Tree) -> tuple[Tree, Tree]:
    """Parameters and router biases in the state's form."""
    if self.pipe is None:
      return params, router
    layout = self.pipe.layout
    if 'moe' in router:
      router = router | {'moe': layout.to_slots('moe', router['moe'])}
    return layout.from_model(params), router

  def to_model(self, params: Tree, router: Tree) -> tuple[Tree, Tree]:
    """The inverse of `from_model`."""
    if self.pipe is None:
      return params, router
    layout = self.pipe.layout
    if 'moe' in router:
      router = router | {'moe': layout.from_slots('moe', router['moe'])}
    return layout.to_model(params), router

  def router_specs(self) -> Tree:
    """Biases are everywhere, of a pipeline where their layers are."""
    specs = {k: Spec() for k in model.init_router(self.cfg.model)}
    if self.pipe is not None and 'moe' in specs:
      specs['moe'] = Spec('pipe')
    return specs

  def amount(self, num_micro: int) -> Any:
    """What a step is told of its number of micro-batches."""
    if self.pipe is None:
      return jnp.int32(num_micro)
    return _table(self.pipe, num_micro)

  def amount_specs(self) -> Any:
    """How it is cut over the mesh."""
    if self.pipe is None:
      return Spec()
    return executor.InstructionTable(Spec(None, 'pipe'), Spec(), Spec())

  def in_use(self, amount: Any, count: int) -> jax.Array:
    """Which of `count` micro-batches the step uses."""
    if self.pipe is None:
      return jnp.arange(count) < amount
    return jnp.arange(count) < amount.counts[1]


def make(cfg: config.Config, sizes: Mapping[str, int]) -> StateLayout:
  """The plan of an experiment on a mesh with these sizes."""
  net, rules = model.build(cfg), sharding.RULES
  fsdp = tuple(axis for axis in cfg.parallel.fsdp if sizes[axis] > 1)
  rules = dataclasses.replace(rules, fsdp=fsdp)
  if cfg.parallel.deterministic:  # whole experts see whole sequences
    rules = dataclasses.replace(rules, experts=None)
  if sizes['pipe'] == 1:
    return StateLayout(
      cfg, None, zero.model_placements(net, sizes, rules), rules
    )
  pipe = make_pipeline(cfg)
  shapes = jax.eval_shape(pipe.layout.from_model, model.param_shapes(net))
  specs = model.param_specs(net, rules, sizes)
  # All ranks share the work of both ends, which no module does.
  whole = model.param_specs(net)
  specs |= {name: whole[name] for name in ('embed', 'head')}
  specs = _slot_specs(pipe.layout, specs)
  return StateLayout(cfg, pipe, zero.placements(specs, shapes, sizes), rules)


def make_pipeline(cfg: config.Config) -> executor.Pipeline:
  """Stages of about equal time, and the table of a full step."""
  train = cfg.train
  if train.batch_ramp_tokens:
    # or raises
    make_schedule(cfg, train.batch_size_start // train.microbatch_size)
  found = make_schedule(cfg, train.batch_size // train.microbatch_size)
  costs = dataclasses.replace(COSTS, mtp=COSTS.mtp * cfg.model.mtp.depth)
  cuts = layer_partition.split_layers(cfg.model.num_layers, found.stages, costs)
  held = instructions.chunks(found)
  if len(found.homes) > 1:  # one master each
    held = tuple((rank,) for rank in range(found.ranks))
  layout = param_layout.make(cfg.model, cuts, held)
  made = instructions.compile_schedule(found, _kinds(layout))
  return executor.Pipeline(cfg, layout, made)


def make_schedule(cfg: config.Config, num_micro: int) -> schedules.Schedule:
  """The schedule of a step of so many micro-batches.

  Raises:
    InputError: the schedule is not for so many, or not for so many ranks.
  """
  kind = cfg.parallel.schedule
  each = schedules.stages_per_rank(kind)
  sizes = {'stages': each * cfg.parallel.pipe, 'microbatches': num_micro}
  # In ticks a forward beside a whole backward would wait for half of it.
  halves = kind in schedules.UNIDIRECTIONAL
  try:
    return schedules.make_schedule(kind, **sizes, split_backward=halves)
  except errors.InputError as error:
    raise errors.InputError(
      f'parallel.pipe={cfg.parallel.pipe} with '
      f'parallel.schedule={kind!r} and {num_micro} micro-batches of '
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
  """Partitions of slots from those of the model's parameters."""
  is_spec = lambda x: isinstance(x, Spec)
  found = {
    k: v for k, v in specs.items() if k not in param_layout.STACKS.values()
  }
  for stack, name in param_layout.STACKS.items():
    if name not in specs:
      continue
    one = specs[name]['layers' if layout.scanned else 'layer_0']
    cut = 1 if layout.scanned else 0
    put = lambda spec, cut=cut: Spec('pipe', None, None, *spec[cut:])
    found[stack] = jax.tree.map(put, one, is_leaf=is_spec)
  return found


@functools.lru_cache(maxsize=256)
def _table(
  pipe: executor.Pipeline, num_micro: int
) -> executor.InstructionTable:
  """The arrays of a step, as long as those of the longest."""
  full = pipe.program
  made = instructions.compile_schedule(
    make_schedule(pipe.cfg, num_micro), _kinds(pipe.layout), full.branches
  )
  assert made.branches == full.branches and made.transfers == full.transfers
  assert all(made.slots[k] <= full.slots[k] for k in made.slots)
  ticks, most = len(made.fields_tick_rank), len(full.fields_tick_rank)
  pad = lambda x: np.pad(x, [(0, most - ticks)] + [(0, 0)] * (x.ndim - 1))
  return executor.InstructionTable(
    jnp.asarray(pad(made.fields_tick_rank)),
    jnp.asarray(pad(made.globals_tick_direction)),
    jnp.array([ticks, num_micro], jnp.int32),
  )
