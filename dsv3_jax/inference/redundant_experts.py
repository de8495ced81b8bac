"""Redundant experts, rebalanced while the model runs (TR 3.4).

Redundant experts are replicas of busy experts. A slot is room for one expert on
one device. Steps count how many tokens each expert gets. `rebalance` assigns
experts to slots for that load (`eplb`) and moves weights between slots on the
devices. Which expert is in a slot is an input of the steps, and all shapes stay
the same: nothing is recompiled, and no token changes (`ops.redundant_experts`).
MTP modules have no redundant experts.

Letters: Z expert slots, z those of one device, r = Z - E + 1 slots that an
expert can have at most, P ranks, W devices that have experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config, errors
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.inference import eplb
from dsv3_jax.inference import mesh as inference_mesh

_MATRICES = ('w_gate', 'w_up', 'w_down')
_DECAY = 0.5  # weight of all earlier load when experts are placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedundancyConfig:
  """How many redundant experts there are, and when they are placed.

  redundant: slots beyond one for each expert. every: steps from one rebalance
  to the next; 0: only calls of `ExpertRebalancer.rebalance` do it.
  """

  redundant: int
  every: int = 0


class ExpertRebalancer:
  """The load of a model's experts, and the slots that they are in.

  variables: of the model: parameters, with those of experts by slot, and which
  slots each expert has.
  load_PLE: tokens of each expert since the last rebalance, counted by each
  rank; an input and an output of the steps.
  rebalances: how often experts were placed.
  balancedness: mean load of a device / highest, mean over the layers, of the
  load up to the last rebalance: with the placement before it, and after it.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: inference_mesh.InferenceMesh,
    redundancy: RedundancyConfig,
    params: dict,
  ):
    """Args: params: on their devices; experts are copied into slots.

    Raises:
      InputError: as `check`.
    """
    check(cfg.model, mesh, redundancy)
    self._cfg, self._mesh, self._redundancy = cfg.model, mesh, redundancy
    self._steps = self.rebalances = 0
    self.balancedness: tuple[float, float] | None = None
    shape = (cfg.model.num_moe_layers, cfg.model.moe.num_experts)
    self._no_load = lambda: jnp.zeros((mesh.num_ranks, *shape))
    self._load_LE = np.zeros(shape)
    self.load_PLE = mesh.zeros(self._no_load, inference_mesh.ROWS)
    specs = mesh.params['moe_layers']
    self._names = list(specs)  # the scanned stack, or each of its layers
    lead = (None,) if cfg.model.scan_layers else ()
    slots = sharding.Spec(*lead, sharding.EXPERT_AXES)
    self._moves = {}
    for name in _MATRICES:
      spec = specs[self._names[0]]['moe'][name]
      self._moves[name] = mesh.jit(_move, (spec, slots), spec)
    self._placement = self._place(np.ones(shape))
    self.variables = self._filled(params, self._placement.phy2log)

  def record_step(self, load_PLE: Float[Array, 'P L E']) -> None:
    """Records the load that a step returned; rebalances if it is time."""
    self.load_PLE = load_PLE
    self._steps += 1
    if self._redundancy.every and self._steps % self._redundancy.every == 0:
      self.rebalance()

  def rebalance(self) -> None:
    """Places experts for the load so far; older load counts less."""
    load_LE = np.sum(np.asarray(self.load_PLE, np.float64), axis=0)
    if not np.any(load_LE):  # nothing has run yet, as during a warm-up
      return
    self.load_PLE = self._mesh.zeros(self._no_load, inference_mesh.ROWS)
    self._load_LE = _DECAY * self._load_LE + load_LE
    old, new = self._placement, self._place(self._load_LE)
    first_LE = old.log2phy[:, :, 0]
    source_LZ = np.take_along_axis(first_LE, new.phy2log, axis=1)
    self._placement = new
    self.variables = self._filled(self.variables['params'], source_LZ)
    self.rebalances += 1
    self.balancedness = tuple(
      self._balancedness(load_LE, p.phy2log) for p in (old, new)
    )

  def _place(self, load_LE) -> eplb.Placement:
    """A placement with `log2phy` padded to its largest possible size."""
    spare, moe = self._redundancy.redundant, self._cfg.moe
    sizes = (self._mesh.sizes['node'], self._mesh.num_expert_ranks)
    placement = eplb.rebalance_experts(
      load_LE, moe.num_experts + spare, moe.num_groups, *sizes
    )
    slots_LEr = np.full((*placement.logcnt.shape, 1 + spare), -1, np.int32)
    slots_LEr[:, :, : placement.log2phy.shape[2]] = placement.log2phy
    return placement._replace(log2phy=slots_LEr)

  def _filled(self, params: dict, source_LZ: Int[np.ndarray, 'L Z']) -> dict:
    """Variables whose slots are filled from the given slots, or experts.

    One matrix at a time, so that no more than that exists twice.
    """
    spec = inference_mesh.REPLICATED
    place = lambda x: self._mesh.place(jnp.asarray(x), spec)
    slots, count = self._placement.log2phy, self._placement.logcnt
    stack, redundant_slots = dict(params['moe_layers']), {}
    for i, name in enumerate(self._names):
      at = slice(None) if self._cfg.scan_layers else i
      moe = dict(stack[name]['moe'])
      for matrix, move in self._moves.items():
        moe[matrix] = move(moe[matrix], source_LZ[at])
      stack[name] = stack[name] | {'moe': moe}
      redundant_slots[name] = {
        'moe': {'slots': place(slots[at]), 'count': place(count[at])}
      }
    return {
      'params': params | {'moe_layers': stack},
      'redundant_slots': {'moe_layers': redundant_slots},
    }

  def _balancedness(self, load_LE, phy2log) -> float:
    num_expert_ranks = self._mesh.num_expert_ranks
    load_LW = eplb.loads(load_LE, phy2log, num_expert_ranks)
    return float(np.mean(eplb.balancedness(load_LW)))


