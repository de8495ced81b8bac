"""Programs as flat lists of jaxpr equations, and where to cut them in two.

Values that the early part computes and the late part reads cross the cut and
are stored in between. `cut` finds the cut that stores the fewest bytes. Only
cheap equations may run in both parts: those of `_LAYOUT`, which copy or cast,
and `_LIGHT` equations and all-gathers that read nothing but `given`
(parameters). `_LIGHT` equations of the late part may move to the early part,
since a sum over tokens or a cast to FP8 is smaller than its operand.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from dsv3_jax.parallel.pipeline import min_cut

Atom = core.Var | core.Literal
Equation = core.JaxprEqn

_CALLS = (
  core.primitives.jit_p,
  core.primitives.call_p,
  core.primitives.closed_call_p,
  core.primitives.remat_p,
  core.primitives.custom_jvp_call_p,
  core.primitives.custom_vjp_call_p,
)
_INFINITE = 1 << 62  # bytes; capacity of edges that must not be cut
# Copies and casts: running them twice costs less than storing their results.
_LAYOUT = """
broadcast_in_dim convert_element_type copy expand_dims name pvary reshape
squeeze transpose
"""
# They read their inputs once, and XLA fuses them with what computes those.
_LIGHT = """
abs add add_any and argmax argmin bitcast_convert_type cbrt ceil clamp
concatenate cos div dynamic_slice eq erf exp exp2 expm1 floor ge gt integer_pow
iota is_finite le log log1p logistic lt max min mul ne neg not or pad
population_count pow reduce_and reduce_max reduce_min reduce_or reduce_precision
reduce_prod reduce_sum rem rev round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin slice split sqrt square
stack stop_gradient sub tan tanh unstack xor
"""
_LAYOUT = frozenset(_LAYOUT.split())
_LIGHT = _LAYOUT.union(_LIGHT.split())
_GATHERS = _LIGHT.union(['all_gather'])


class InlinedProgram(NamedTuple):
  """Equations in an order of execution, without calls.

  consts: values of variables that are neither computed nor inputs.
  """

  equations: list[Equation]
  outputs: list[Atom]
  consts: dict[core.Var, Any]


class ProgramCut(NamedTuple):
  """Equations of both parts, and the variables that cross."""

  early: list[Equation]
  late: list[Equation]
  crossing: list[core.Var]


def inline(closed: core.ClosedJaxpr, inputs: Sequence[Atom]) -> InlinedProgram:
  """The jaxpr on other inputs, with the bodies of calls in their place.

  `jit`, `remat` and custom derivatives are calls; `scan`, `while`, `cond`,
  `shard_map` and kernels stay equations.
  """
  equations, consts = [], {}

  def walk(jaxpr, values, inputs, scope):
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, values, strict=True):
      env[var] = core.Var(var.aval)
      consts[env[var]] = value
    read = lambda atom: env[atom] if isinstance(atom, core.Var) else atom
    for eqn in jaxpr.eqns:
      args, source = [read(atom) for atom in eqn.invars], eqn.source_info
      names = source.name_stack
      names = names if scope is None else scope + names
      if eqn.primitive in _CALLS:
        results = walk(*_callee(eqn), args, names)
      else:
        results = [core.Var(var.aval) for var in eqn.outvars]
        source = source.replace(name_stack=names)
        new = eqn.replace(invars=args, outvars=results, source_info=source)
        equations.append(new)
      env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  outputs = walk(closed.jaxpr, closed.consts, inputs, None)
  return InlinedProgram(equations, outputs, consts)


def _callee(eqn):
  """The jaxpr that a call runs, and its constants."""
  name = 'jaxpr' if 'jaxpr' in eqn.params else 'call_jaxpr'
  jaxpr = eqn.params[name]
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def close(
  equations: Sequence[Equation],
  inputs: Sequence[core.Var],
  outputs: Sequence[Atom],
  consts: dict[core.Var, Any],
) -> core.ClosedJaxpr:
  """The jaxpr of those equations that the outputs need."""
  equations = needed(equations, outputs)
  read = {var for eqn in equations for var in variables(eqn.invars)}
  read.update(variables(outputs))
  used = {var: value for var, value in consts.items() if var in read}
  jaxpr = core.Jaxpr(
    constvars=list(used),
    invars=inputs,
    outvars=outputs,
    eqns=equations,
    effects=set().union(*(eqn.effects for eqn in equations)),
    debug_info=core.DebugInfo('split', '', None, None),
  )
  return core.ClosedJaxpr(jaxpr, list(used.values()))


def variables(atoms: Iterable[Atom]) -> list[core.Var]:
  """The atoms that are not literals."""
  return [atom for atom in atoms if isinstance(atom, core.Var)]


def needed(
  equations: Sequence[Equation], outputs: Iterable[Atom]
) -> list[Equation]:
  """Those equations on which the outputs depend."""
  live, kept = set(variables(outputs)), []
  for eqn in reversed(equations):
    if live.intersection(eqn.outvars):
      live.update(variables(eqn.invars))
      kept.append(eqn)
  return kept[::-1]


def derivable(
  equations: Sequence[Equation], given: Iterable[core.Var]
) -> set[core.Var]:
  """`given`, and what light equations and all-gathers compute from it."""
  known = set(given)
  for eqn in equations:
    if _is(eqn, _GATHERS) and known.issuperset(variables(eqn.invars)):
      known.update(eqn.outvars)
  return known


def _is(eqn, names):
  return eqn.primitive.name in names and not eqn.effects


def num_bytes(var: core.Var) -> int:
  """Bytes of a variable's value."""
  return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def cut(
  early: Sequence[Equation],
  late: Sequence[Equation],
  outputs: Iterable[Atom],
  given: Iterable[core.Var],
  unknown: Iterable[core.Var] = (),
) -> ProgramCut:
  """Finds what to store between two parts of a program.

  Args:
    early, late: all equations of the parts, each in order.
    outputs: of the late part.
    given: inputs of both parts.
    unknown: inputs of the late part only.
  Returns:
    early: the given equations and those moved from the late part. late: the
    equations that it needs, among them copies of early ones.
  """
  outputs, known = list(outputs), derivable([*early, *late], given)
  late = needed([*_repeatable(early, known), *late], outputs)
  early_ids = set(map(id, early))
  taken = _taken(early_ids, late, outputs, known, set(unknown))
  moved = [
    eqn
    for eqn in late
    if id(eqn) not in early_ids
    and (id(eqn) in taken or known.issuperset(eqn.outvars))
  ]
  late = needed([eqn for eqn in late if id(eqn) not in taken], outputs)
  computed = {var for eqn in late for var in eqn.outvars}.union(unknown, known)
  read = [var for eqn in late for var in variables(eqn.invars)]
  read += variables(outputs)
  crossing = [var for var in dict.fromkeys(read) if var not in computed]
  return ProgramCut([*early, *moved], late, crossing)


