"""Gradients of whole models in the precisions that ship, leaf by leaf.

In FP8 every operation with a rounding of its own (Linear, SwiGLU, experts) is
replaced by its NumPy oracle: the model around it, in BF16, is the same. What is
left are sums in another order, which move a number over the border of two codes
now and then, by a whole step of its format, and what follows from that.

Scale and direction of a leaf are apart: a gradient that is 2 % too long has the
right direction, and one that is not of this loss may have the right length.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import fp8_experts, fp8_linear
from pallas_kernels import quantized
from pallas_kernels.fp8_matmul import e5m6
from tests import settings, tolerances
from tests.nn import models
from tests.nn.test_fp8_model import FP8, shrunk, unstacked
from tests.oracles import fp8_formats as formats
from tests.oracles import fp8_gemm, fp8_ops

# Every token goes to all experts: a choice that flips is another gradient.
ALL_EXPERTS = {'model__moe__top_k': 4}
FLOOR = precision.ACTIVATION_FLOOR


def host(function, shapes, *args):
  """Calls a NumPy oracle in float64; results are cast to the dtypes wanted."""

  def call(*args):
    outs = function(*(np.asarray(x).astype(np.float64) for x in args))
    return jax.tree.map(lambda x, s: np.asarray(x, s.dtype), outs, shapes)

  return jax.pure_callback(call, shapes, *args)


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def oracle_linear(x, w, copy, scaling):
  out = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
  return host(lambda x, w: fp8_gemm.fprop(x, w, scaling), out, x, w)


def _linear_bwd(scaling, residuals, dy):
  x, w, copy = residuals

  def oracle(x, w, copy, dy):
    dx = fp8_gemm.dgrad(dy, w)
    if not copy.size:
      return dx, fp8_gemm.wgrad(x, dy, scaling)
    columns = fp8_ops.columns(dy, formats.PLAIN)
    return dx, fp8_ops.columns(copy, scaling).T @ columns

  dx, dw = host(oracle, (like(x), like(w)), x, w, copy, dy)
  return dx, dw, jnp.zeros_like(copy)


oracle_linear.defvjp(
  lambda x, w, copy, scaling: (
    oracle_linear(x, w, copy, scaling),
    (x, w, copy),
  ),
  _linear_bwd,
)


def linear(x, w, policy, *, pow2=False):
  """In place of `fp8_linear.linear`; reads the 12-bit copy if there is one."""
  del policy
  copy = jnp.zeros((0, 0))
  if isinstance(x.saved, quantized.Packed):
    copy = jax.lax.stop_gradient(e5m6.unpack(x.saved))
  scaling = formats.Scaling(pow2=pow2, floor=FLOOR)
  return oracle_linear(x.value, w.master, copy, scaling)


@jax.custom_vjp
def oracle_swiglu(gate, up, w):
  out = jax.ShapeDtypeStruct((len(gate), w.shape[1]), gate.dtype)
  scaling = formats.Scaling(floor=FLOOR)
  function = lambda gate, up, w: fp8_ops.swiglu_linear(
    gate, up, w, np.zeros((len(gate), w.shape[1])), scaling
  )[0]
  return host(function, out, gate, up, w)


def _swiglu_bwd(residuals, dy):
  scaling = formats.Scaling(floor=FLOOR)
  oracle = lambda *args: fp8_ops.swiglu_linear(*args, scaling, fp8_ops.bf16)[1:]
  return host(oracle, tuple(map(like, residuals)), *residuals, dy)


oracle_swiglu.defvjp(lambda *args: (oracle_swiglu(*args), args), _swiglu_bwd)


@jax.custom_vjp
def oracle_experts(x, gates, weights, ids):
  oracle = lambda x, gates, *rest: fp8_ops.experts(
    x, np.int64(rest[-1]), gates, rest[:-1], np.zeros_like(x), FLOOR
  )[0]
  return host(oracle, like(x), x, gates, *weights, ids)


def _experts_bwd(residuals, dy):
  x, gates, weights, ids = residuals

  def oracle(x, gates, *rest):
    *weights, ids, dy = rest
    args = (x, np.int64(ids), gates, weights, dy, FLOOR, fp8_ops.bf16)
    _, dx, dgates, grads = fp8_ops.experts(*args)
    return dx, dgates, tuple(grads)

  shapes = (like(x), like(gates), tuple(map(like, weights)))
  return *host(oracle, shapes, x, gates, *weights, ids, dy), None


oracle_experts.defvjp(lambda *args: (oracle_experts(*args), args), _experts_bwd)


def gradients(name, dtype='bfloat16'):
  """Loss and gradients in a precision, activations between products in dtype.

  Every expert gets every token.
  """
  scanned, cfg = (
    settings.small(**(FP8 | ALL_EXPERTS | {'precision': name} | scan))
    for scan in ({'model__scan_layers': True}, {})
  )
  params, router = models.random_params(scanned)
  params = shrunk(unstacked(models.f32(params)))
  batch, _ = models.make_batch(cfg, ([129], [60, 69]))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, models.f32(router), batch, scales)
  policy = dataclasses.replace(precision.POLICIES[name], compute=dtype)
  with mock.patch.dict(precision.POLICIES, {name: policy}):
    (total, _), grads = jax.jit(models.plain_loss_and_grads(cfg))(*args)
  return float(total), grads


def assert_near(got, want, scale, direction):
  """Holds every leaf: |<x, y> / <y, y> - 1| and 1 - cosine."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  )
  far = {
    jax.tree_util.keystr(path): tolerances.scale_and_direction(g, w)
    for (path, g), w in pairs
  }
  worst = [max(x) for x in zip(*far.values(), strict=True)]
  far = {k: x for k, x in far.items() if x[0] > scale or x[1] > direction}
  assert not far, (worst, far)


