"""Parameters: published counts, initialisation, logical axes, named scopes."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import latent_cache, model
from experiments import v3_16b, v3_671b
from tests import gradients, settings
from tests.nn import models
from tests.oracles import params as oracle


def shapes_of(cfg):
  """Shapes of parameters and of router biases; nothing is allocated."""
  net, key = model.build(cfg), jax.random.key(0)
  params = jax.eval_shape(lambda: model.init_params(net, key))
  return params, jax.eval_shape(lambda: model.init_router_biases(cfg.model))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counts_of(cfg):
  params, router_biases = shapes_of(cfg)
  names = [name for name in params if name.startswith('mtp_')]
  modules = {name: params.pop(name) for name in names}
  return {
    'main': count(params),
    'main_bias': count(router_biases.get('moe', {})),
    'mtp': count(modules),
    'mtp_bias': count(router_biases.get('mtp', {})),
  }


def test_671b_has_the_published_number_of_parameters():
  # The checkpoint counts a router's bias as a parameter; here it is state.
  got = counts_of(config.from_config_dict(v3_671b.get_config()))
  assert got['main_bias'] == 58 * 256 == 14_848
  assert got['main'] + got['main_bias'] == 671_026_419_200
  assert got['mtp_bias'] == 256
  assert got['mtp'] + got['mtp_bias'] == 11_610_068_224


def test_16b_has_the_published_number_of_parameters():
  # V2-Lite's softmax gate has no bias, so the published number has none. Ours
  # balances by bias: 64 values in each of 26 MoE layers come on top.
  got = counts_of(config.from_config_dict(v3_16b.get_config()))
  assert got['main'] == 15_706_484_224
  assert got['main_bias'] == 26 * 64


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'model__mla__q_lora_rank': 0, 'model__num_dense_layers': 0},
    {'model__moe__num_shared_experts': 0, 'model__mtp__depth': 2},
    {'model__moe__num_shared_experts': 3, 'model__num_dense_layers': 2},
    {'model__scan_layers': False, 'model__mtp__depth': 0},
  ],
)
def test_counts_match_the_oracle(changes):
  cfg = settings.small(**changes)
  got, want = counts_of(cfg), oracle.counts(cfg.model)
  assert got['main'] + got['main_bias'] == want['main']
  assert got['main_bias'] == want['router_bias']
  assert got['mtp'] + got['mtp_bias'] == want['mtp_unique']


@functools.cache
def initial(seed):
  """Parameters of a small bf16 model as they start."""
  cfg = settings.small(
    model__init_std=0.006,
    model__d_model=32,
    model__vocab_size=512,
    precision='bf16',
  )
  net = model.build(cfg)
  return jax.jit(lambda key: model.init_params(net, key))(jax.random.key(seed))


def test_matrices_start_normal_with_the_published_std_and_norms_at_1():
  matrices = []
  for path, w in gradients.paths(initial(7)):
    assert w.dtype == jnp.float32, path
    if 'norm' in path[-1].key:
      np.testing.assert_array_equal(w, 1.0, str(path))
      continue
    matrices.append(np.ravel(w))
    # Four sigmas: of the mean, and of the std of n normal draws.
    assert abs(np.mean(w)) < 4 * 0.006 / math.sqrt(w.size), path
    assert abs(np.std(w) / 0.006 - 1) < 4 / math.sqrt(2 * w.size), path
  everything = np.concatenate(matrices)
  assert np.std(everything) == pytest.approx(0.006, rel=0.01)
  kurtosis = np.mean(everything**4) / np.std(everything) ** 4
  assert kurtosis == pytest.approx(3.0, abs=0.1)
  # No two draws alike: each layer and each matrix has a key of its own.
  assert len(np.unique(everything)) > 0.99 * everything.size


def test_init_depends_on_the_key():
  same, other = initial(7)['embed']['w'], initial(8)['embed']['w']
  assert not np.any(same == other)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('rank', [0, 6])
def test_every_parameter_names_its_axes_and_has_a_spec(scan, rank):
  cfg = settings.small(model__scan_layers=scan, model__mla__q_lora_rank=rank)
  net = model.build(cfg)
  batch, _ = models.make_batch(cfg, [[13]])
  router_biases = model.init_router_biases(cfg.model)
  key = jax.random.key(0)
  boxed = jax.eval_shape(lambda: net.init(key, batch, router_biases))['params']
  is_boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
  for box in jax.tree.leaves(boxed, is_leaf=is_boxed):
    assert is_boxed(box)
    assert len(box.names) == box.value.ndim
    assert any(box.names)
  params, _ = shapes_of(cfg)
  specs = model.param_specs(net)
  is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
  assert jax.tree.structure(params) == jax.tree.structure(
    specs, is_leaf=is_spec
  )
  # Experts are sharded over their axes, the vocabulary over a pipeline's ranks.
  assert specs['embed']['w'] == jax.sharding.PartitionSpec('pipe', None)
  sharded = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if any(s)]
  experts = [s for s in sharded if ('node', 'expert') in s]
  assert len(sharded) == len(experts) + 2


def test_rules_reach_the_specs_of_scanned_parameters():
  net = model.build(settings.small())
  rules = sharding.ShardingRules(
    experts=('node', 'expert'), vocab='pipe', layers='data', heads='model'
  )
  specs, spec = model.param_specs(net, rules), jax.sharding.PartitionSpec
  layers = specs['moe_layers']['layers']
  experts = ('node', 'expert')
  assert layers['moe']['w_up'] == spec('data', experts, None, None)
  assert layers['moe']['w_router'] == spec('data', None, None)
  assert layers['attention']['w_o'] == spec('data', 'model', None, None)
  assert layers['attention_norm']['norm'] == spec('data', None)
  assert specs['embed']['w'] == spec('pipe', None)
  assert specs['head']['w'] == spec(None, 'pipe')
  assert specs['mtp_0']['block']['moe']['w_up'] == spec(experts, None, None)


def test_rules_that_use_an_axis_twice_are_refused():
  net = model.build(settings.small())
  rules = sharding.ShardingRules(embed='data', ffn='data')
  with pytest.raises(ValueError, match="'data' would shard two dims"):
    model.param_specs(net, rules)


def scopes(lowered):
  """Names between slashes of all locations in a lowered program."""
  text = lowered.as_text(debug_info=True)
  return set(re.findall(r'[^/"]+', '/'.join(re.findall(r'"[^"]*"', text))))


def test_the_paper_s_steps_are_named_scopes():
  cfg = settings.small()
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, [[13]])
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, router_biases, batch, scales)
  names = scopes(models.forward_and_loss(cfg).lower(*args))
  wanted = {'embed', 'q_proj', 'kv_down', 'kv_up', 'attention', 'rope'}
  wanted |= {'attention_out', 'rms_norm', 'gate', 'experts', 'swiglu', 'mtp'}
  wanted |= {'shared_experts', 'balance_loss', 'head'}
  assert not wanted - names


def test_the_absorbed_form_is_a_named_scope():
  cfg = settings.small()
  net = model.build(cfg, absorbed=True)
  params, router_biases = map(models.f32, models.random_params(cfg))
  args = (1, 64, jnp.float32)
  make = lambda n: latent_cache.empty_cache(cfg.model, n, *args, fp8=False)
  caches = model.Caches(make(1), make(2))
  zeros = jnp.zeros((1, 1), jnp.int32)
  run = lambda p: net.apply(
    {'params': p},
    *(zeros, zeros, zeros, zeros, router_biases, caches),
    method='forward_cached',
  )
  names = scopes(jax.jit(run).lower(params))
  assert {'attention_absorbed', 'q_proj', 'kv_down'} <= names
  assert 'kv_up' not in names
