"""Layers split into stages against every partition and the report's model."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax import errors
from dsv3_jax.parallel.pipeline import layer_partition
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


def test_the_largest_stage_comes_first():
  """(1) (5) (2 3) has the smaller maximum, (1 5) (2) (3) smaller squares."""
  costs = layer_partition.Costs(layer=(1, 5, 2, 3), head=0, mtp=0)
  assert layer_partition.split_layers(4, 3, costs) == ((0, 1), (1, 2), (2, 4))


def every_partition(layers, num_stages):
  for ends in itertools.combinations(range(1, layers), num_stages - 1):
    yield tuple(itertools.pairwise((0, *ends, layers)))


@hypothesis.given(
  st.lists(_COST, min_size=1, max_size=8), st.data(), _COST, _COST, _COST
)
def test_no_partition_is_better(layers, data, embedding, head, mtp):
  num_stages = data.draw(st.integers(1, len(layers)))
  costs = layer_partition.Costs(
    layer=tuple(layers), embedding=embedding, head=head, mtp=mtp
  )

  def rating(layer_ranges):
    per_stage = [sum(layers[first:end]) for first, end in layer_ranges]
    per_stage[0] += embedding
    per_stage[-1] += head + mtp
    return max(per_stage), sum(cost * cost for cost in per_stage)

  stages = layer_partition.split_layers(len(layers), num_stages, costs)
  assert rating(stages) == min(
    map(rating, every_partition(len(layers), num_stages))
  )
  assert [first for first, _ in stages[1:]] == [end for _, end in stages[:-1]]


def test_the_embedding_is_on_the_first_stage():
  costs = layer_partition.Costs(embedding=3, head=0, mtp=0)
  layer_ranges = layer_partition.split_layers(5, 2, costs)
  assert layer_ranges == ((0, 1), (1, 5))
  assert tables.stage_costs(layer_ranges, costs) == (4, 4)


@pytest.mark.parametrize(
  ('sizes', 'costs', 'message'),
  [
    ((4, 5), {}, 'stages=5 must be >= 1 and <= model.num_layers=4'),
    ((4, 0), {}, 'stages=0 must be >= 1'),
    ((4, 2), {'layer': (1, 2)}, 'costs.layer has 2 values, model.num_layers=4'),
    ((4, 2), {'head': -1}, 'cost -1 must be >= 0'),
    ((4, 2), {'mtp': float('nan')}, 'cost nan must be >= 0 and finite'),
  ],
)
def test_bad_input(sizes, costs, message):
  with pytest.raises(errors.InputError, match=message):
    layer_partition.split_layers(*sizes, layer_partition.Costs(**costs))
