"""Layers split into stages against every partition and the report's model."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax.parallel.schedules import layer_partition
from tests.parallel.schedules import tables

_COST = st.fractions(0, 5, max_denominator=4)


def test_61_layers_over_16_stages():
  """The last stage has one layer, head and MTP: 4.9, the others 4."""
  costs = layer_partition.Costs()
  layer_ranges = layer_partition.split_layers(61, 16, costs)
  assert layer_ranges == (*((i, i + 4) for i in range(0, 60, 4)), (60, 61))
  figures = tables.stage_costs(layer_ranges, costs)
  assert [float(figure) for figure in figures] == [4.0] * 15 + [4.9]
  assert round(float(sum(figures)) / 16, 2) == 4.06


def test_61_layers_alone_differ_by_one():
  layer_ranges = layer_partition.split_layers(
    61, 16, layer_partition.Costs(head=0, mtp=0)
  )
  assert (
    sorted(end - first for first, end in layer_ranges) == [3] * 3 + [4] * 13
  )


def every_partition(layers, num_stages):
  for ends in itertools.combinations(range(1, layers), num_stages - 1):
    yield tuple(itertools.pairwise((0, *ends, layers)))


@hypothesis.given(st.integers(1, 10), st.data(), _COST, _COST, _COST)
def test_no_partition_is_better(layers, data, embedding, head, mtp):
  num_stages = data.draw(st.integers(1, layers))
  costs = layer_partition.Costs(embedding=embedding, head=head, mtp=mtp)

  def rating(layer_ranges):
    per_stage = tables.stage_costs(layer_ranges, costs)
    squares = sum(cost * cost for cost in per_stage)
    later = [first for first, _ in layer_ranges]  # ties: late stages are long
    return max(per_stage), squares, later[::-1]

  stages = layer_partition.split_layers(layers, num_stages, costs)
  assert stages == min(every_partition(layers, num_stages), key=rating)
  assert [first for first, _ in stages[1:]] == [end for _, end in stages[:-1]]


def test_the_embedding_is_on_the_first_stage():
  costs = layer_partition.Costs(embedding=3, head=0, mtp=0)
  layer_ranges = layer_partition.split_layers(5, 2, costs)
  assert layer_ranges == ((0, 1), (1, 5))
  assert tables.stage_costs(layer_ranges, costs) == (4, 4)


@pytest.mark.parametrize(
  ('sizes', 'costs', 'message'),
  [
    ((4, 5), {}, 'stages=5 must be >= 1 and <= num_layers=4'),
    ((4, 0), {}, 'stages=0 must be >= 1'),
    ((4, 2), {'head': -1}, 'cost -1 must be >= 0'),
    ((4, 2), {'mtp': float('nan')}, 'cost nan must be >= 0 and finite'),
  ],
)
def test_bad_input(sizes, costs, message):
  with pytest.raises(ValueError, match=message):
    layer_partition.split_layers(*sizes, layer_partition.Costs(**costs))
