"""The whole model in FP8: forms agree, and nothing is quantised twice."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.checkpoint import fp8_blocks
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.nn import model
from dsv3_jax.training import step as steps
from tests import settings
from tests.nn import models
from tests.oracles import fp8_gemm

# Widths of more than one tile, none of them a multiple of it.
FP8 = {
  'precision': 'fp8',
  'model__num_layers': 2,
  'model__remat': 'none',
  'model__scan_layers': False,
  'model__d_model': 200,
  'model__d_ff': 264,
  'model__mla__q_lora_rank': 136,
  'model__mla__kv_lora_rank': 72,
  'model__mla__qk_nope_head_dim': 40,
  'model__mla__v_head_dim': 48,
  'model__moe__num_experts': 4,
  'model__moe__num_groups': 1,
  'model__moe__top_groups': 1,
  'model__moe__top_k': 2,
  'model__moe__d_ff': 136,
  'model__max_seq_len': 128,
  'model__rope__original_seq_len': 128,
  'data__seq_len': 128,
}
# What is left when a sum in another order moves a number over the border of
# two codes now and then. Forms are compared with f32 between the products: BF16
# would move one number in thirty, by a whole step of FP8.
FLIPS = 1e-4


def in_f32(name):
  """Precisions, of which one has f32 instead of BF16 around its products."""
  policy = precision.POLICIES[name]
  changed = {name: dataclasses.replace(policy, compute='float32')}
  return mock.patch.dict(precision.POLICIES, changed)


@functools.cache
def run(**changes):
  cfg = settings.small(**(FP8 | changes))
  with in_f32(cfg.precision):
    return run_in_f32(cfg, changes)


def run_in_f32(cfg, changes):
  params, router_biases = map(models.f32, models.random_params(cfg))
  if not cfg.model.scan_layers:
    scanned = settings.small(**(FP8 | changes | {'model__scan_layers': True}))
    params = unstacked(models.f32(models.random_params(scanned)[0]))
  params = shrunk(params)
  batch, _ = models.make_batch(cfg, ([129], [60, 69]))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, models.f32(router_biases), batch, scales)
  (total, parts), grads = models.loss_and_grads(cfg)(*args)
  if cfg.model.scan_layers:
    grads = unstacked(grads)
  return float(total), parts, grads


def shrunk(params):
  """Matrices as small as at the start of training, norms as they are."""
  return jax.tree_util.tree_map_with_path(
    lambda path, w: w if path[-1].key.endswith('norm') else 0.2 * w, params
  )


def unstacked(params):
  """Stacks of one layer as unrolled ones."""
  take = lambda stack: {'layer_0': jax.tree.map(lambda w: w[0], stack)}
  names = {'dense_layers', 'moe_layers'} & params.keys()
  return params | {name: take(params[name]['layers']) for name in names}


def differences(got, want):
  """How far the gradients of every leaf are, by its name."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  )
  return {
    jax.tree_util.keystr(path): fp8_gemm.difference(np.ravel(g), np.ravel(w))
    for (path, g), w in pairs
  }


@pytest.mark.nightly
@pytest.mark.parametrize(
  'depth', [0, pytest.param(1, marks=pytest.mark.nightly)]
)
def test_forms_agree(depth):
  total, _, grads = run(model__mtp__depth=depth)
  form = {'model__scan_layers': True, 'model__remat': 'report'}
  got_total, _, got = run(**form, model__mtp__depth=depth)
  assert got_total == pytest.approx(total, rel=1e-5)
  assert max(differences(got, grads).values()) < FLIPS


@pytest.mark.parametrize(
  'changes',
  [
    {'model__num_layers': 1, 'model__mtp__depth': 0},  # one dense layer
    pytest.param({}, marks=pytest.mark.nightly),
  ],
  ids=['dense', 'all'],
)
@pytest.mark.nightly
def test_blockwise_dgrad_is_another_gradient_of_the_same_loss(changes):
  total, _, grads = run(**changes)
  got_total, _, got = run(precision='fp8_block_dgrad', **changes)
  assert got_total == total
  errors = differences(got, grads)
  np.testing.assert_array_equal(got['head']['w'], grads['head']['w'])
  assert max(errors.values()) > FLIPS


def test_weights_are_quantised_once_a_step():
  """No FP8 form of a weight is made inside the loop over micro-batches."""
  cfg = settings.small(**FP8)
  state = steps.state_shapes(cfg)
  shape = (3, 2, cfg.data.seq_len)
  ints = jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = model.Batch(*[ints] * 4, jax.ShapeDtypeStruct(shape, jnp.float32))
  hyper = dict.fromkeys(('lr', 'mtp_weight', 'bias_rate'), 1.0)
  step = steps.make_train_step(cfg)
  jaxpr = jax.make_jaxpr(step)(state, batch, 3, hyper)
  outside, inside = [], []
  collect(jaxpr.jaxpr, outside, inside)
  policy = precision.POLICIES['fp8']
  quantized = jax.eval_shape(
    functools.partial(model.quantize, policy), state['params']
  )
  is_pair = lambda x: isinstance(x, tuple)
  pairs = jax.tree.leaves(quantized, is_leaf=is_pair)
  weights = [pair[1].shape for pair in pairs]
  assert sorted(outside) == sorted(weights)
  assert inside  # activations
  assert not set(inside) & set(weights)


def collect(jaxpr, outside, inside, in_loop=False):
  """Shapes of every cast to e4m3, outside and inside of loops."""
  for eqn in jaxpr.eqns:
    if eqn.params.get('new_dtype') == fp8_blocks.E4M3:
      (inside if in_loop else outside).append(eqn.outvars[0].aval.shape)
    loop = in_loop or eqn.primitive.name in ('while', 'scan')
    for inner in jax.tree.leaves(
      eqn.params, is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        collect(inner, outside, inside, loop)


def test_training_reads_the_weights_that_an_export_holds():
  """The blocks of a step are those of the checkpoint's FP8 layout."""
  cfg = settings.small(**FP8)
  params, _ = map(models.f32, models.random_params(cfg))
  quantize = functools.partial(model.quantize, precision.POLICIES['fp8'])
  forms = jax.jit(quantize)(params)['quantized']
  count = 0
  for tensor in hf_names.table(cfg.model):
    if len(tensor.leaves) > 1 or not tensor.num_in or tensor.copy:
      continue
    leaf = tensor.leaves[0]
    w, ours = params, forms
    for key in leaf.path[1:]:
      w, ours = w[key], ours.get(key, {})
    if not ours:
      continue
    w, (fprop, _) = np.asarray(w[leaf.index]), ours
    # HF keeps [out, in], which is Fprop's orientation.
    out_in = np.moveaxis(w, range(tensor.num_in), range(-tensor.num_in, 0))
    rows = int(np.prod(w.shape[tensor.num_in :]))
    values, scales = fp8_blocks.quantize_host(
      np.ascontiguousarray(out_in.reshape(rows, -1)), tensor.name
    )
    same = lambda a, b: np.testing.assert_array_equal(
      np.asarray(a).view(f'u{b.dtype.itemsize}'),
      b.view(f'u{b.dtype.itemsize}'),
    )
    same(fprop.values[leaf.index], values)
    same(fprop.scales[leaf.index], scales)
    count += 1
  assert count > 20


def test_training_without_quantized_weights_says_what_is_missing():
  cfg = settings.small(**FP8)
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, ([129],))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  net = model.build(cfg, training=True)
  message = (
    r"variables\['quantized'\] lacks dense_layers/layer_0/.*model.quantize"
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda p: net.apply(
        {'params': p}, batch, router_biases, scales, method='loss'
      ),
      params,
    )
