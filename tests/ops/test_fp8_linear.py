"""FP8 Linear, SwiGLU and experts, and attention's 12-bit output: the oracles.

Every product, forward and backward, is held to float64 with the same roundings
at the same places; what is left is the order of f32 sums, and rarely a value
that lies on the border of two codes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import attention, fp8_linear, linear
from dsv3_jax.ops import experts as expert_ops
from pallas_kernels.fp8_matmul import e5m6, reference
from tests import tolerances
from tests.oracles import fp8_formats as formats
from tests.oracles import fp8_gemm, fp8_layers, fp8_ops

POLICY = precision.POLICIES['fp8']
BLOCKWISE = precision.POLICIES['fp8_block_dgrad']
FLOOR = formats.Scaling(floor=precision.ACTIVATION_FLOOR)
POW2 = formats.Scaling(pow2=True)
POW2_FLOOR = formats.Scaling(pow2=True, floor=precision.ACTIVATION_FLOOR)
# Outputs of products are BF16: half a step at the largest, and as much where
# two such are added.
BF16 = 2.0**-8


def multiply(x, ids, gates, experts, policy):
  """The routed product in FP8."""
  options = expert_ops.ExpertOptions(policy=policy)
  return expert_ops.expert_ffn(x, jnp.int32(ids), gates, experts, options)


def make_weight(w):
  return fp8_linear.Weight(w, *reference.quantize_weight(w))


def normal(seed, *shape, scale=1.0):
  """Numbers of f32, rows of uneven size.

  Not of BF16: its short numbers often lie on the border of two codes.
  """
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * scale
  x *= 2.0 ** rng.integers(-3, 4, (*shape[:-1], 1))
  return np.float64(np.float32(x))


def close(got, want, rtol):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  error = np.max(np.abs(got - want)) / np.max(np.abs(want))
  assert error <= rtol, f'{error} of the largest, allowed {rtol}'


def close_but_for_borders(got, want):
  """Nearly all entries are the oracle's to f32's precision.

  Gate and up are BF16, and its short numbers now and then lie on the border of
  two codes, where either is right; one flip moves a row of a product.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  error = np.abs(got - want) / np.max(np.abs(want))
  assert np.mean(error > 1e-5) < 0.05
  assert np.max(error) < 2.0**-4


@pytest.mark.parametrize(
  ('shape', 'pow2'),
  [
    ((256, 128, 256), False),
    ((65, 33, 130), True),
    ((1, 200, 8), False),
    pytest.param((256, 128, 256), True, marks=pytest.mark.nightly),
    pytest.param((65, 33, 130), False, marks=pytest.mark.nightly),
    pytest.param((1, 200, 8), True, marks=pytest.mark.nightly),
  ],
)
def test_linear_and_its_gradients_match_the_oracle(shape, pow2):
  rows, outputs, inputs = shape
  x_MD, w_DF = normal(0, rows, inputs), normal(1, inputs, outputs)
  dy_MF = normal(2, rows, outputs, scale=1e-7)  # far below the floor

  def loss(x, w):
    x = fp8_linear.operand(x, POLICY, pow2=pow2)
    y_MF = fp8_linear.linear(x, make_weight(w), POLICY, pow2=pow2)
    return jnp.sum(y_MF * jnp.float32(dy_MF)), y_MF

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (dx_MD, dw_DF), y_MF = grad(jnp.float32(x_MD), jnp.float32(w_DF))
  scaling = POW2_FLOOR if pow2 else FLOOR
  close(y_MF, fp8_gemm.fprop(x_MD, w_DF, scaling), BF16)
  close(dx_MD, fp8_gemm.dgrad(dy_MF, w_DF), BF16)
  close(dw_DF, fp8_gemm.wgrad(x_MD, dy_MF, scaling), 1e-5)
  assert dw_DF.dtype == jnp.float32


def test_the_weights_gradient_reads_the_12_bit_copy():
  """Of attention's output projection: E5M6, then tiles of 128 tokens."""
  x_MD, w_DF = normal(0, 200, 130), normal(1, 130, 72)
  dy_MF = normal(2, 200, 72)

  def loss(w):
    x = jnp.float32(x_MD)
    packed = e5m6.quantize(x)
    x = fp8_linear.operand(x, POLICY, pow2=True)._replace(saved=packed)
    y_MF = fp8_linear.linear(x, make_weight(w), POLICY, pow2=True)
    return jnp.sum(y_MF * jnp.float32(dy_MF))

  got_DF = jax.jit(jax.grad(loss))(jnp.float32(w_DF))
  columns = lambda x, rule: formats.fake(x.T, formats.ROW, rule).T
  dy_MF = columns(dy_MF, formats.PLAIN)
  want_DF = columns(formats.e5m6_copy(x_MD), POW2_FLOOR).T @ dy_MF
  close(got_DF, want_DF, 1e-5)
  other_DF = fp8_gemm.wgrad(x_MD, dy_MF, POW2_FLOOR)  # from e4m3
  assert np.max(np.abs(other_DF - want_DF)) > 1e-3 * np.max(np.abs(want_DF))


