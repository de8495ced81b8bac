"""Programs cut in two: what crosses against every possible choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dsv3_jax.parallel.pipeline import jaxpr_partition

COPIES = ('broadcast_in_dim', 'convert_element_type', 'transpose')


def random_program(rng):
  """A function of x [4, 4] and w [4, 4] whose steps are of all kinds."""
  steps = []
  for count in range(int(rng.integers(4, 9))):
    kind = rng.choice(['copy', 'cast', 'add', 'sum', 'spread', 'product'])
    steps.append((kind, *rng.integers(0, count + 2, 2)))

  def run(x, w):
    values = [x, w]
    for kind, i, j in steps:
      a, b = values[i], values[j].astype(values[i].dtype)
      if kind == 'cast':
        half = a.dtype == jnp.float32
        values.append(a.astype(jnp.bfloat16 if half else jnp.float32))
      elif kind == 'add':
        values.append(a + b)
      elif kind == 'sum':
        values.append(a.sum(1, dtype=a.dtype, keepdims=True))
      elif kind == 'product' and a.shape == b.shape == (4, 4):
        values.append(a @ b)
      elif kind == 'spread' and a.shape == (4, 1):
        values.append(jnp.broadcast_to(a, (4, 4)))
      else:
        values.append(a.T if a.shape == (4, 4) else -a)
    return values[2:]

  closed = jax.make_jaxpr(run)(jnp.ones((4, 4)), jnp.ones((4, 4)))
  inputs = [core.Var(var.aval) for var in closed.jaxpr.invars]
  return jaxpr_partition.inline(closed, inputs), inputs


def least_bytes(early, late, outputs, known):
  """Bytes of the best cut of all."""
  ours = {id(eqn) for eqn in early}
  copies = [e for e in early if e.primitive.name in COPIES]
  pool = [*copies, *late]
  best = None
  for mask in itertools.product([False, True], repeat=len(pool)):
    later = [eqn for eqn, use in zip(pool, mask, strict=True) if use]
    sooner = [e for e in pool if not any(e is x for x in later)]
    moved = [e for e in sooner if id(e) not in ours]
    there = {v for e in [*early, *moved] for v in e.outvars}
    later_made = {v for e in later for v in e.outvars}
    if any(e.primitive.name == 'dot_general' for e in moved):
      continue
    if any(
      v in later_made and v not in there
      for e in moved
      for v in jaxpr_partition.variables(e.invars)
    ):
      continue
    read = {v for e in later for v in jaxpr_partition.variables(e.invars)}
    read.update(jaxpr_partition.variables(outputs))
    crossing = read - later_made - known
    size = sum(jaxpr_partition.num_bytes(v) for v in crossing)
    best = size if best is None else min(best, size)
  return best


@pytest.mark.parametrize('seed', range(60))
def test_no_choice_stores_less(seed):
  rng = np.random.default_rng(seed)
  program, (_, w) = random_program(rng)
  first, second = rng.integers(0, len(program.outputs), 2)
  early = jaxpr_partition.needed(program.equations, [program.outputs[first]])
  outputs = [program.outputs[second], program.outputs[-1]]
  ours = {id(eqn) for eqn in early}
  late = jaxpr_partition.needed(program.equations, outputs)
  late = [eqn for eqn in late if id(eqn) not in ours]
  known = jaxpr_partition.derivable(program.equations, [w])
  split = jaxpr_partition.cut(early, late, outputs, [w])
  got = sum(jaxpr_partition.num_bytes(v) for v in split.crossing)
  assert got == least_bytes(early, late, outputs, known)


@pytest.mark.parametrize('seed', range(60))
def test_parts_compute_what_the_whole_does(seed):
  rng = np.random.default_rng(seed)
  program, inputs = random_program(rng)
  cut_at = int(rng.integers(0, len(program.equations) + 1))
  early, late = program.equations[:cut_at], program.equations[cut_at:]
  outputs = program.outputs[-3:]
  split = jaxpr_partition.cut(early, late, outputs, inputs[1:])
  run = lambda *args: core.jaxpr_as_fun(jaxpr_partition.close(*args, {}))
  x, w = (jnp.asarray(rng.normal(size=(4, 4)), 'float32') for _ in range(2))
  stored = run(split.early, inputs, split.crossing)(x, w)
  got = run(split.late, [*inputs[1:], *split.crossing], outputs)(w, *stored)
  for a, b in zip(
    got, run([*early, *late], inputs, outputs)(x, w), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_what_is_unknown_early_is_used_late_only():
  closed = jax.make_jaxpr(lambda x, dy: (x.sum(), (x * dy).sum()))(
    jnp.ones((8, 8)), jnp.ones((8, 8))
  )
  inputs = [core.Var(var.aval) for var in closed.jaxpr.invars]
  early, *late = jaxpr_partition.inline(closed, inputs).equations
  outputs = late[-1].outvars
  # With dy at hand, the sum itself is stored; without, all of x.
  assert jaxpr_partition.cut([early], late, outputs, ()).crossing == outputs
  split = jaxpr_partition.cut([early], late, outputs, (), inputs[1:])
  assert split.crossing == inputs[:1]
  assert split.late == late


def cut_behind_the_first(function, args, given=()):
  """What crosses behind a program's first equation, and the late results."""
  closed = jax.make_jaxpr(function)(*args)
  inputs = [core.Var(var.aval) for var in closed.jaxpr.invars]
  early, *late = jaxpr_partition.inline(closed, inputs).equations
  outputs = late[-1].outvars
  own = [inputs[i] for i in given]
  split = jaxpr_partition.cut([early], late, outputs, own)
  run = lambda *parts: core.jaxpr_as_fun(jaxpr_partition.close(*parts, {}))
  stored = run(split.early, inputs, split.crossing)(*args)
  values = [args[i] for i in given]
  got = run(split.late, [*own, *split.crossing], outputs)(*values, *stored)
  np.testing.assert_allclose(got[0], function(*args), rtol=1e-6)
  return [var.aval.shape for var in split.crossing]


