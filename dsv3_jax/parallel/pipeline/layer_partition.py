"""Splits layers into stages so that the slowest stage is as fast as possible.

A pipeline runs at the speed of its slowest stage. Layers cost about the same,
but the head costs more than a layer, and an MTP module more than two.
"""

import dataclasses
import fractions
import itertools
import math
from collections.abc import Callable

from dsv3_jax import errors

Cost = int | float | fractions.Fraction
LayerRanges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """Time of each kind of layer, in any unit; by default one MoE layer is 1.

  Attributes:
    layer: one number for all layers, or one for each.
    embedding: added to the first stage.
    head: added to the last stage; 0 if the head is sharded over the stages.
    mtp: added to the last stage, with its own pass through the head.
  """

  layer: Cost | tuple[Cost, ...] = 1
  embedding: Cost = 0
  head: Cost = 1.4
  mtp: Cost = 2.5


def split_layers(num_layers: int, stages: int, costs: Costs) -> LayerRanges:
  """Splits layers into contiguous stages of at least one layer.

  The largest cost of a stage is minimal. Among all such partitions the sum of
  squared costs is minimal. Exact, by dynamic programming over (stage, layer).

  Returns:
    The first layer of each stage and the one after its last.

  Raises:
    InputError: stages < 1, more stages than layers, or costs that are negative,
      not finite, or not one a layer.
  """
  total = _totals(num_layers, stages, costs)
  largest, _ = _best_partition(total, stages, max, None)
  _, ends = _best_partition(
    total, stages, lambda sum_, x: sum_ + x * x, largest
  )
  return tuple(itertools.pairwise((0, *ends)))


def _totals(num_layers: int, stages: int, costs: Costs) -> list[Cost]:
  """Cost of the first 0, 1, ... layers, with embedding, head and MTP."""
  if not 1 <= stages <= num_layers:
    raise errors.InputError(
      f'stages={stages} must be >= 1 and <= '
      f'model.num_layers={num_layers}: each has one layer at least'
    )
  per_layer = costs.layer
  if not isinstance(per_layer, tuple):
    per_layer = (per_layer,) * num_layers
  if len(per_layer) != num_layers:
    raise errors.InputError(
      f'costs.layer has {len(per_layer)} values, model.num_layers={num_layers}'
    )
  for value in (*per_layer, costs.embedding, costs.head, costs.mtp):
    if not (value >= 0 and math.isfinite(value)):
      raise errors.InputError(f'cost {value} must be >= 0 and finite')
  exact = [fractions.Fraction(value) for value in per_layer]
  exact[0] += fractions.Fraction(costs.embedding)
  exact[-1] += fractions.Fraction(costs.head) + fractions.Fraction(costs.mtp)
  return list(itertools.accumulate(exact, initial=fractions.Fraction(0)))


def _best_partition(
  total: list[Cost],
  stages: int,
  join: Callable[[Cost, Cost], Cost],
  bound: Cost | None,
) -> tuple[Cost, list[int]]:
  """The partition with the least joined cost and no stage above the bound.

  Returns:
    That cost, and the layer at which each stage ends.
  """
  best: dict[int, Cost] = {0: 0}  # first layer without a stage -> joined cost
  first_layers = []
  for _ in range(stages):
    options: dict[int, tuple[Cost, int]] = {}
    for first, joined in best.items():
      for end in range(first + 1, len(total)):
        cost = total[end] - total[first]
        if bound is not None and cost > bound:
          break
        option = (join(joined, cost), first)
        if end not in options or option < options[end]:
          options[end] = option
    best = {end: joined for end, (joined, _) in options.items()}
    first_layers.append({end: first for end, (_, first) in options.items()})
  end = len(total) - 1
  joined, ends = best[end], []
  for row in reversed(first_layers):
    ends.append(end)
    end = row[end]
  return joined, ends[::-1]
