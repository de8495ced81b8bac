"""FLOP and parameters against traced programs, random shapes and the oracle."""

import math

import hypothesis
import jax
import jax.extend
import pytest
from hypothesis import strategies as st

from dsv3_jax import config
from dsv3_jax.nn import model
from dsv3_jax.planning import flops
from experiments import base
from tests import gradients, settings
from tests.nn import models
from tests.oracles import params as oracle


@st.composite
def shapes(draw):
  """Changes to the tiny configuration that give any small network."""
  size = lambda most: draw(st.integers(1, most))
  layers, groups = size(4), size(3)
  experts = groups * draw(st.integers(2, 4))
  named = {
    'vocab_size': 9 + size(20),
    'd_model': size(12),
    'd_ff': size(12),
    'num_layers': layers,
    'num_dense_layers': draw(st.integers(0, layers)),
    'scan_layers': draw(st.booleans()),
    'mla__num_heads': size(3),
    'mla__q_lora_rank': draw(st.integers(0, 5)),
    'mla__kv_lora_rank': size(6),
    'mla__qk_nope_head_dim': size(5),
    'mla__qk_rope_head_dim': 2 * size(3),
    'mla__v_head_dim': size(6),
    'moe__num_groups': groups,
    'moe__top_groups': 1,
    'moe__num_experts': experts,
    'moe__num_shared_experts': draw(st.integers(0, 2)),
    'moe__top_k': size(experts // groups),
    'moe__d_ff': size(6),
    'mtp__depth': draw(st.integers(0, 2)),
  }
  return {f'model__{name}': value for name, value in named.items()}


@hypothesis.given(shapes())
@hypothesis.settings(max_examples=8)
def test_parts_add_up_to_the_arrays_of_the_model(changes):
  cfg = settings.small(**changes)
  net = model.build(cfg)
  params = model.param_shapes(net)
  router_biases = jax.eval_shape(lambda: model.init_router_biases(cfg.model))
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  total = count(params) + count(router_biases)
  parts = flops.main_parts(cfg.model) + flops.mtp_parts(cfg.model)
  assert sum(part.size for part in parts) == total
  summary = flops.inspect_dict(cfg.model, 12)['parameters']
  assert summary['main'] + summary['mtp_unique'] == total
  copies = 2 * cfg.model.mtp.depth * cfg.model.vocab_size * cfg.model.d_model
  assert summary['mtp_stored'] == summary['mtp_unique'] + copies


@hypothesis.given(shapes(), st.integers(1, 5000))
def test_all_figures_are_the_oracle_s(changes, seq_len):
  cfg = settings.small(**changes).model
  summary = flops.inspect_dict(cfg, seq_len)
  assert summary['parameters'] == oracle.counts(cfg)
  assert summary['kv_bytes_per_token'] == oracle.kv_bytes_per_token(cfg, 2)
  want = oracle.flops_per_token(cfg, seq_len)
  assert summary['flops_per_token'] == pytest.approx(want, rel=1e-12)


@hypothesis.given(shapes())
def test_active_is_what_one_token_passes(changes):
  for part in flops.main_parts(settings.small(**changes).model):
    assert 0 <= part.active <= part.copies
    assert part.active_size * part.copies == part.size * part.active


def test_236b():
  source = base.get_config()
  with source.unlocked():
    m = source.model
    m.update(vocab_size=102400, d_model=5120, d_ff=12288)
    m.update(num_layers=60, num_dense_layers=1)
    m.moe.update(num_experts=160, num_shared_experts=2, top_k=6, d_ff=1536)
    m.moe.top_groups = 3
    m.mtp.depth = 0
    source.data.tokenizer_vocab = 102400
  summary = flops.inspect_dict(config.from_config_dict(source).model, 4096)
  counted = summary['parameters']
  # V2's gate has no bias; ours has 160 values of it in each of 59 layers.
  assert counted['router_bias'] == 59 * 160
  assert counted['main'] - counted['router_bias'] == 235_741_434_880
  assert counted['active'] == 21_375_800_320
  assert counted['active_without_embedding'] == 20_851_512_320
  assert counted['mtp_stored'] == counted['mtp_unique'] == 0
  assert summary['kv_bytes_per_token'] == 69_120
  assert round(summary['flops_per_token']['causal'] / 1e9, 1) == 155.3
  assert summary['flops_per_token']['mtp'] == 0.0


def products(program):
  """FLOP of all matrix products in a traced program and in those it calls."""
  total = 0
  for eqn in program.eqns:
    assert eqn.primitive.name not in ('while', 'cond')  # turns unknown
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      left = eqn.invars[0].aval.shape
      inner = math.prod(left[i] for i in contracted)
      total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    turns = eqn.params.get('length', 1)  # of a scan
    for value in jax.tree.leaves(eqn.params, is_leaf=is_program):
      if is_program(value):
        total += turns * products(getattr(value, 'jaxpr', value))
  return total


def is_program(x):
  return isinstance(x, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


@pytest.mark.parametrize('depth', [0, 1])
def test_a_traced_step_makes_the_products_that_are_counted(depth):
  # Every expert is chosen, in a form that makes no product twice and none in
  # vain, so that what is traced is what a token needs.
  cfg = settings.small(
    model__remat='none',
    model__mtp__depth=depth,
    model__moe__top_k=8,
    model__moe__num_groups=1,
    model__moe__top_groups=1,
    model__moe__product='dense',
    balance__kind='none',
  )
  params, router_biases = map(models.f32, models.random_params(cfg))
  batch, _ = models.make_batch(cfg, ([13], [13]))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  traced = jax.make_jaxpr(models.loss_and_grads(cfg))
  num_products = products(traced(params, router_biases, batch, scales).jaxpr)

  length, m = cfg.data.seq_len, cfg.model.mla
  want = flops.flops_per_token(cfg.model, length, causal=False)
  want += flops.mtp_flops_per_token(cfg.model, length)
  # MTP's attention is counted causal; this one multiplies what it masks.
  pairs = m.num_heads * (m.qk_head_dim + m.v_head_dim) * length
  want += depth * 6 * pairs / 2
  # Counted, as in the published figure, though norms are no products.
  norms = [w.size for path, w in gradients.paths(params) if is_norm(path)]
  want -= 6 * sum(norms)
  # Not counted: gates are spread over experts by a product with 0 and 1,
  # forward and, to the gates alone, backward.
  want += 2 * (2 * 8 * 8) * (cfg.model.num_moe_layers + depth)
  # Nor what attention's backward pass makes again: the scores, and the sums
  # over o do that stand for those over p dp.
  again = 2 * m.num_heads * (m.qk_head_dim * length + m.v_head_dim)
  want += again * (cfg.model.num_layers + depth)
  assert num_products == batch.tokens_BT.size * want


def is_norm(path):
  return path[-1].key.endswith('norm')
