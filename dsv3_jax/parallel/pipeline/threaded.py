"""Reference: runs a schedule with a thread a rank, a program an action.

Training does not use it. Tests compare the SPMD executor with it, and
benchmarks measure bubbles with it. Each rank runs its own order of actions and
waits for its operands. There is no common clock, no table and no slot.

A stage is a function `(params, x, consts) -> (y, aux)` of one micro-batch. The
first stage has x = (). The last stage has its losses in aux and y = ().
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.pipeline import split_backward
from dsv3_jax.parallel.schedules import actions, simulate, validate

Tree = Any


class ThreadedStage(NamedTuple):
  """A stage's functions and their operands.

  consts: of each micro-batch. daux: the gradient of aux, the same for every
  micro-batch.
  """

  functions: split_backward.StageFunctions
  params: Tree
  consts: Sequence[Tree]
  daux: Tree


class ThreadedResult(NamedTuple):
  """grads: of each stage, f32 sums. aux: by task. timeline: in seconds."""

  grads: list[Tree]
  aux: dict[actions.Task, Tree]
  timeline: simulate.Timeline


class ThreadedExecutor:
  """A schedule on devices, one a rank; compiled at the first `run`."""

  def __init__(
    self,
    schedule: actions.Schedule,
    stages: Sequence[ThreadedStage],
    devices: Sequence[jax.Device],
  ):
    if len(devices) != schedule.ranks or len(stages) != schedule.stages:
      raise ValueError(
        f'{len(devices)} devices and {len(stages)} stages must be '
        f'{schedule.ranks} and {schedule.stages}'
      )
    validate.check_work(schedule)
    self.schedule, self.stages, self.devices = schedule, stages, devices
    self._programs: dict[tuple, Callable] = {}

  def run(self, timeout: float = 120.0) -> ThreadedResult:
    """Plays the schedule once.

    Raises:
      Exception: the first that any rank raised.
      TimeoutError: for `timeout` seconds no rank has finished an action.
    """
    mail = _Mail(self.schedule)
    ranks = [_Rank(self, rank, mail) for rank in range(self.schedule.ranks)]
    start = threading.Barrier(len(ranks))
    threads = [
      threading.Thread(target=rank.run, args=(start,), daemon=True)
      for rank in ranks
    ]
    for thread in threads:
      thread.start()
    mail.watch(len(ranks), timeout)
    begun = min(rank.starts[0] for rank in ranks)
    since = lambda rows: [[at - begun for at in row] for row in rows]
    return ThreadedResult(
      grads=self._sums([rank.grads for rank in ranks]),
      aux=functools.reduce(dict.__or__, (rank.aux for rank in ranks)),
      timeline=simulate.Timeline(
        starts=since([rank.starts for rank in ranks]),
        ends=since([rank.ends for rank in ranks]),
      ),
    )

  def _sums(self, grads: list[dict[int, Tree]]) -> list[Tree]:
    """Gradients of each stage, of all ranks that hold it."""
    sums = []
    for stage in range(self.schedule.stages):
      held = [rank_grads[stage] for rank_grads in grads if stage in rank_grads]
      moved = jax.device_put(held, self.devices[0])
      sums.append(functools.reduce(_add, moved))
    return sums

  def program(self, action: actions.Action) -> Callable:
    """The compiled function of an action, over (backward, forward) operands."""
    key = (
      action.kind,
      *(task and task.stage for task in (action.backward, action.forward)),
    )
    if key not in self._programs:
      has_backward, has_forward = (stage is not None for stage in key[1:])
      name = {
        actions.INPUT: 'backward_input',
        actions.WEIGHT: 'backward_weight',
      }.get(action.kind, 'backward')
      functions = lambda stage: self.stages[stage].functions
      backward = has_backward and getattr(functions(key[1]), name)
      forward = has_forward and functions(key[2]).forward

      def run(backward_operands, forward_operands):
        return (
          has_backward and backward(*backward_operands),
          has_forward and forward(*forward_operands),
        )

      self._programs[key] = jax.jit(run)
    return self._programs[key]


class _Mail:
  """Results by number (see `validate`), and what the caller watches."""

  def __init__(self, schedule: actions.Schedule):
    self._schedule, self._changed = schedule, threading.Condition()
    self._results, self._waiting = {}, {}
    self._steps, self._finished, self._error = 0, 0, None

  def put(self, results: dict[int, Tree], finished: bool = False) -> None:
    """Adds the results of an action, and reports progress to `watch`."""
    with self._changed:
      self._results |= results
      self._steps += 1
      self._finished += finished
      self._changed.notify_all()

  def fail(self, error: BaseException) -> None:
    """Stops the wait of all ranks and of the caller."""
    with self._changed:
      self._error = self._error or error
      self._changed.notify_all()

  def take(self, rank: int, result: int) -> Tree:
    """Waits for a result, which only one rank needs, and removes it."""
    with self._changed:
      self._waiting[rank] = result
      self._changed.wait_for(lambda: result in self._results or self._error)
      if self._error:
        raise _OtherRank
      del self._waiting[rank]
      return self._results.pop(result)

  def watch(self, ranks: int, timeout: float) -> None:
    """Waits until all ranks are done.

    Raises:
      Exception: that of a rank.
      TimeoutError: no rank has made progress for `timeout` seconds.
    """
    with self._changed:
      while self._finished < ranks and not self._error:
        before = self._steps
        moved = lambda before=before: self._steps != before or self._error
        if not self._changed.wait_for(moved, timeout):
          waits = [
            f'rank {rank} waits for {validate.describe(self._schedule, result)}'
            for rank, result in sorted(self._waiting.items())
          ]
          self._error = TimeoutError(
            f'no rank has finished an action in {timeout} s: '
            f'{"; ".join(waits) or "all are at work"}'
          )
          self._changed.notify_all()
      if self._error:
        raise self._error


class _OtherRank(Exception):
  """Another rank failed, and its error is raised."""


class _Rank:
  """The state of a rank that runs its order of actions."""

  def __init__(self, executor: ThreadedExecutor, rank: int, mail: _Mail):
    self._executor, self._rank, self._mail = executor, rank, mail
    self._schedule = executor.schedule
    self._device = executor.devices[rank]
    put = lambda stage: jax.device_put(
      (stage.params, stage.consts, stage.daux), self._device
    )
    held = self._schedule.held(rank)
    self._own = {stage: put(executor.stages[stage]) for stage in held}
    self._residuals, self._carry = {}, {}
    self.grads, self.aux, self.starts, self.ends = {}, {}, [], []

  def run(self, start: threading.Barrier) -> None:
    """All actions; the thread's body."""
    try:
      start.wait()
      for action in self._schedule.orders[self._rank]:
        self._act(action)
      self._mail.put({}, finished=True)
    except _OtherRank:
      return
    except BaseException as error:  # noqa: BLE001 the caller raises it
      self._mail.fail(error)

  def _act(self, action: actions.Action) -> None:
    program = self._executor.program(action)
    operands = self._backward_operands(action), self._forward_operands(action)
    self.starts.append(time.perf_counter())
    from_backward, from_forward = jax.block_until_ready(program(*operands))
    self.ends.append(time.perf_counter())
    results, width = {}, self._schedule.microbatches
    if (task := action.forward) is not None:
      y, self.aux[task], self._residuals[task] = from_forward
      if task.stage < self._schedule.stages - 1:
        results[task.stage * width + task.microbatch] = y
    if (task := action.backward) is not None:
      if action.kind == actions.WEIGHT:
        self._add(task, from_backward)
      else:
        dx, rest = from_backward
        if action.kind == actions.INPUT:
          self._carry[task] = rest
        else:
          self._add(task, rest)
        if task.stage:
          result = self._schedule.stages * width
          results[result + task.stage * width + task.microbatch] = dx
    self._mail.put(results)

  def _forward_operands(self, action: actions.Action) -> tuple:
    if (task := action.forward) is None:
      return ()
    params, consts, _ = self._own[task.stage]
    x = ()
    if task.stage:
      before = (task.stage - 1) * self._schedule.microbatches
      x = self._take(before + task.microbatch)
    return params, x, consts[task.microbatch]

  def _backward_operands(self, action: actions.Action) -> tuple:
    if (task := action.backward) is None:
      return ()
    params, _, daux = self._own[task.stage]
    if action.kind == actions.WEIGHT:
      return params, self._carry.pop(task)
    dy = ()
    if task.stage < self._schedule.stages - 1:
      after = self._schedule.stages + task.stage + 1
      dy = self._take(after * self._schedule.microbatches + task.microbatch)
    return params, self._residuals.pop(task), dy, daux

  def _take(self, result: int) -> Tree:
    return jax.device_put(self._mail.take(self._rank, result), self._device)

  def _add(self, task: actions.Task, grads: Tree) -> None:
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    if task.stage in self.grads:
      grads = _add(self.grads[task.stage], grads)
    self.grads[task.stage] = grads


@jax.jit
def _add(sums: Tree, grads: Tree) -> Tree:
  return jax.tree.map(jnp.add, sums, grads)
