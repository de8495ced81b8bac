"""Stages of real blocks at tiny sizes, and what every split must hold to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dsv3_jax import precision
from dsv3_jax.nn import attention, block, model, mtp
from dsv3_jax.parallel.pipeline import split_backward
from tests import settings
from tests.nn import models

LENGTH, LIMIT = 10, 2e-6
# Rounds to BF16 wherever the program says so, and compiles fast.
OPTIONS = {
  'xla_allow_excess_precision': False,
  'xla_backend_optimization_level': 0,
}


def block_stage(*, is_moe=False, ahead=False, **changes):
  """One block: its stage function and (params, x, consts).

  Args:
    ahead: a whole MTP module; x is then the pair of hidden states and
      embeddings, and y the pair of its outputs.
  """
  cfg = settings.small(**changes)
  policy, dims = precision.POLICIES[cfg.precision], cfg.model.d_model
  common = (cfg.model, cfg.balance, policy)
  build = block.with_remat(cfg.model, scanned=False)
  net = mtp.MtpModule(*common) if ahead else build(*common, is_moe, False)

  def stage(variables, x, consts):
    bias_E, context = consts
    if ahead:
      *y, stats, _ = net.apply(variables, *x, bias_E, context)
      return tuple(y), stats
    rest = bias_E, jnp.array(0), context
    (y, _), stats = net.apply(variables, (x, None), *rest)
    return y, stats

  rng = np.random.default_rng(0)
  dtype, shape = jnp.dtype(policy.compute), (2, LENGTH, dims)
  x = tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
  positions = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (2, 1))
  segments = jnp.asarray(np.sort(rng.integers(1, 3, (2, LENGTH))), jnp.int32)
  valid = jnp.ones(segments.shape).at[0, -2:].set(0.0)
  context = attention.make_context(cfg.model, positions, valid, segments)
  bias_E = jnp.asarray(rng.normal(0, 0.2, cfg.model.moe.num_experts), 'float32')
  params = models.f32(models.random_params(cfg)[0])
  if ahead:
    params = params['mtp_0']
  else:
    params = params['moe_layers' if is_moe else 'dense_layers']['layer_0']
  variables = {'params': params} | model.quantize(policy, params)
  return stage, (variables, x if ahead else x[0], (bias_E, context))


def own_params(variables):
  return variables['params']


def random_like(shapes, seed=1):
  """Cotangents; None for integers."""
  rng = np.random.default_rng(seed)
  draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
  floats = lambda s: jnp.issubdtype(s.dtype, jnp.inexact)
  return jax.tree.map(lambda s: draw(s) if floats(s) else None, shapes)


def assert_is_vjp(stage, args, trained=lambda params: params, whole=True):
  """Compares all parts, each compiled for itself, with `jax.vjp`.

  Args:
    whole: also B, whose equations are those of I and W in any case.
  """
  compiled = lambda f: jax.jit(f, compiler_options=OPTIONS)
  parts = split_backward.split_stage(stage, *args, trained=trained)
  dy, daux = random_like(jax.eval_shape(stage, *args))
  want = compiled(lambda *rest: vjp(stage, trained, *rest))(*args, dy, daux)
  *outputs, residuals = compiled(parts.forward)(*args)
  dx, carry = compiled(parts.backward_input)(args[0], residuals, dy, daux)
  dparams = compiled(parts.backward_weight)(args[0], carry)
  for arrays, shapes in (residuals, parts.residuals), (carry, parts.carry):
    stored = [(array.shape, array.dtype) for array in arrays]
    assert stored == [(shape.shape, shape.dtype) for shape in shapes]
  assert_no_parameters(args[0], (*residuals, *carry))
  assert_near([*outputs, dx, dparams], want)
  if whole:
    got = compiled(parts.backward)(args[0], residuals, dy, daux)
    assert_near(got, want[2:])
  assert_nothing_twice(parts)
  return parts


def assert_no_parameters(params, stored):
  """No stored array has the numbers of a parameter, in any dtype or order."""
  numbers = lambda x: np.sort(np.asarray(x, np.float64), axis=None)
  own = [numbers(w) for w in jax.tree.leaves(params) if w.size > 1]
  for array in map(numbers, stored):
    for w in own:
      assert w.size != array.size or not np.allclose(w, array, rtol=0.01)


def vjp(stage, trained, params, x, consts, dy, daux):
  """y, aux, dx, dparams by `jax.vjp`, with None for integers."""
  pick = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
  leaves, structure = jax.tree.flatten((params, x))
  numbered = jax.tree.unflatten(structure, range(len(leaves)))
  wanted = (numbered[1], trained(numbered[0]))
  chosen = [i for i in jax.tree.leaves(wanted) if pick(leaves[i])]

  def of_chosen(values):
    full = leaves[:]
    for i, value in zip(chosen, values, strict=True):
      full[i] = value
    outputs = stage(*jax.tree.unflatten(structure, full), consts)
    return list(filter(pick, jax.tree.leaves(outputs))), outputs

  values = [leaves[i] for i in chosen]
  _, pull, outputs = jax.vjp(of_chosen, values, has_aux=True)
  grads = dict(zip(chosen, pull(jax.tree.leaves((dy, daux)))[0], strict=True))
  return [*outputs, *jax.tree.map(grads.get, wanted)]


def assert_near(got, want):
  """Equal to 2e-6 of each array's largest entry."""
  assert jax.tree.structure(list(got)) == jax.tree.structure(list(want))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    limit = LIMIT * np.max(np.abs(b), initial=0.0)
    np.testing.assert_allclose(a, b, rtol=0.0, atol=limit)


def assert_nothing_twice(parts):
  """I and W have the equations of B, and none of weight in common."""
  of = lambda name: {id(e): e for e in parts.programs[name].jaxpr.eqns}
  first, second = of('backward_input'), of('backward_weight')
  assert first.keys() | second.keys() == of('backward').keys()
  for key in first.keys() & second.keys():
    assert not products(core.jaxprs_in_params(first[key].params))
    assert first[key].primitive.name not in ('dot_general', 'while', 'scan')
  assert product_flops(parts, 'backward') == sum(
    product_flops(parts, name) for name in ('backward_input', 'backward_weight')
  )


def product_flops(parts, name):
  """FLOPs of a part's products."""
  return products([parts.programs[name].jaxpr])


def products(jaxprs):
  """FLOPs of all products, those of a loop's turn counted once."""
  total = 0
  for jaxpr in jaxprs:
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'dot_general':
        contracted = eqn.params['dimension_numbers'][0][0]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
      total += products(core.jaxprs_in_params(eqn.params))
  return total


def names(parts, part):
  """Names of a part's equations."""
  return [eqn.primitive.name for eqn in parts.programs[part].jaxpr.eqns]
