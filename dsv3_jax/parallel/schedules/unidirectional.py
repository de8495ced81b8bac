"""Schedules whose micro-batches all enter at the first rank.

GPipe (arXiv 1811.06965), 1F1B (PipeDream, Megatron), interleaved 1F1B (arXiv
2104.04473) and ZB1P (arXiv 2401.10241, there ZB-H1). Each function gives the
order of every rank; `r` is a rank, `m` a micro-batch.
"""

from dsv3_jax.parallel.schedules import actions
from dsv3_jax.parallel.schedules.actions import BACKWARD, INPUT, WEIGHT, Action

Orders = tuple[tuple[Action, ...], ...]


def gpipe(ranks: int, microbatches: int) -> Orders:
  """All forwards, then all backwards, the last micro-batch first."""
  orders = []
  for r in range(ranks):
    order = [actions.forward(r, m) for m in range(microbatches)]
    order += [
      actions.backward(BACKWARD, r, m) for m in reversed(range(microbatches))
    ]
    orders.append(tuple(order))
  return tuple(orders)


def one_f_one_b(ranks: int, microbatches: int) -> Orders:
  """Rank r runs ranks - 1 - r warm-up forwards, then alternates."""
  warmup = [min(ranks - 1 - r, microbatches) for r in range(ranks)]
  stages = [[(r, m) for m in range(microbatches)] for r in range(ranks)]
  return tuple(
    _alternate(stages[r], stages[r], warmup[r]) for r in range(ranks)
  )


def interleaved(ranks: int, microbatches: int, chunks: int) -> Orders:
  """1F1B with stages r, r + ranks, r + 2 ranks, ... on rank r.

  A rank takes `ranks` micro-batches through one chunk before it takes them
  through its next one, so `microbatches` is a multiple of `ranks`.
  """
  orders = []
  for r in range(ranks):
    forwards = [
      (r + chunk * ranks, start + m)
      for start in range(0, microbatches, ranks)
      for chunk in range(chunks)
      for m in range(ranks)
    ]
    backwards = [
      ((chunks - 1) * ranks + 2 * r - stage, m) for stage, m in forwards
    ]
    warmup = min(2 * (ranks - 1 - r) + (chunks - 1) * ranks, len(forwards))
    orders.append(_alternate(forwards, backwards, warmup))
  return tuple(orders)


def _alternate(
  forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], warmup: int
) -> tuple[Action, ...]:
  """`warmup` forwards, then 1F1B, then the remaining backwards."""
  order = [actions.forward(*key) for key in forwards[:warmup]]
  for done, key in enumerate(backwards):
    if warmup + done < len(forwards):
      order.append(actions.forward(*forwards[warmup + done]))
    order.append(actions.backward(BACKWARD, *key))
  return tuple(order)


def zb1p(ranks: int, microbatches: int) -> Orders:
  """1F1B in which rank r delays its weight gradients by r micro-batches.

  The delayed weight gradients fill the end, where 1F1B is idle. Every rank
  then holds `ranks` activations, as the first rank of 1F1B does. microbatches
  >= ranks.
  """
  orders = []
  for r in range(ranks):
    warmup = ranks - 1 - r
    order = [actions.forward(r, m) for m in range(warmup)]
    for m in range(microbatches):
      if warmup + m < microbatches:
        order.append(actions.forward(r, warmup + m))
      order.append(actions.backward(INPUT, r, m))
      if m >= r:
        order.append(actions.backward(WEIGHT, r, m - r))
    order += [
      actions.backward(WEIGHT, r, m)
      for m in range(microbatches - r, microbatches)
    ]
    orders.append(tuple(order))
  return tuple(orders)


def split_backwards(orders: Orders) -> Orders:
  """Every full backward as its input half and its weight half after it."""
  return tuple(
    tuple(
      part
      for action in order
      for part in (
        [
          actions.backward(
            kind, action.backward.stage, action.backward.microbatch
          )
          for kind in (INPUT, WEIGHT)
        ]
        if action.kind == BACKWARD
        else [action]
      )
    )
    for order in orders
  )
