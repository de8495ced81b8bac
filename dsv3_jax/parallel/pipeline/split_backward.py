"""Splits a stage's backward pass into input and weight halves (TR 3.2.1).

  forward          F: params, x, consts       -> y, aux, residuals
  backward         B: params, residuals, dy   -> dx, dparams
  backward_input   I: params, residuals, dy   -> dx, carry
  backward_weight  W: params, carry           -> dparams

The previous stage waits for I; W fills bubbles (ZB, DualPipe). `jax.vjp` is
traced into two programs, F and B. I is the equations of B on which dx depends,
W is the rest. No product and no loop runs twice, so I and W together cost as
much as B. `jaxpr_partition.cut` chooses what is stored between the programs:

  residuals  from F to B or I: what JAX saves, without parameters and their
             casts; activations are saved before casts and copies, not after
  carry      from I to W: the input and the output gradient of every linear;
             gradients of norms are sums over tokens, which I computes

An equation is never divided. `scan`, `while` and `cond` are in I as a whole if
dx needs any of their results. So layers are to be unrolled, and loops for dx
and dw to be separate. Collectives are in I if dx needs them. `jax.checkpoint`
works: recomputation is part of B. But XLA may merge it with F if one
computation holds both without a loop or a branch between them. An equation that
no result needs is dropped, with its side effects, such as prints.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend import core

from dsv3_jax.parallel.pipeline import jaxpr_partition

Tree = Any
Shapes = tuple[jax.ShapeDtypeStruct, ...]


class _Trees(NamedTuple):
  """Structures around the flat programs.

  arguments: structure of (params, x, consts). outputs: shapes of (y, aux). x,
  trained: trees with a leaf's number if it has a gradient, else None.
  """

  arguments: Any
  outputs: Tree
  x: Tree
  trained: Tree


@runtime_checkable
class StageFunctions(Protocol):
  """F, B, I and W of one stage.

  `SplitStage` has a model's. Benchmarks pass others.
  """

  residuals: Shapes
  carry: Shapes

  def forward(self, params: Tree, x: Tree, consts: Tree) -> tuple:
    """F: (y, aux, residuals)."""

  def backward(
    self, params: Tree, residuals: Sequence, dy: Tree, daux: Tree
  ) -> tuple[Tree, Tree]:
    """B: (dx, dparams)."""

  def backward_input(
    self, params: Tree, residuals: Sequence, dy: Tree, daux: Tree
  ) -> tuple[Tree, tuple]:
    """I: (dx, carry)."""

  def backward_weight(self, params: Tree, carry: Sequence) -> Tree:
    """W: dparams."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStage:
  """F, B, I and W of one stage as pure functions, and what they store.

  residuals, carry: shapes of these flat tuples of arrays. programs: a jaxpr for
  each function, by its name.
  """

  residuals: Shapes
  carry: Shapes
  programs: dict[str, core.ClosedJaxpr]
  trees: _Trees

  def forward(
    self, params: Tree, x: Tree, consts: Tree = ()
  ) -> tuple[Tree, Tree, tuple]:
    """Runs the stage: (y, aux, residuals)."""
    args = (params, x, consts)
    given, expected = jax.tree.structure(args), self.trees.arguments
    if given != expected:
      raise ValueError(f'arguments {given} must be {expected}')
    results = self._run('forward', jax.tree.leaves(args))
    structure = jax.tree.structure(self.trees.outputs)
    count = structure.num_leaves
    y, aux = jax.tree.unflatten(structure, results[:count])
    return y, aux, tuple(results[count:])

  def backward_input(
    self, params: Tree, residuals: Sequence, dy: Tree, daux: Tree
  ) -> tuple[Tree, tuple]:
    """I: (dx, carry); None in dy and daux stands for zero."""
    args = self._backward_arguments(params, residuals, dy, daux)
    dx, carry = self._unflatten(self.trees.x, self._run('backward_input', args))
    return dx, tuple(carry)

  def backward_weight(self, params: Tree, carry: Sequence) -> Tree:
    """W: gradients of the trained parameters."""
    args = [*jax.tree.leaves(params), *carry]
    grads = self._run('backward_weight', args)
    return self._unflatten(self.trees.trained, grads)[0]

  def backward(
    self, params: Tree, residuals: Sequence, dy: Tree, daux: Tree
  ) -> tuple[Tree, Tree]:
    """B: (dx, dparams), by the equations of I and W."""
    args = self._backward_arguments(params, residuals, dy, daux)
    dx, rest = self._unflatten(self.trees.x, self._run('backward', args))
    return dx, self._unflatten(self.trees.trained, rest)[0]

  def _run(self, name, args):
    return core.jaxpr_as_fun(self.programs[name])(*args)

  def _backward_arguments(self, params, residuals, dy, daux):
    """Flat inputs of I and B."""
    shapes, structure = jax.tree.flatten(self.trees.outputs)
    given = structure.flatten_up_to((dy, daux))
    cotangents = []
    for shape, value in zip(shapes, given, strict=True):
      if not _has_gradient(shape):
        continue
      if value is None:
        value = jnp.zeros_like(shape)
      if (value.shape, value.dtype) != (shape.shape, shape.dtype):
        raise ValueError(
          f'a cotangent is {value.dtype}{value.shape}, '
          f'its output {shape.dtype}{shape.shape}'
        )
      cotangents.append(value)
    return [*jax.tree.leaves(params), *residuals, *cotangents]

  def _unflatten(self, tree, values):
    """The first values as leaves of a tree, and the remaining values."""
    structure = jax.tree.structure(tree)
    count = structure.num_leaves
    return jax.tree.unflatten(structure, values[:count]), values[count:]


