"""Which GPU holds which expert, from the load of each expert (TR 3.4).

In inference busy experts are replicated (redundant experts), so that no GPU
waits long for another. A slot is room for one expert on one GPU. Slots are
numbered node by node, and within a node GPU by GPU. `rebalance_experts` fills
them as the released load balancer (EPLB) does:

  1. groups of experts go to nodes, by the load of a group
  2. each node fills its spare slots, one by one, with another replica of the
     expert whose replicas have the highest load each
  3. the replicas of a node go to its GPUs, by the load of a replica

Steps 1 and 3 pack equally many items into each of several packs. Items are
taken in the order of falling load; each goes to the lightest pack with room. If
the number of groups is not a multiple of the number of nodes (the global
policy, as in decoding), step 1 is left out and the other two treat all GPUs as
one node.

Quality: step 2 minimises the highest load of a replica. In step 3 the loads of
a node's GPUs differ by at most the difference between its highest and its
lowest replica. With two slots a GPU the highest load is the lowest possible for
these replicas. With more slots a better packing may exist; without redundant
experts even the plain placement can be better. Replicas of one expert may share
a GPU if loads say so, and must if there are more of them than GPUs on the node.

Ties go to the lower index. A layer's placement depends on its own loads only,
not on their unit (for powers of two: to the bit). Letters: Z expert slots, W
GPUs (packs; in step 1 nodes); B independent problems, as the nodes of all
layers, with e experts and z slots each.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int


class Placement(NamedTuple):
  """Experts of slots and slots of experts; all int32.

  phy2log [L, Z]: the expert in each slot. log2phy [L, E, most]: the slots of
  each expert, in the order in which step 2 adds replicas; -1 behind them.
  logcnt [L, E]: how many slots it has; their maximum is `most`.
  """

  phy2log: Int[np.ndarray, 'L Z']
  log2phy: Int[np.ndarray, 'L E most']
  logcnt: Int[np.ndarray, 'L E']


def rebalance_experts(
  weight_LE: npt.ArrayLike,
  num_replicas: int,
  num_groups: int,
  num_nodes: int,
  num_gpus: int,
) -> Placement:
  """Places experts and replicas of busy ones, each layer by itself (EPLB).

  Args:
    weight_LE: load of each expert in any unit, such as tokens.
    num_replicas: slots on all GPUs together.
    num_groups: of consecutive experts (TR 2.1.2). If it is a multiple of
      num_nodes, all replicas of a group are on one node.

  Raises:
    ValueError: loads are no matrix of finite numbers >= 0; num_gpus is not
      a multiple of num_nodes, num_groups does not divide the experts, or
      num_replicas is not a multiple of num_gpus or less than the experts.
  """
  weight_LE = _check_weights(weight_LE)
  layers, experts = weight_LE.shape
  _check_sizes(experts, num_replicas, num_groups, num_nodes, num_gpus)
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  weight_LE = _relative(weight_LE)
  expert_LE = _by_node(weight_LE, num_groups, num_nodes)
  # From here on experts are numbered within their node.
  weight_LE = np.take_along_axis(weight_LE, expert_LE, axis=1)
  weight_Be = weight_LE.reshape(layers * num_nodes, -1)
  slot_expert_Bz, replica_Bz, count_Be = _replicate(
    weight_Be, num_replicas // num_nodes
  )
  slot_load_Bz = np.take_along_axis(
    weight_Be / count_Be, slot_expert_Bz, axis=1
  )
  order_Bz = _pack(slot_load_Bz, num_gpus // num_nodes)
  placed_Bz = np.take_along_axis(slot_expert_Bz, order_Bz, axis=1)
  replica_Bz = np.take_along_axis(replica_Bz, order_Bz, axis=1)
  # Back to the numbers of the model.
  expert_Be = expert_LE.reshape(weight_Be.shape)
  expert_Bz = np.take_along_axis(expert_Be, placed_Bz, axis=1)
  phy2log = expert_Bz.reshape(layers, num_replicas).astype(np.int32)
  replica_LZ = replica_Bz.reshape(layers, num_replicas)
  logcnt = np.empty((layers, experts), np.int32)
  np.put_along_axis(logcnt, expert_LE, count_Be.reshape(layers, experts), 1)
  log2phy = np.full((layers, experts, np.max(logcnt)), -1, np.int32)
  layer_L1 = np.arange(layers)[:, None]
  log2phy[layer_L1, phy2log, replica_LZ] = np.arange(num_replicas)
  return Placement(phy2log, log2phy, logcnt)


def loads(
  weight_LE: npt.ArrayLike, phy2log: Int[np.ndarray, 'L Z'], num_gpus: int
) -> Float[np.ndarray, 'L W']:
  """Load of each GPU if the replicas of an expert share its load equally.

  Args:
    weight_LE: as in `rebalance_experts`; each layer has a finite sum.
    phy2log: any placement; without redundant experts arange(E) in a layer.

  Returns:
    float64, in the unit of weight_LE.

  Raises:
    ValueError: wrong weights; not one row of slots a layer, equally many for
      each GPU; a slot's expert does not exist; an expert has no slot.
  """
  weight_LE = _check_weights(weight_LE)
  layers, experts = weight_LE.shape
  with np.errstate(over='ignore'):
    total_L = np.sum(weight_LE, axis=1)
  if not np.all(np.isfinite(total_L)):
    layer = np.argmin(np.isfinite(total_L))
    raise ValueError(f'weight_LE[{layer}] must have a finite sum')
  slots = phy2log.shape[1]
  if len(phy2log) != layers:
    raise ValueError(
      f'phy2log has {len(phy2log)} layers, weight_LE has {layers}'
    )
  _check_positive('num_gpus', num_gpus)
  if not slots or slots % num_gpus:
    raise ValueError(
      f'phy2log has {slots} slots, not a multiple of num_gpus = {num_gpus}'
    )
  if np.min(phy2log) < 0 or np.max(phy2log) >= experts:
    raise ValueError(
      f'phy2log must be in [0, {experts}), the experts of weight_LE'
    )
  layer_L1 = np.arange(layers)[:, None]
  count_LE = np.zeros((layers, experts), np.int64)
  np.add.at(count_LE, (layer_L1, phy2log), 1)
  if not np.all(count_LE):
    layer, expert = np.argwhere(count_LE == 0)[0]
    raise ValueError(f'phy2log[{layer}] must have a slot for expert {expert}')
  slot_load_LZ = np.take_along_axis(weight_LE / count_LE, phy2log, axis=1)
  return np.sum(slot_load_LZ.reshape(layers, num_gpus, -1), axis=2)


def balancedness(load_LW: Float[np.ndarray, 'L W']) -> Float[np.ndarray, 'L']:
  """Mean load of a GPU / highest load, in (0, 1]; 1 where there is none.

  A layer takes as long as its busiest GPU. This is the share of that time in
  which the average GPU has work.
  """
  most_L = np.max(load_LW, axis=1)
  mean_L = np.minimum(np.mean(load_LW, axis=1), most_L)  # above it by rounding
  return np.divide(mean_L, most_L, out=np.ones_like(mean_L), where=most_L > 0)


def _by_node(weight_LE, num_groups, num_nodes):
  """The experts node by node, [L, E]; those of a group (g) stay together."""
  weight_LGg = weight_LE.reshape(len(weight_LE), num_groups, -1)
  group_LG = _pack(np.sum(weight_LGg, axis=2), num_nodes)
  size = weight_LGg.shape[2]
  expert_LGg = group_LG[:, :, None] * size + np.arange(size)
  return expert_LGg.reshape(weight_LE.shape)


def _pack(weight_BZ, num_packs):
  """The items pack by pack, [B, Z]: equally many in each, of similar weight."""
  rows, items = weight_BZ.shape
  room = items // num_packs
  if room == 1:
    return np.tile(np.arange(items), (rows, 1))
  row_B = np.arange(rows)
  load_BW = np.zeros((rows, num_packs))
  filled_BW = np.zeros((rows, num_packs), np.int64)
  order_BZ = np.empty((rows, items), np.int64)
  for item_B in np.argsort(-weight_BZ, axis=1, kind='stable').T:
    open_BW = np.where(filled_BW < room, load_BW, np.inf)
    pack_B = np.argmin(open_BW, axis=1)
    at = row_B, pack_B
    order_BZ[row_B, pack_B * room + filled_BW[at]] = item_B
    load_BW[at] += weight_BZ[row_B, item_B]
    filled_BW[at] += 1
  return order_BZ


def _replicate(weight_BE, slots):
  """Each expert once, then replicas of the highest load a replica.

  Returns, for each slot, its expert and its number among the expert's replicas
  [B, slots]; and the number of replicas of each expert [B, E].
  """
  rows, experts = weight_BE.shape
  row_B = np.arange(rows)
  expert_BZ = np.tile(np.arange(slots), (rows, 1))
  replica_BZ = np.zeros((rows, slots), np.int64)
  count_BE = np.ones((rows, experts), np.int64)
  for slot in range(experts, slots):
    expert_B = np.argmax(weight_BE / count_BE, axis=1)
    expert_BZ[:, slot] = expert_B
    replica_BZ[:, slot] = count_BE[row_B, expert_B]
    count_BE[row_B, expert_B] += 1
  return expert_BZ, replica_BZ, count_BE


def _relative(weight_LE):
  """Scales each layer by a power of two to below 1: no sum overflows."""
  _, exponent_L1 = np.frexp(np.max(weight_LE, axis=1, keepdims=True))
  return np.ldexp(weight_LE, -exponent_L1)


def _check_weights(weight_LE):
  """The loads as float64; raises unless they are finite and >= 0."""
  weight_LE = np.asarray(weight_LE)
  shape, kind = weight_LE.shape, weight_LE.dtype.kind
  if kind not in 'iuf' or len(shape) != 2 or not weight_LE.size:
    raise ValueError(
      f'weight_LE is {weight_LE.dtype} {list(shape)}, it must be numbers '
      '[layers, experts], one or more of each'
    )
  wrong_LE = ~(np.isfinite(weight_LE) & (weight_LE >= 0))
  if np.any(wrong_LE):
    layer, expert = np.argwhere(wrong_LE)[0]
    raise ValueError(
      f'weight_LE[{layer}, {expert}]={weight_LE[layer, expert]} must be finite '
      'and >= 0'
    )
  return weight_LE.astype(np.float64)


def _check_sizes(experts, num_replicas, num_groups, num_nodes, num_gpus):
  _check_positive('num_nodes', num_nodes)
  _check_multiple(
    'num_gpus', num_gpus, num_nodes, f'a multiple of num_nodes = {num_nodes}'
  )
  if num_groups < 1 or experts % num_groups:
    legal = [n for n in range(1, experts + 1) if experts % n == 0]
    below = [n for n in legal if n < num_groups][-1:]
    near = below + [n for n in legal if n > num_groups][:1]
    raise ValueError(
      f'num_groups={num_groups} must divide the {experts} experts: '
      f'{_nearest(near)}'
    )
  rule = f'a multiple of num_gpus = {num_gpus} and >= the {experts} experts'
  _check_multiple('num_replicas', num_replicas, num_gpus, rule, experts)


def _check_positive(name, value):
  if value < 1:
    raise ValueError(f'{name}={value} must be >= 1')


def _check_multiple(name, value, step, rule, least=1):
  """Raises unless `value` is a multiple of `step` and at least `least`."""
  if value >= least and value % step == 0:
    return
  first = -(-least // step) * step
  below = value - value % step
  near = [below, below + step] if below >= first else [first]
  raise ValueError(f'{name}={value} must be {rule}: {_nearest(near)}')


def _nearest(legal):
  values = ' and '.join(map(str, legal))
  return f'{values} {"are" if len(legal) > 1 else "is"} the nearest'
