"""Cuts of small graphs against all cuts."""

import itertools

import numpy as np
import pytest

from dsv3_jax.parallel.pipeline import min_cut


def cost(edges, side):
  return sum(c for a, b, c in edges if a in side and b not in side)


@pytest.mark.parametrize('seed', range(40))
def test_the_cut_is_the_least_and_its_side_the_smallest(seed):
  rng = np.random.default_rng(seed)
  nodes = ['s', 't', *range(rng.integers(1, 6))]
  pairs = list(itertools.permutations(nodes, 2))
  chosen = rng.random(len(pairs)) < 0.5
  edges = [
    (a, b, int(rng.integers(0, 5)))
    for (a, b), use in zip(pairs, chosen, strict=True)
    if use
  ]
  sides = [
    {'s', *inner}
    for size in range(len(nodes) - 1)
    for inner in itertools.combinations(nodes[2:], size)
  ]
  got = min_cut.source_side(edges, 's', 't')
  least = min(cost(edges, side) for side in sides)
  assert cost(edges, got) == least
  smallest = min(len(side) for side in sides if cost(edges, side) == least)
  assert len(got) == smallest


def test_parallel_and_endless_edges():
  huge = 1 << 62
  edges = [('s', 'a', 3), ('s', 'a', 4), ('a', 'b', huge), ('b', 't', 8)]
  assert min_cut.source_side(edges, 's', 't') == {'s'}
  edges[-1] = ('b', 't', 6)
  assert min_cut.source_side(edges, 's', 't') == {'s', 'a', 'b'}


def test_a_sink_that_nothing_reaches():
  assert min_cut.source_side([('s', 'a', 1)], 's', 't') == {'s', 'a'}
  assert min_cut.source_side([], 's', 't') == {'s'}
