"""Layers into slots of ranks and back, to the bit."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.pipeline import param_layout
from tests import settings
from tests.nn import models

LAYER_RANGES = ((0, 2), (2, 3), (3, 6), (6, 7))


def make(layer_ranges=LAYER_RANGES, held=((0,), (1,), (2,), (3,)), **changes):
  changes = {'model__num_dense_layers': 1} | changes
  cfg = settings.small(model__num_layers=layer_ranges[-1][1], **changes)
  return cfg, param_layout.make(cfg.model, layer_ranges, held)


def test_slots_of_an_uneven_cut():
  """One dense layer and six MoE layers over four stages."""
  _, layout = make()
  np.testing.assert_array_equal(
    layout.layers_Pcn('dense')[:, 0], [[0], [-1], [-1], [-1]]
  )
  np.testing.assert_array_equal(
    layout.layers_Pcn('moe')[:, 0],
    [[0, -1, -1], [1, -1, -1], [2, 3, 4], [5, -1, -1]],
  )
  assert [s.count('moe') for s in layout.stages] == [1, 1, 3, 1]


def test_two_ranks_of_a_v_hold_first_and_last():
  _, layout = make(held=((0, 3), (1, 2)))
  np.testing.assert_array_equal(
    layout.layers_Pcn('moe'), [[[0, -1, -1], [5, -1, -1]],
                              [[1, -1, -1], [2, 3, 4]]],
  )  # fmt: skip


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('on_host', [True, False])
def test_there_and_back_is_the_identity(scan, on_host):
  cfg, layout = make(model__scan_layers=scan, held=((0, 3), (1, 2)))
  params, _ = models.random_params(cfg)
  if not on_host:
    params = models.f32(params)
  slots = layout.from_model(params)
  assert slots['moe']['moe']['w_up'].shape[:3] == (2, 2, 3)
  assert slots['embed'] is params['embed']
  back = layout.to_model(slots)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for a, b in zip(*map(jax.tree.leaves, (back, params)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert isinstance(a, np.ndarray) == on_host


def test_both_layouts_follow_the_protocol():
  for layout in (make()[1], param_layout.IdentityLayout()):
    assert isinstance(layout, param_layout.ParamLayout)


def test_the_identity_layout_returns_its_argument():
  layout, tree = param_layout.IdentityLayout(), {'moe': jnp.zeros((2, 3))}
  conversions = (
    layout.from_model,
    layout.to_model,
    layout.router_biases_from_model,
    layout.router_biases_to_model,
    layout.compile(dict, {}),
  )
  assert all(convert(tree) is tree for convert in conversions)
  assert layout.all_loads(tree['moe']) is tree['moe']
  assert layout.router_biases_specs(tree) == {'moe': param_layout.Spec()}


def test_slots_without_a_layer_are_zeros():
  cfg, layout = make()
  slots = layout.from_model(models.random_params(cfg)[0])
  empty = layout.layers_Pcn('moe') < 0
  for leaf in jax.tree.leaves(slots['moe']):
    assert not np.any(leaf[empty]) and np.all(np.any(leaf[~empty]))


@hypothesis.given(st.data())
def test_every_layer_is_in_one_slot(data):
  layer_ranges, end = [], 0
  for _ in range(2 * data.draw(st.integers(1, 4))):
    start, end = end, end + data.draw(st.integers(1, 3))
    layer_ranges.append((start, end))
  stages = data.draw(st.permutations(range(len(layer_ranges))))
  held = [stages[i : i + 2] for i in range(0, len(stages), 2)]
  dense = data.draw(st.integers(0, end - 1))
  cfg = settings.small(model__num_layers=end, model__num_dense_layers=dense)
  layout = param_layout.make(cfg.model, layer_ranges, held)
  for stack, count in (('dense', dense), ('moe', end - dense)):
    x_L = np.arange(count) + 1
    at = layout.layers_Pcn(stack)
    assert sorted(at[at >= 0]) == list(range(count))
    slots = layout.to_slots(stack, x_L) if count else np.zeros(at.shape)
    np.testing.assert_array_equal(slots, at + 1)
    if count:
      np.testing.assert_array_equal(layout.from_slots(stack, slots), x_L)
