"""Gradients of whole models in the precisions that ship, leaf by leaf.

In FP8 two sums in another order move a number over the border of two codes now
and then, by a whole step of its format, and what follows moves with it. So the
operations that round (Linear, SwiGLU, experts) are held to their NumPy oracles
where they stand in the model, each on what it really got, forward and backward;
and whole gradients to those of f32, by what rounding alone makes of them.

Scale and direction are apart: a gradient that is 2 % too long has the right
direction, and one of another loss may have the right length.
"""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax import precision
from dsv3_jax.ops import experts as expert_ops
from dsv3_jax.ops import fp8_linear
from pallas_kernels import numerics, quantized
from pallas_kernels.fp8_matmul import e5m6
from tests import settings
from tests.nn import models
from tests.nn.test_fp8_model import FP8, shrunk, unstacked
from tests.oracles import fp8_formats as formats
from tests.oracles import fp8_gemm, fp8_ops

# Every token goes to all experts: a choice that flips is another gradient.
ALL_EXPERTS = {'model__moe__top_k': 4}
FLOOR = precision.ACTIVATION_FLOOR
PLAIN = formats.Scaling(floor=FLOOR)
FUNCTIONS = {
  'linear': fp8_linear.linear,
  'swiglu': fp8_linear.swiglu_linear,
  'experts': expert_ops.expert_ffn,
}


class Checks:
  """What the operations of a model made, beside their oracles.

  errors: (|scale - 1|, 1 - cosine) by operation and result.
  """

  def __init__(self):
    self.errors = {}

  def compare(self, name, oracle, got, *args):
    """Calls the oracle in float64 on what the operation got.

    Args:
      oracle: args -> arrays by name. got: the same by name.
    """

    def call(got, *args):
      wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), args)
      for key, want in oracle(*wide).items():
        error = numerics.scale_and_direction(got[key], want)
        self.errors.setdefault(f'{name} {key}', []).append(error)

    jax.debug.callback(call, got, *args)

  def linear(self, x, w, policy, *, pow2=False):
    """In place of `fp8_linear.linear`."""
    scaling = formats.Scaling(pow2=pow2, floor=FLOOR)
    packed = isinstance(x.saved, quantized.Packed)

    def backward(x, copy, w, dy):
      dw = fp8_ops.columns(copy, scaling).T @ fp8_ops.columns(dy, formats.PLAIN)
      return {
        'dx': fp8_gemm.dgrad(dy, w),
        'dw': dw if packed else fp8_gemm.wgrad(x, dy, scaling),
      }

    @jax.custom_vjp
    def checked(x, w):
      return FUNCTIONS['linear'](x, w, policy, pow2=pow2)

    def fwd(x, w):
      real = lambda value, master: FUNCTIONS['linear'](
        x._replace(value=value), w._replace(master=master), policy, pow2=pow2
      )
      y, pull = jax.vjp(real, x.value, w.master)
      forward = lambda x, w: {'y': fp8_gemm.fprop(x, w, scaling)}
      self.compare('linear', forward, {'y': y}, x.value, w.master)
      copy = e5m6.unpack(x.saved) if packed else x.value
      return y, (pull, x.value, copy, w.master)

    def bwd(residuals, dy):
      pull, *args = residuals
      dx, dw = pull(dy)
      self.compare('linear', backward, {'dx': dx, 'dw': dw}, *args, dy)
      return (
        fp8_linear.Operand(dx, None, None),
        fp8_linear.Weight(dw, None, None),
      )

    checked.defvjp(fwd, bwd)
    return checked(x, w)

  def swiglu(self, gate, up, w, policy):
    """In place of `fp8_linear.swiglu_linear`."""
    names = ('y', 'dgate', 'dup', 'dw')

    def oracle(*args):
      results = fp8_ops.swiglu_linear(*args, PLAIN, between=fp8_ops.bf16)
      return dict(zip(names, results, strict=True))

    @jax.custom_vjp
    def checked(gate, up, w):
      return FUNCTIONS['swiglu'](gate, up, w, policy)

    def fwd(gate, up, w):
      real = lambda gate, up, master: FUNCTIONS['swiglu'](
        gate, up, w._replace(master=master), policy
      )
      args = (gate, up, w.master)
      y, pull = jax.vjp(real, *args)
      return y, (pull, y, *args)

    def bwd(residuals, dy):
      pull, y, *args = residuals
      grads = pull(dy)
      got = dict(zip(names, (y, *grads), strict=True))
      self.compare('swiglu', oracle, got, *args, dy)
      return *grads[:2], fp8_linear.Weight(grads[2], None, None)

    checked.defvjp(fwd, bwd)
    return checked(gate, up, w)

  def experts(self, x, ids, gates, experts, options, *rest):
    """In place of `experts.expert_ffn`, on one device."""
    assert rest[0] is None  # no redundant experts
    names = ('dw_gate', 'dw_up', 'dw_down')

    def oracle(x, gates, weights, ids, dy):
      args = (x, np.int64(ids), gates, weights, dy, FLOOR)
      y, dx, dgates, grads = fp8_ops.experts(*args, between=fp8_ops.bf16)
      results = dict(zip(names, grads, strict=True))
      return results | {'y': y, 'dx': dx, 'dgates': dgates}

    @jax.custom_vjp
    def checked(x, gates, experts, ids):
      return FUNCTIONS['experts'](x, ids, gates, experts, options)

    def fwd(x, gates, experts, ids):
      def real(x, gates, masters):
        pairs = zip(experts, masters, strict=True)
        weights = [w._replace(master=master) for w, master in pairs]
        return FUNCTIONS['experts'](
          x, ids, gates, type(experts)(*weights), options
        )

      args = (x, gates, tuple(w.master for w in experts))
      y, pull = jax.vjp(real, *args)
      return y, (pull, y, *args, ids, experts)

    def bwd(residuals, dy):
      pull, y, x, gates, weights, ids, experts = residuals
      dx, dgates, grads = pull(dy)
      got = {'y': y, 'dx': dx, 'dgates': dgates}
      got |= dict(zip(names, grads, strict=True))
      self.compare('experts', oracle, got, x, gates, weights, ids, dy)
      wrapped = (fp8_linear.Weight(dw, None, None) for dw in grads)
      return dx, dgates, type(experts)(*wrapped), None

    checked.defvjp(fwd, bwd)
    return checked(x, gates, experts, ids)