def _repeatable(early, known):
  """Early equations that the late part may run again."""
  for eqn in early:
    if _is(eqn, _LAYOUT) or known.issuperset(eqn.outvars):
      yield eqn


def _taken(early_ids, late, outputs, known, unknown):
  """Ids of the late equations that the early part is to run.

  The graph has a node for each equation that could be in either part, and one
  for each variable, which is on the late side if a late equation reads it.

  Args:
    early_ids: ids of the early part's own equations.
  """
  maker, edges = {}, []
  for eqn in late:
    if known.issuperset(eqn.outvars):
      continue  # it runs in each part that needs it
    read = [v for v in variables(eqn.invars) if v not in known]
    producers = [maker.get(v, 'early') for v in read]
    movable = _is(eqn, _LIGHT) and 'late' not in producers
    movable = movable and not unknown.intersection(read)
    node = id(eqn) if movable else 'late'
    maker.update((v, node) for v in eqn.outvars)
    edges += [(v, node, _INFINITE) for v in read]
    if movable and id(eqn) not in early_ids:
      # If it runs early, so must the equations whose results it reads.
      edges += [(node, by, _INFINITE) for by in producers if by != 'early']
  edges += [
    (v, 'late', _INFINITE) for v in variables(outputs) if v not in known
  ]
  tails = dict.fromkeys(tail for tail, _, _ in edges)
  for v in tails:
    if isinstance(v, core.Var) and v not in unknown:
      edges.append((maker.get(v, 'early'), v, num_bytes(v)))
  return min_cut.source_side(edges, 'early', 'late')