def test_blockwise_dgrad_changes_dx_alone():
  x_MD, w_DF = normal(0, 200, 256), normal(1, 256, 130)
  dy_MF = normal(2, 200, 130)

  def grads(policy):
    def loss(x, w):
      x = fp8_linear.operand(x, policy)
      y_MF = fp8_linear.linear(x, make_weight(w), policy)
      return jnp.sum(y_MF * jnp.float32(dy_MF))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return grad(jnp.float32(x_MD), jnp.float32(w_DF))

  tiled, blockwise = grads(POLICY), grads(BLOCKWISE)
  np.testing.assert_array_equal(tiled[1], blockwise[1])
  want_MD = fp8_gemm.dgrad(dy_MF, w_DF, block=True)
  close(blockwise[0], want_MD, BF16)
  exact_MD = dy_MF @ w_DF.T
  assert fp8_gemm.difference(tiled[0], exact_MD) < fp8_gemm.difference(
    blockwise[0], exact_MD
  )


def test_inputs_are_quantised_once_for_all_their_linears():
  x, w = jnp.ones((128, 128)), jnp.ones((128, 128))

  def two(x, w):
    shared = fp8_linear.operand(x, POLICY)
    weight = fp8_linear.Weight(w, *jax.tree.map(jax.lax.stop_gradient, FORMS))
    y = fp8_linear.linear(shared, weight, POLICY)
    return y + fp8_linear.linear(shared, weight, POLICY)

  FORMS = reference.quantize_weight(w)
  text = str(jax.make_jaxpr(two)(x, w))
  assert text.count('new_dtype=float8_e4m3fn') == 1


def test_swiglu_lives_on_its_fp8_copies():
  gate, up = normal(0, 150, 200), normal(1, 150, 200)
  w, dy = normal(2, 200, 72), normal(3, 150, 72, scale=1e-6)

  def loss(gate, up, w):
    y = fp8_linear.swiglu_linear(gate, up, make_weight(w), POLICY)
    return jnp.sum(y.astype(jnp.float32) * jnp.float32(dy)), y

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  args = (jnp.float32(gate), jnp.float32(up), jnp.float32(w))
  (dgate, dup, dw), y = grad(*args)
  want = fp8_ops.swiglu_linear(gate, up, w, dy, FLOOR)
  for got, wanted in zip((y, dgate, dup), want[:3], strict=True):
    close(got, wanted, BF16)
  close(dw, want[3], 1e-5)


def check_experts(ids, seed=0, dim=130, width=72, experts=5):
  rng = np.random.default_rng(seed)
  x, dy = normal(seed, len(ids), dim), normal(9, len(ids), dim, scale=1e-6)
  gates = fp8_ops.bf16(rng.uniform(0.1, 1.0, ids.shape))
  shapes = ((dim, width), (dim, width), (width, dim))
  weights = [
    normal(i, experts, *s, scale=0.1) for i, s in enumerate(shapes, start=1)
  ]

  def loss(x, gates, weights):
    wrapped = expert_ops.Experts(*map(make_weight, weights))
    y = multiply(x, ids, gates, wrapped, POLICY)
    return jnp.sum(y.astype(jnp.float32) * jnp.float32(dy)), y

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  f32 = [jnp.float32(w) for w in weights]
  (dx, dgates, grads), y = grad(jnp.float32(x), jnp.float32(gates), f32)
  args = (x, ids, gates, weights, dy, precision.ACTIVATION_FLOOR)
  want_y, want_dx, want_dgates, wanted = fp8_ops.experts(*args)
  close(y, want_y, 2 * BF16)
  close_but_for_borders(dx, want_dx)
  close_but_for_borders(dgates, want_dgates)
  for got, want in zip(grads, wanted, strict=True):
    close_but_for_borders(got, want)
  return x, gates, weights, dy, dgates


@pytest.mark.parametrize(
  'crowded', [pytest.param(0, marks=pytest.mark.nightly), 4]
)
def test_all_tokens_to_one_expert(crowded):
  check_experts(np.full((260, 1), crowded))


def test_experts_match_the_oracle_and_gates_the_plain_gradient_within_fp8():
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(5)[:2] for _ in range(300)])
  x, gates, weights, dy, dgates = check_experts(ids)

  def plain(gates):
    f32 = expert_ops.Experts(*(jnp.float32(w) for w in weights))
    options = expert_ops.ExpertOptions('dense')
    args = (jnp.float32(x), jnp.int32(ids), gates, f32, options)
    return jnp.sum(expert_ops.expert_ffn(*args) * jnp.float32(dy))

  want = jax.jit(jax.grad(plain))(jnp.float32(gates))
  assert fp8_gemm.difference(np.asarray(dgates), np.asarray(want)) < 5e-3


