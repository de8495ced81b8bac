"""Splits layers into stages so that the slowest stage is as fast as possible.

A pipeline runs at the speed of its slowest stage. Layers cost about the same,
but the head costs more than a layer, and an MTP module more than two.
"""

import dataclasses
import fractions
import itertools
import math

Cost = int | float | fractions.Fraction
LayerRanges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """Time of what a stage has beside its layers; one MoE layer is 1.

  Attributes:
    embedding: added to the first stage.
    head: added to the last stage; 0 if the head is sharded over the stages.
    mtp: added to the last stage, with its own pass through the head.
  """

  embedding: Cost = 0
  head: Cost = 1.4
  mtp: Cost = 2.5


def split_layers(num_layers: int, stages: int, costs: Costs) -> LayerRanges:
  """Splits layers into contiguous stages of at least one layer.

  Each further layer goes to the cheapest stage, the last of equal ones. As all
  layers cost the same, this minimises the largest cost of a stage and the sum
  of squared costs. Exact: costs are fractions.

  Returns:
    The first layer of each stage and the one after its last.

  Raises:
    ValueError: stages < 1, more stages than layers, or costs that are negative
      or not finite.
  """
  if not 1 <= stages <= num_layers:
    raise ValueError(
      f'stages={stages} must be >= 1 and <= num_layers={num_layers}: each has '
      'one layer at least'
    )
  for value in (costs.embedding, costs.head, costs.mtp):
    if not (value >= 0 and math.isfinite(value)):
      raise ValueError(f'cost {value} must be >= 0 and finite')
  counts = [1] * stages
  per_stage = [fractions.Fraction(1)] * stages
  per_stage[0] += fractions.Fraction(costs.embedding)
  per_stage[-1] += fractions.Fraction(costs.head)
  per_stage[-1] += fractions.Fraction(costs.mtp)
  for _ in range(num_layers - stages):
    stage = min(range(stages), key=lambda at: (per_stage[at], -at))
    counts[stage] += 1
    per_stage[stage] += 1
  return tuple(itertools.pairwise(itertools.accumulate(counts, initial=0)))
