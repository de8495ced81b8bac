"""Bytes saved for the backward pass: the formula against JAX's residuals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dsv3_jax import config, precision
from dsv3_jax.nn import attention, block, model
from dsv3_jax.planning import memory
from experiments import base

TOKENS = 256


def residuals(cfg, policy, is_moe):
  """Bytes of every array that one layer's backward pass is given, no weights.

  From the jaxpr of the vjp, without running anything.
  """
  m = cfg.model
  context = lambda: attention.make_context(
    m, jnp.arange(TOKENS)[None], jnp.ones((1, TOKENS))
  )
  bias = jnp.zeros(m.moe.num_experts if is_moe else 0)
  x = jax.ShapeDtypeStruct((1, TOKENS, m.d_model), policy.compute)
  fields = (m, cfg.balance)

  def init():
    plain = precision.POLICIES['f32']
    layer = block.Block(*fields, plain, is_moe, False)
    carry = (jnp.zeros(x.shape), None)
    args = (carry, bias, jnp.array(0), context())
    return nn.meta.unbox(layer.init(jax.random.key(0), *args)['params'])

  params = jax.eval_shape(init)
  quantized = jax.eval_shape(lambda p: model.quantize(policy, p), params)
  layer = block.with_remat(m, scanned=True)(*fields, policy, is_moe, False)
  # Shared by all layers, and thus no residual of one: an argument.
  shared = jax.eval_shape(context)

  def backward(params, quantized, x, shared):
    def forward(params, x):
      variables = {'params': params} | quantized
      args = ((x, None), bias, jnp.array(0), shared)
      return layer.apply(variables, *args)[0][0]

    return jax.vjp(forward, params, x)[1]

  args = (params, quantized, x, shared)
  jaxpr = jax.make_jaxpr(backward)(*args).jaxpr
  # By identity: an array that two gradients share is kept once.
  given = set(jaxpr.invars) - {jaxpr.invars[len(jax.tree.leaves(args[:2]))]}
  kept = {v for v in jaxpr.outvars if v not in given}
  size = lambda v: v.aval.size * v.aval.dtype.itemsize
  # Less than a byte a token: indices of the layer, of blocks, counts.
  return sorted(size(v) for v in kept if size(v) >= TOKENS)


@pytest.mark.parametrize('is_moe', [False, True])
@pytest.mark.parametrize('name', ['f32', 'bf16', 'fp8'])
def test_residuals_of_a_whole_layer(name, is_moe):
  """At the 671B's widths; of its 256 experts 16, so that few rows are empty."""
  source = base.get_config()
  with source.unlocked():
    source.precision = name
    source.model.moe.update(num_experts=16, num_groups=4)
  cfg = config.from_config_dict(source)
  policy = precision.POLICIES[name]
  blocks = TOKENS * 8 // 128 + 16
  args = {'is_moe': is_moe, 'expert_rows': blocks * 128 / TOKENS}
  formula = memory.activation_bytes(cfg.model, policy, **args)
  kept = residuals(cfg, policy, is_moe)
  assert sum(kept) == TOKENS * sum(formula.values())
  # FP8's attention output is kept in 12 bits; the sum leaves no room for more.
  wide = TOKENS * 128 * 128 * {'f32': 4, 'bf16': 2, 'fp8': 1.5}[name]
  assert wide in kept


def test_report_of_671b():
  cfg = config.from_config_dict(base.get_config())
  summaries = {
    name: memory.inspect_dict(cfg.model, precision.POLICIES[name])
    for name in ('bf16', 'fp8')
  }
  size = lambda name: summaries[name]['activation_bytes_per_token']['moe_layer']
  assert (size('bf16'), size('fp8')) == (139_904, 96_512)
  weights = {name: t['weight_bytes'] for name, t in summaries.items()}
  stored = 671_026_419_200 + 11_610_068_224
  assert weights['fp8']['master'] == weights['bf16']['master'] == 4 * stored
  # Two bytes a weight either way: BF16, or FP8 in both orientations.
  # The lookup, the gate and the norms read the masters.
  embedding, layers = 129_280 * 7168, 61 + 1
  gates = (layers - 3) * (7168 + 1) * 256
  norms = layers * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
  copied = stored - embedding - gates - norms
  assert weights['bf16']['compute'] == 2 * copied
  ratio = weights['fp8']['compute'] / weights['bf16']['compute']
  assert ratio == pytest.approx(1.0, abs=1e-3)