@pytest.fixture(scope='module')
def shipped():
  """The model as it trains."""
  return gradients('fp8')


@pytest.fixture(scope='module')
def exact():
  return gradients('f32', 'float32')


@pytest.fixture
def oracles(monkeypatch):
  """Linear, SwiGLU and experts are NumPy's."""
  swiglu = lambda gate, up, w, policy: oracle_swiglu(gate, up, w.master)
  experts = lambda x, gates, experts, plan, policy: oracle_experts(
    x, gates, tuple(w.master for w in experts), plan.ids_IK
  )
  monkeypatch.setattr(fp8_linear, 'linear', linear)
  monkeypatch.setattr(fp8_linear, 'swiglu_linear', swiglu)
  monkeypatch.setattr(fp8_experts, 'multiply', experts)


@pytest.mark.slow
@pytest.mark.usefixtures('oracles')
def test_fp8_gradients_are_those_of_the_oracles_in_f32(monkeypatch):
  """With f32 between the products hardly a number changes its code."""
  want_total, want = gradients('fp8', 'float32')
  monkeypatch.undo()
  total, grads = gradients('fp8', 'float32')
  assert total == pytest.approx(want_total, rel=1e-6)
  assert_near(grads, want, 1e-4, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('oracles')
def test_fp8_gradients_are_those_of_the_oracles(shipped):
  """As shipped: BF16 moves one number in thirty by a step of FP8, each way.

  Measured: scales within 3.5 %, 1 - cosine within 9.5e-3.
  """
  want_total, want = gradients('fp8')
  assert shipped[0] == pytest.approx(want_total, rel=1e-3)
  assert_near(shipped[1], want, 0.06, 0.015)


@pytest.mark.slow
def test_fp8_gradients_are_those_of_f32_within_its_rounding(shipped, exact):
  """Measured: scales within 4.5 %, 1 - cosine within 0.026."""
  assert shipped[0] == pytest.approx(exact[0], rel=2e-3)
  assert shipped[0] != exact[0]
  assert_near(shipped[1], exact[1], 0.07, 0.04)


@pytest.mark.slow
def test_bf16_gradients_are_those_of_f32_within_its_rounding(exact):
  """Measured: scales within 0.24 %, 1 - cosine within 2e-4."""
  total, grads = gradients('bf16')
  assert total == pytest.approx(exact[0], rel=1e-3)
  assert_near(grads, exact[1], 5e-3, 4e-4)
