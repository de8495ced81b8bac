"""Traffic of an all-to-all over two tiers of a network (TR 3.2.2)."""

import math

from dsv3_jax import config
from dsv3_jax.planning import chips
from dsv3_jax.planning.device_layout import DeviceLayout


def seconds(
  model: config.ModelConfig,
  chip: chips.Chip,
  layout: DeviceLayout,
  size: float,
  slow_rate: float,
  fast_rate: float,
) -> float:
  """One all-to-all in two hops: the slower tier counts.

  Args:
    size: bytes of one row of every token of a device.
    slow_rate, fast_rate: fractions of the tiers' peaks.
  """
  nodes, per_node = hops(chip, layout)
  reached = nodes_of_a_token(model.moe, nodes)
  slow = size * reached * (nodes - 1) / nodes / (chip.inter * slow_rate)
  devices = nodes * per_node
  copies = devices * (1 - (1 - 1 / devices) ** model.moe.top_k)
  fast = size * copies * (per_node - 1) / per_node
  return max(slow, fast / (chip.intra * fast_rate))


def hops(chip: chips.Chip, layout: DeviceLayout) -> tuple[int, int]:
  """(nodes, devices of a node) that the experts of one layer are on."""
  if layout.expert_devices <= chip.node_size:
    return 1, layout.expert_devices
  per_node = min(layout.expert, chip.node_size)
  return layout.expert_devices // per_node, per_node


def nodes_of_a_token(moe: config.MoeConfig, nodes: int) -> float:
  """Mean number of nodes with a chosen group, groups chosen evenly."""
  if nodes == 1:
    return 1.0
  if nodes > moe.num_groups:
    return nodes * (1 - (1 - 1 / nodes) ** moe.top_k)
  per_node = moe.num_groups // nodes
  missed = math.comb(moe.num_groups - per_node, moe.top_groups)
  return nodes * (1 - missed / math.comb(moe.num_groups, moe.top_groups))
