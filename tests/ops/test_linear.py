"""Linears outside FP8: sums and weight gradients are f32 whatever the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import cross_entropy, linear
from dsv3_jax.ops import experts as expert_ops
from tests import tolerances

POLICY = precision.POLICIES['bf16']
TOKENS, DIM, WIDTH = 96, 24, 40


def draw(seed, *shapes, dtype=jnp.bfloat16):
  """Normal arrays, all in `dtype`."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def is_bf16(x):
  return bool(jnp.all(x == x.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize('shape', [(DIM, WIDTH), (DIM, 8, 5)])
def test_weight_gradient_of_bf16_input_is_the_f32_sum(shape):
  """Against float64 sums of the same BF16 numbers; heads come flattened."""
  x_MI, dy_MO = draw(0, (TOKENS, DIM), (TOKENS, WIDTH))
  (w,) = draw(1, shape, dtype=jnp.float32)
  y_MO, pull = jax.vjp(lambda x, w: linear.project(x, w, POLICY), x_MI, w)
  dx_MI, dw = pull(dy_MO)
  assert (y_MO.dtype, dx_MI.dtype, dw.dtype) == ('bfloat16', 'bfloat16', 'f4')
  exact = lambda x: np.asarray(x, np.float64)
  want = exact(x_MI).T @ exact(dy_MO)
  tolerances.assert_close(dw, want.reshape(shape))
  w_IO = exact(w.astype(jnp.bfloat16)).reshape(DIM, WIDTH)
  tolerances.assert_close(y_MO, exact(x_MI) @ w_IO, 'bfloat16')
  tolerances.assert_close(dx_MI, exact(dy_MO) @ w_IO.T, 'bfloat16')


def test_gradients_of_head_and_experts_keep_more_digits_than_bf16():
  x_MD, dy_MD = draw(2, (TOKENS, DIM), (TOKENS, DIM))
  up, down, head = (4, DIM, WIDTH), (4, WIDTH, DIM), (DIM, WIDTH)
  *weights, head_DV = draw(3, up, up, down, head, dtype=jnp.float32)
  ids_MK = jnp.arange(TOKENS, dtype=jnp.int32)[:, None] % 4
  gates_MK = jnp.ones((TOKENS, 1), jnp.float32)

  def experts_loss(experts):
    options = expert_ops.ExpertOptions('blocks')
    y_MD = expert_ops.expert_ffn(x_MD, ids_MK, gates_MK, experts, options)
    return jnp.sum(y_MD * dy_MD, dtype=jnp.float32)

  def head_loss(head_DV):
    targets, counts = ids_MK.T, gates_MK.T
    return cross_entropy.head_loss(x_MD[None], head_DV, targets, counts)

  grads = [*jax.grad(experts_loss)(expert_ops.Experts(*weights))]
  grads.append(jax.grad(head_loss)(head_DV))
  for grad in grads:
    assert grad.dtype == jnp.float32
    assert not is_bf16(grad)