def check(
  cfg: config.ModelConfig,
  mesh: inference_mesh.InferenceMesh,
  redundancy: RedundancyConfig,
) -> None:
  """Checks that slots can be spread evenly over the devices with experts.

  Raises:
    InputError: they cannot, a number is negative, or there are no experts.
  """
  spare, num_expert_ranks = redundancy.redundant, mesh.num_expert_ranks
  for name, value in (
    ('redundant_experts', spare),
    ('rebalance_every', redundancy.every),
  ):
    if value < 0:
      raise errors.InputError(f'{name}={value} must be >= 0')
  if not cfg.num_moe_layers:
    raise errors.InputError(
      f'redundant_experts={spare} needs MoE layers, but model.num_dense_layers='
      f'{cfg.num_dense_layers} of model.num_layers={cfg.num_layers}'
    )
  slots = cfg.moe.num_experts + spare
  if slots % num_expert_ranks:
    below = spare - slots % num_expert_ranks
    raise errors.InputError(
      f'redundant_experts={spare} beside model.moe.num_experts='
      f'{cfg.moe.num_experts} must fill a multiple of parallel.node * '
      f'parallel.expert = {num_expert_ranks} slots: {below} or '
      f'{below + num_expert_ranks}'
    )


def _move(
  old: Float[Array, '*L z D F'], source: Int[Array, '*L m']
) -> Float[Array, '*L m D F']:
  """Fills this device's slots from the slots of all devices.

  One all-gather for each of a device's old slots.

  Args:
    source: number of the old slot, among those of all devices.
  """
  if old.ndim == 4:
    return jax.lax.map(lambda pair: _move(*pair), (old, source))
  axes = tuple(a for a in sharding.EXPERT_AXES if collectives.axis_size(a) > 1)
  count = len(old)

  def take(i, new):
    slot_WDF = old[i][None]
    if axes:
      slot_WDF = jax.lax.all_gather(old[i], axes)
    is_source = (source % count == i)[:, None, None]
    return jnp.where(is_source, slot_WDF[source // count], new)

  new = jnp.zeros((len(source), *old.shape[1:]), old.dtype)
  return jax.lax.fori_loop(0, count, take, new)