def test_nothing_is_moved_before_what_it_reads():
  def function(small, large):
    large = jnp.sin(large)
    spread = jnp.exp(small)[:, None] * jnp.ones(16)
    return jnp.sum(large + spread) + (spread @ spread.T)[0, 0]

  args = jnp.arange(16.0) / 16.0, jnp.ones((16, 16))
  # The sum would be stored with `small`, if `spread` could be made twice.
  shapes = cut_behind_the_first(function, args)
  assert sorted(shapes) == [(), (16, 16)]


def test_what_moves_takes_functions_of_what_is_given_along():
  function = lambda w, x: jnp.sum(jnp.sin(x) * jnp.exp(w))
  args = jnp.arange(3.0), jnp.ones((16, 3))
  assert cut_behind_the_first(function, args, given=[0]) == [()]


def test_calls_are_inlined_each_time_anew():
  inner = jax.jit(lambda x: jnp.sin(x) * 2.0)
  again = jax.checkpoint(lambda x: inner(x) + jnp.arange(3.0))

  def twice(x):
    with jax.named_scope('outer'):
      return again(again(x))

  closed = jax.make_jaxpr(jax.jit(twice))(jnp.ones(3))
  inputs = [core.Var(var.aval) for var in closed.jaxpr.invars]
  program = jaxpr_partition.inline(closed, inputs)
  names = [eqn.primitive.name for eqn in program.equations]
  assert names.count('sin') == 2
  assert not {'jit', 'remat2', 'checkpoint'}.intersection(names)
  computed = [var for eqn in program.equations for var in eqn.outvars]
  assert len(computed) == len(set(computed))
  scopes = {str(eqn.source_info.name_stack) for eqn in program.equations}
  assert all(scope.startswith('outer') for scope in scopes), scopes
  run = jaxpr_partition.close(
    program.equations, inputs, program.outputs, program.consts
  )
  x = jnp.array([0.1, 0.2, 0.3])
  got = core.jaxpr_as_fun(run)(x)[0]
  np.testing.assert_allclose(got, twice(x), rtol=1e-6)
