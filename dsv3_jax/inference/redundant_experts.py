"""Copies of busy experts, placed anew while the model runs (TR 3.4).

Steps count how many tokens each expert got; `rebalance` places experts and
copies for that load (`parallel.expert_balance`) and moves weights between slots
on the devices. Which expert is in a slot is an input of the steps, and every
shape stays as it is: nothing is compiled anew, and no token changes
(`ops.replicas`). MTP modules keep one copy of each expert.

Letters: Z slots, n those of one device, r = Z - E + 1, R ranks, W devices that
have experts.
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
_KEPT = 0.5  # of all load before, in the load that a placement is made for


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedundancyConfig:
  """What is asked for.

  redundant: slots beyond one for each expert. every: steps from one placement
  to the next; 0: only when asked.
  """

  redundant: int
  every: int = 0


class ExpertRebalancer:
  """Of one model: the load of its experts, and where they are.

  variables: parameters, those of experts by slot, and what the model must know
  of slots. load_RLE: tokens of each expert since the last placement, counted by
  each rank; steps take it and give it back. rebalanced: how often.
  balancedness: of the last such load (mean load of a device / highest, mean
  over the layers), with the placement that it met and with the one made then.
  """

  def __init__(
    self,
    cfg: config.Config,
    layout: inference_mesh.InferenceMesh,
    plan: RedundancyConfig,
    params: dict,
  ):
    """Args: params: on their devices; experts are copied into slots.

    Raises:
      InputError: as `check`.
    """
    check(cfg.model, layout, plan)
    self._cfg, self._layout, self._plan = cfg.model, layout, plan
    self._steps = self.rebalanced = 0
    self.balancedness: tuple[float, float] | None = None
    shape = (cfg.model.num_moe_layers, cfg.model.moe.num_experts)
    self._no_load = lambda: jnp.zeros((layout.num_ranks, *shape))
    self._seen_LE = np.zeros(shape)
    self.load_RLE = layout.zeros(self._no_load, inference_mesh.ROWS)
    specs = layout.params['moe_layers']
    self._names = list(specs)  # of one stack, or of each of its layers
    lead = (None,) if cfg.model.scan_layers else ()
    slots = sharding.Spec(*lead, sharding.EXPERT_AXES)
    self._moves = {}
    for name in _MATRICES:
      spec = specs[self._names[0]]['moe'][name]
      self._moves[name] = layout.jit(_move, (spec, slots), spec)
    self._placement = self._place(np.ones(shape))
    self.variables = self._filled(params, self._placement.phy2log)

  def took_step(self, load_RLE: Float[Array, 'R L E']) -> None:
    """Takes the load back; places anew if it is time."""
    self.load_RLE = load_RLE
    self._steps += 1
    if self._plan.every and self._steps % self._plan.every == 0:
      self.rebalance()

  def rebalance(self) -> None:
    """Places experts for the load so far, in which old load counts less."""
    load_LE = np.sum(np.asarray(self.load_RLE, np.float64), axis=0)
    if not np.any(load_LE):  # nothing has run yet, as in a warm-up
      return
    self.load_RLE = self._layout.zeros(self._no_load, inference_mesh.ROWS)
    self._seen_LE = _KEPT * self._seen_LE + load_LE
    old, new = self._placement, self._place(self._seen_LE)
    first_LE = old.log2phy[:, :, 0]
    source_LZ = np.take_along_axis(first_LE, new.phy2log, axis=1)
    self._placement = new
    self.variables = self._filled(self.variables['params'], source_LZ)
    self.rebalanced += 1
    self.balancedness = tuple(
      self._balancedness(load_LE, p.phy2log) for p in (old, new)
    )

  def _place(self, load_LE) -> eplb.Placement:
    """With `log2phy` as large as it can ever be."""
    spare, moe = self._plan.redundant, self._cfg.moe
    sizes = (self._layout.sizes['node'], self._layout.num_holders)
    found = eplb.rebalance_experts(
      load_LE, moe.num_experts + spare, moe.num_groups, *sizes
    )
    slots_LEr = np.full((*found.logcnt.shape, 1 + spare), -1, np.int32)
    slots_LEr[:, :, : found.log2phy.shape[2]] = found.log2phy
    return found._replace(log2phy=slots_LEr)

  def _filled(self, params: dict, source_LZ: Int[np.ndarray, 'L Z']) -> dict:
    """Variables with each slot filled from the slot, or expert, named.

    One matrix at a time, so that no more than that exists twice.
    """
    place = lambda x: self._layout.place(jnp.asarray(x), inference_mesh.WHOLE)
    slots, count = self._placement.log2phy, self._placement.logcnt
    stack, copies = dict(params['moe_layers']), {}
    for i, name in enumerate(self._names):
      at = slice(None) if self._cfg.scan_layers else i
      moe = dict(stack[name]['moe'])
      for matrix, move in self._moves.items():
        moe[matrix] = move(moe[matrix], source_LZ[at])
      stack[name] = stack[name] | {'moe': moe}
      copies[name] = {
        'moe': {'slots': place(slots[at]), 'count': place(count[at])}
      }
    return {
      'params': params | {'moe_layers': stack},
      'redundant_slots': {'moe_layers': copies},
    }

  def _balancedness(self, load_LE, phy2log) -> float:
    holders = self._layout.num_holders
    load_LW = eplb.loads(load_LE, phy2log, holders)
    return float(np.mean(eplb.balancedness(load_LW)))


def check(
  cfg: config.ModelConfig,
  layout: inference_mesh.InferenceMesh,
  plan: RedundancyConfig,
) -> None:
  """Whether slots can be spread evenly over the devices of experts.

  Raises:
    InputError: they cannot, numbers are negative, or there are no experts.
  """
  spare, holders = plan.redundant, layout.num_holders
  for name, value in (
    ('redundant_experts', spare),
    ('rebalance_every', plan.every),
  ):
    if value < 0:
      raise errors.InputError(f'{name}={value} must be >= 0')
  if not cfg.num_moe_layers:
    raise errors.InputError(
      f'redundant_experts={spare} needs MoE layers, but model.num_dense_layers='
      f'{cfg.num_dense_layers} of model.num_layers={cfg.num_layers}'
    )
  slots = cfg.moe.num_experts + spare
  if slots % holders:
    below = spare - slots % holders
    raise errors.InputError(
      f'redundant_experts={spare} beside model.moe.num_experts='
      f'{cfg.moe.num_experts} must fill a multiple of parallel.node * '
      f'parallel.expert = {holders} slots: {below} or {below + holders}'
    )


def _move(
  old: Float[Array, '*L n D F'], source: Int[Array, '*L m']
) -> Float[Array, '*L m D F']:
  """This device's slots from those of all devices, one slot of each at a time.

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
    is_it = (source % count == i)[:, None, None]
    return jnp.where(is_it, slot_WDF[source // count], new)

  new = jnp.zeros((len(source), *old.shape[1:]), old.dtype)
  return jax.lax.fori_loop(0, count, take, new)
