"""Branches of an SPMD program as loops of zero or one iterations.

A loop updates what it carries in place, such as the gradient sums. A
conditional may copy it. Loops have two pitfalls:

  The compiler hoists whatever does not depend on the iteration out of the loop.
  It would then run in every tick, whichever branch is taken. In `run_branch`
  all operands depend on it (`depend_on`).
  The compiler may reorder loops that share no result. `after_branches` orders
  what must come after the branches.

`when` is for work that all ranks do together, such as the head. It reads what
the branches gave, and its condition is joined with `after_branches`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
State = dict[str, Any]


def when(condition: jax.Array, act: Callable[[Tree], Tree], state: Tree) -> Any:
  """`act(state)` if the condition holds, in place; else the state."""
  iterations = condition.astype(jnp.int32)
  return jax.lax.fori_loop(0, iterations, lambda _, state: act(state), state)


def run_branch(
  taken: jax.Array,
  act: Callable[..., State],
  embedded: Tree,
  row: dict[Any, jax.Array],
  state: State,
) -> State:
  """`act(embedded, row, state)` if the branch is taken; else the state.

  The operands of `act` seem to depend on the iteration, so that nothing is
  hoisted. `act` gets the iteration as row['iteration'] and applies `depend_on`
  to operands that it reads from the state.
  """

  def run_iteration(iteration, state):
    late_row = {name: depend_on(x, iteration) for name, x in row.items()}
    late_embedded = jax.tree.map(lambda x: depend_on(x, iteration), embedded)
    return act(late_embedded, late_row | {'iteration': iteration}, state)

  iterations = taken.astype(jnp.int32)
  return jax.lax.fori_loop(0, iterations, run_iteration, state)


def depend_on(x: jax.Array, iteration: jax.Array) -> jax.Array:
  """x, which the compiler cannot compute before the loop's iteration."""
  return jnp.where(iteration < 0, jnp.zeros_like(x), x)


def after_branches(state: State) -> jax.Array:
  """True, computed from the result of all branches' loops.

  What depends on it runs after those loops. Otherwise a buffer that one loop
  reads and a later one writes would be copied. And a rank might enter a
  blocking exchange before it has run its own action, while other ranks wait for
  that action's result: a deadlock.
  """
  return state['acted'] >= 0
