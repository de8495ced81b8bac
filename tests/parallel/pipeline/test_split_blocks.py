"""Real blocks in two parts: gradients, and what lands in which part."""

import functools
import math

import jax
import pytest

from tests import nightly
from tests.parallel.pipeline import stages

CASES = {
  'dense f32': {'precision': 'f32'},
  'mtp f32': {'precision': 'f32', 'ahead': True},
  'moe bf16': {'precision': 'bf16', 'is_moe': True, 'model__remat': 'report'},
  'moe fp8': {'precision': 'fp8', 'is_moe': True},
}


@functools.cache
def parts_of(case):
  changes = {'model__remat': 'none', 'model__scan_layers': False} | CASES[case]
  stage, args = stages.block_stage(**changes)
  whole = case == 'dense f32'  # the others compile long enough
  parts = stages.assert_is_vjp(stage, args, stages.own_params, whole)
  return parts, args


@pytest.mark.parametrize('case', nightly.daily(CASES, 'dense f32', 'moe fp8'))
def test_gradients_are_those_of_vjp(case):
  parts_of(case)


def test_all_weight_gradients_of_a_dense_block_are_in_w():
  parts, (variables, *_) = parts_of('dense f32')
  matrices = [w.size for w in jax.tree.leaves(variables) if w.ndim > 1]
  tokens = 2 * stages.LENGTH
  wanted = 2 * tokens * sum(matrices)
  assert stages.product_flops(parts, 'backward_weight') == wanted


@pytest.mark.parametrize('case', ['mtp f32', 'moe bf16'])
def test_experts_have_a_loop_in_either_part(case):
  parts, (variables, *_) = parts_of(case)
  inner = variables['params'].get('block', variables['params'])
  shape = inner['moe']['w_down'].shape
  for part, count in ('backward_input', 0), ('backward_weight', 1):
    loops = [
      [var.aval.shape for var in eqn.outvars]
      for eqn in parts.programs[part].jaxpr.eqns
      if eqn.primitive.name == 'while'
    ]
    assert [shapes.count(shape) for shapes in loops] == [count]


def test_experts_in_fp8_have_three_products_in_w():
  parts, _ = parts_of('moe fp8')
  loops = [stages.names(parts, part).count('while') for part in parts.programs]
  # Forward: gate, up, down. I: their Dgrad. W: their Wgrad. B: both.
  assert dict(zip(parts.programs, loops, strict=True)) == {
    'forward': 3,
    'backward_input': 3,
    'backward_weight': 3,
    'backward': 6,
  }


def test_fp8_waits_in_fp8():
  parts, _ = parts_of('moe fp8')
  size = lambda s: math.prod(s.shape) * s.dtype.itemsize
  large = [s for s in parts.carry if math.prod(s.shape) >= 1024]
  eight = [s for s in large if s.dtype.itemsize == 1]
  assert sum(map(size, eight)) > 0.8 * sum(map(size, large))