@functools.cache
def gradients(name):
  """Loss and gradients in a precision."""
  scanned, cfg = (
    settings.small(**(FP8 | ALL_EXPERTS | {'precision': name} | scan))
    for scan in ({'model__scan_layers': True}, {})
  )
  params, router_biases = models.random_params(scanned)
  params = shrunk(unstacked(models.f32(params)))
  batch, _ = models.make_batch(cfg, ([129], [60, 69]))
  scales = models.scales_of(cfg, batch.weights_BT, batch.segments_BT)
  args = (params, models.f32(router_biases), batch, scales)
  (total, _), grads = jax.jit(models.plain_loss_and_grads(cfg))(*args)
  jax.effects_barrier()
  return float(total), grads


def assert_near(got, want, scale, direction):
  """Holds every leaf: |<x, y> / <y, y> - 1| and 1 - cosine; returns both."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  )
  errors = {
    jax.tree_util.keystr(path): numerics.scale_and_direction(g, w)
    for (path, g), w in pairs
  }
  worst = [max(x) for x in zip(*errors.values(), strict=True)]
  far = {k: x for k, x in errors.items() if x[0] > scale or x[1] > direction}
  assert not far, (worst, far)
  return errors


@pytest.fixture(scope='module')
def checked():
  """Checks, and the loss and gradients of the model that they were made in."""
  checks = Checks()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fp8_linear, 'linear', checks.linear)
    patch.setattr(fp8_linear, 'swiglu_linear', checks.swiglu)
    patch.setattr(expert_ops, 'expert_ffn', checks.experts)
    return checks, *gradients.__wrapped__('fp8')


@pytest.mark.slow
def test_fp8_operations_of_a_model_are_their_oracles(checked):
  """Each Linear, SwiGLU and MoE layer of the model as it trains.

  Measured: scales within 4.2e-4, 1 - cosine within 1.2e-5: a step of BF16 for
  all, and a code on the border for few.
  """
  checks, *_ = checked
  counts = {name: len(errors) for name, errors in checks.errors.items()}
  # Three blocks: six matrices of attention, and gate and up of SwiGLU.
  assert counts['linear y'] == counts['linear dw'] == 3 * (6 + 2)
  assert (counts['swiglu dw'], counts['experts dgates']) == (3, 2)
  worst = {name: np.max(x, axis=0) for name, x in checks.errors.items()}
  assert all(
    scale < 1e-3 and direction < 3e-5 for scale, direction in worst.values()
  ), worst


@pytest.mark.nightly
def test_the_checks_do_not_change_the_loss(checked):
  assert checked[1] == pytest.approx(gradients('fp8')[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'with_checks', [True, pytest.param(False, marks=pytest.mark.nightly)]
)
def test_fp8_gradients_are_those_of_f32_within_its_rounding(
  with_checks, checked
):
  """Measured: scales within 4.5 %, 1 - cosine within 0.026.

  With the checks or without: the former is compiled already.
  """
  total, grads = checked[1:] if with_checks else gradients('fp8')
  want_total, want = gradients('f32')
  assert total == pytest.approx(want_total, rel=2e-3)
  assert total != want_total
  errors = assert_near(grads, want, 0.07, 0.04)
  # Products in FP8 leave a trace in every leaf.
  assert min(direction for _, direction in errors.values()) > 1e-9


@pytest.mark.slow
def test_bf16_gradients_are_those_of_f32_within_its_rounding():
  """Measured: scales within 0.24 %, 1 - cosine within 2e-4."""
  (total, grads), (want_total, want) = gradients('bf16'), gradients('f32')
  assert total == pytest.approx(want_total, rel=1e-3)
  assert_near(grads, want, 5e-3, 4e-4)