@pytest.mark.parametrize(
  ('length', 'implementation'),
  [
    (6, 'reference'),
    (130, 'xla'),
    (130, 'pallas_interpret'),
    pytest.param(130, 'reference', marks=pytest.mark.nightly),
    pytest.param(6, 'xla', marks=pytest.mark.nightly),
    pytest.param(6, 'pallas_interpret', marks=pytest.mark.nightly),
  ],
)
def test_attention_differentiates_through_its_12_bit_output(
  length, implementation
):
  heads = (length, 3, 16)
  q, k_nope = normal(0, length, 3, 24), normal(1, *heads, scale=0.1)
  k_rope, v = normal(2, length, 8, scale=0.1), normal(3, *heads)
  do = normal(4, *heads)
  batched = [jnp.float32(x)[None] for x in (q, k_nope, k_rope, v)]

  def loss(*args):
    o, packed = attention.causal(*args, None, 0.2, True, implementation)
    return jnp.sum(o * jnp.float32(do)), (o, packed)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
  (dq, dk_nope, dk_rope, dv), (o, packed) = grad(*batched)
  assert packed.shape == (length, 48)
  parts = (q[..., :16], q[..., 16:], k_nope, k_rope, v)
  want_o, lse = fp8_layers.attention(*parts, 0.2)
  tolerances.assert_close(o[0], want_o)
  copy = fp8_layers.e5m6_output(want_o)
  want = fp8_layers.attention_backward(parts, lse, copy, do, 0.2)
  got = (dq[0, ..., :16], dq[0, ..., 16:], dk_nope[0], dk_rope[0], dv[0])
  exact = fp8_layers.attention_backward(parts, lse, want_o, do, 0.2)
  for g, w, e in zip(got, want, exact, strict=True):
    tolerances.assert_close(g, w)
    if g is not got[-1]:  # dv does not see the output
      assert np.max(np.abs(w - e)) > 5 * np.max(np.abs(g - w))


def test_blockwise_dgrad_of_experts_leaves_the_last_matrix_alone():
  """W_down's Wgrad reads no Dgrad; those before it do."""
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(3)[:2] for _ in range(200)])
  x, dy = normal(0, 200, 136), normal(9, 200, 136, scale=1e-6)
  gates = jnp.float32(rng.uniform(0.1, 1.0, ids.shape))
  shapes = ((136, 72), (136, 72), (72, 136))
  weights = [
    jnp.float32(normal(i, 3, *shape, scale=0.1))
    for i, shape in enumerate(shapes)
  ]

  def grads(policy):
    def loss(x, weights):
      experts = expert_ops.Experts(*map(make_weight, weights))
      y = multiply(x, ids, gates, experts, policy)
      return jnp.sum(y * jnp.float32(dy))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(x), weights)

  tiled, blockwise = grads(POLICY), grads(BLOCKWISE)
  np.testing.assert_array_equal(tiled[1][2], blockwise[1][2])
  for got, want in ((blockwise[0], tiled[0]), (blockwise[1][0], tiled[1][0])):
    assert 1e-6 < fp8_gemm.difference(np.ravel(got), np.ravel(want)) < 0.05


def test_a_plain_policy_multiplies_arrays():
  x, w = normal(0, 5, 6), normal(1, 6, 2, 3)
  product = functools.partial(linear.project, policy=precision.POLICIES['bf16'])
  got = product(jnp.bfloat16(x), jnp.bfloat16(w))
  assert got.dtype == jnp.bfloat16
  close(got, x @ w.reshape(6, 6), BF16)


def test_policies_name_every_precision():
  of = precision.POLICIES['fp8'].of
  assert {of('w_dq'), of('w_o'), of('w_down')} == {'fp8'}
  assert {of('w'), of('w_proj')} == {'bfloat16'}  # embedding, head, eh_proj
  assert {of('w_router'), of('kv_norm'), of('norm')} == {'float32'}
  assert precision.POLICIES['bf16'].of('w_dq') == 'bfloat16'
  assert precision.POLICIES['f32'].of('w_dq') == 'float32'


def test_kernels_give_the_gradients_of_the_reference():
  """Every product and quantiser of experts and a linear through Pallas."""
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(3)[:2] for _ in range(70)])
  x = jnp.bfloat16(normal(0, 70, 136))
  shapes = ((136, 72), (136, 72), (72, 136))
  weights = [
    jnp.float32(normal(i, 3, *shape, scale=0.1))
    for i, shape in enumerate(shapes)
  ]
  gates = jnp.float32(rng.uniform(0.1, 1.0, ids.shape))

  def grads(implementation):
    policy = dataclasses.replace(POLICY, implementation=implementation)

    def loss(x, weights):
      experts = expert_ops.Experts(*map(make_weight, weights))
      y = multiply(x, ids, gates, experts, policy)
      shared = fp8_linear.operand(y, policy, pow2=True)
      w = make_weight(weights[0][0])
      y = fp8_linear.linear(shared, w, policy, pow2=True)
      return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights)

  got, want = grads('pallas_interpret'), grads('reference')
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    close(g, w, BF16)