def split_stage(
  stage: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
  params: Tree,
  x: Tree,
  consts: Tree = (),
  *,
  trained: Callable[[Tree], Tree] = lambda params: params,
) -> SplitStage:
  """Splits `stage(params, x, consts) -> (y, aux)`, given arrays or shapes.

  Call it where the functions will run: in the body of the shard_map, if the
  stage has collectives. The functions are for exactly these shapes.

  Args:
    params: inputs of all functions, so they are never stored.
    x: activations; dx has its structure, with None for integers.
    consts: per micro-batch, without gradient, such as positions.
    trained: selects the params that get a gradient; dparams has the structure
      of its result, with None for integers. Others, such as FP8 forms of
      weights, get no gradient.
  """
  trees, forward, backward, inputs, transposed = _trace(
    stage, params, x, consts, trained
  )
  param_vars = inputs[: len(jax.tree.leaves(params))]
  values = forward.consts | backward.consts
  known = [*param_vars, *values]
  num_dx = len(jax.tree.leaves(trees.x))
  dx, dparams = backward.outputs[:num_dx], backward.outputs[num_dx:]
  forward_cut = jaxpr_partition.cut(
    forward.equations,
    backward.equations,
    backward.outputs,
    known,
    transposed,
  )
  for_dx = jaxpr_partition.needed(forward_cut.late, dx)
  ids_for_dx = set(map(id, for_dx))
  rest = [eqn for eqn in forward_cut.late if id(eqn) not in ids_for_dx]
  backward_cut = jaxpr_partition.cut(for_dx, rest, dparams, known)
  residuals, carry = forward_cut.crossing, backward_cut.crossing
  late = [*param_vars, *residuals, *transposed]
  programs = {
    'forward': (forward_cut.early, inputs, [*forward.outputs, *residuals]),
    'backward_input': (backward_cut.early, late, [*dx, *carry]),
    'backward_weight': (backward_cut.late, [*param_vars, *carry], dparams),
    'backward': (forward_cut.late, late, backward.outputs),
  }
  return SplitStage(
    residuals=_shapes(residuals),
    carry=_shapes(carry),
    programs={
      name: jaxpr_partition.close(*program, values)
      for name, program in programs.items()
    },
    trees=trees,
  )


def _trace(stage, params, x, consts, trained):
  """Programs of the stage and of its transpose, and their input variables."""
  leaves, structure = jax.tree.flatten((params, x, consts))
  number = lambda i: i if _has_gradient(jax.typeof(leaves[i])) else None
  numbered = jax.tree.unflatten(structure, range(len(leaves)))
  wanted = (numbered[1], trained(numbered[0]))
  numbers_x, numbers_trained = jax.tree.map(number, wanted)
  wanted = jax.tree.leaves((numbers_x, numbers_trained))

  def run(leaves):
    def of_wanted(values):
      full = leaves[:]
      for i, value in zip(wanted, values, strict=True):
        full[i] = value
      outputs = stage(*jax.tree.unflatten(structure, full))
      return list(filter(_has_gradient, jax.tree.leaves(outputs))), outputs

    values = [leaves[i] for i in wanted]
    floats, pull, outputs = jax.vjp(of_wanted, values, has_aux=True)
    return outputs, pull, floats

  closed, shapes = jax.make_jaxpr(run, return_shape=True)(leaves)
  outputs, pull, floats = shapes
  closed_back = jax.make_jaxpr(lambda pull, dy: pull(dy)[0])(pull, floats)
  inputs = [core.Var(var.aval) for var in closed.jaxpr.invars]
  forward = jaxpr_partition.inline(closed, inputs)
  start = len(jax.tree.leaves(outputs))
  kept = forward.outputs[start : len(forward.outputs) - len(floats)]
  cotangents = closed_back.jaxpr.invars[len(kept) :]
  cotangents = [core.Var(var.aval) for var in cotangents]
  backward = jaxpr_partition.inline(closed_back, [*kept, *cotangents])
  forward = forward._replace(outputs=forward.outputs[:start])
  trees = _Trees(structure, outputs, numbers_x, numbers_trained)
  return trees, forward, backward, inputs, cotangents


def _shapes(variables):
  shape = lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
  return tuple(shape(var.aval) for var in variables)


def _has_gradient(leaf):
  return jnp.issubdtype(leaf.dtype, jnp.inexact)
