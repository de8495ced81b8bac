"""Branches of an SPMD program as loops of zero turns or one.

What a loop carries stays in place, gradient sums above all. What passes through
a conditional may be copied. A loop has two pitfalls of its own, which
`run_branch` and `after_branches` avoid:

  The compiler hoists what does not depend on the turn out of the loop, so that
  it would run in every tick, whichever branch is taken.
  Loops that share no result may be reordered.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
State = dict[str, Any]


def when(condition: jax.Array, act: Callable[[Tree], Tree], state: Tree) -> Any:
  """`act(state)` if the condition holds, in place; else the state."""
  turns = condition.astype(jnp.int32)
  return jax.lax.fori_loop(0, turns, lambda _, state: act(state), state)


def run_branch(
  taken: jax.Array,
  act: Callable[..., State],
  embedded: Tree,
  row: dict[Any, jax.Array],
  state: State,
) -> State:
  """`act(embedded, row, state)` if the branch is taken; else the state.

  Operands seem to depend on the turn, which `act` finds in the row as 'turn'
  for operands that it reads out of the state itself.
  """

  def run_turn(turn, state):
    late_row = {name: depend_on(value, turn) for name, value in row.items()}
    late_embedded = jax.tree.map(lambda x: depend_on(x, turn), embedded)
    return act(late_embedded, late_row | {'turn': turn}, state)

  return jax.lax.fori_loop(0, taken.astype(jnp.int32), run_turn, state)


def depend_on(x: jax.Array, turn: jax.Array) -> jax.Array:
  """x, but not known before a loop's turn."""
  return jnp.where(turn < 0, jnp.zeros_like(x), x)


def after_branches(state: State) -> jax.Array:
  """True, but only known when the loops of all branches have run.

  Otherwise a buffer that one loop reads and a later one writes would be copied.
  And where an exchange blocks, a rank might wait in it before it has run its
  own action, while others wait for the result of that action.
  """
  return state['acted'] >= 0
