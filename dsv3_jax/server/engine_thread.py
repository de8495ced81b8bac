"""The engine in a thread of its own, for callers in other threads.

Only this thread runs the engine. Callers put new and cancelled requests into
lists, which the thread reads between two steps. They may read the engine's
limits and counts, and check requests; none of this changes it. The thread
passes each token to the callback of its request. Callbacks run in the thread;
they must neither block nor raise.
"""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax.inference import engine, engine_stats
from dsv3_jax.inference import request as requests
from dsv3_jax.server import histogram

Callback = Callable[[requests.TokenOutput], Any]
_DECADES = [10.0**i for i in range(-3, 4)]
_SECONDS = [x * y for x in _DECADES for y in (1, 2.5, 5)]
_TOKENS = [x * 10**i for i in range(6) for x in (1, 2, 5)]


class QueueFull(Exception):
  """The queue has no room for another request: try again later."""


class Closed(Exception):
  """The thread has ended, by `close` or by an error."""


class Latencies:
  """Seconds and tokens of requests.

  first_token, whole: seconds from `submit` to the first and the last token.
  between_tokens: seconds from a token to the next. prompt_tokens, tokens: of
  requests that have ended.
  """

  def __init__(self):
    self.first_token = histogram.Histogram(_SECONDS)
    self.between_tokens = histogram.Histogram(_SECONDS)
    self.whole = histogram.Histogram(_SECONDS)
    self.prompt_tokens = histogram.Histogram(_TOKENS)
    self.tokens = histogram.Histogram(_TOKENS)


@dataclasses.dataclass
class _Progress:
  """When a request came, when it got its last token, and how many it has."""

  submitted: float
  last_token: float = 0.0
  num_tokens: int = 0


class EngineThread:
  """Runs an engine's steps while there is anything to do.

  A request is open until its last token, or until its caller cancels it.

  counts: of requests, accepted and refused, and of those that have ended, by
  reason: 'stop', 'length' or 'abort'; of tokens: of prompts, of those that the
  prefix cache was searched for and that it had, and of generated ones.
  """

  def __init__(
    self,
    model_engine: engine.Engine,
    max_waiting: int,
    warm_up: Sequence[engine.StepShape] = (),
    on_progress: Callable[[int], Any] = lambda done: None,
  ):
    """Args:
    max_waiting: requests that may wait beside those that run.
    warm_up: shapes to compile first; `on_progress` is called with how many of
      them are compiled, in the thread.
    """
    self._engine, self._warm_up_shapes = model_engine, warm_up
    self._on_progress = on_progress
    self.is_ready = not warm_up
    self.max_open = model_engine.max_running + max_waiting
    self.error: BaseException | None = None
    self.counts = collections.Counter()
    self.latencies = Latencies()
    # The condition guards what callers and the thread share.
    self._changed = threading.Condition()
    self._callbacks: dict[requests.Request, Callback] = {}  # of open requests
    self._new: list[requests.Request] = []
    self._cancelled: list[tuple[requests.Request, str]] = []
    self._progress: dict[requests.Request, _Progress] = {}
    self._closing = False
    # Used by the thread alone: requests in the engine.
    self._submitted: set[requests.Request] = set()
    self._thread = threading.Thread(target=self._run, name='model', daemon=True)
    self._thread.start()

  def submit(self, request: requests.Request, callback: Callback) -> None:
    """Submits a request; returns at once.

    Raises:
      InputError: as `Engine.check`.
      QueueFull, Closed: the request was not taken.
    """
    self._engine.check(request.prompt, request.max_new_tokens)
    with self._changed:
      if self._closing or self.error is not None:
        raise Closed
      if len(self._callbacks) >= self.max_open:
        self.counts['refused'] += 1
        raise QueueFull
      self._callbacks[request] = callback
      self._progress[request] = _Progress(time.monotonic())
      self._new.append(request)
      self._changed.notify()

  def cancel(self, request: requests.Request, reason: str = 'abort') -> None:
    """Cancels an open request; its callback is not called again.

    Args:
      reason: why it ends, as `counts` has it.
    """
    with self._changed:
      if self._callbacks.pop(request, None) is None:
        return
      self._cancelled.append((request, reason))
      self._changed.notify()

  def stop(self) -> None:
    """Ends the thread after its step; aborts all open requests."""
    with self._changed:
      self._closing = True
      self._changed.notify()

  def close(self) -> None:
    """Stops the thread, and waits until it has ended."""
    self.stop()
    self._thread.join()

  @property
  def is_alive(self) -> bool:
    return self._thread.is_alive()

  @property
  def waiting(self) -> int:
    """Open requests that do not run yet."""
    return max(len(self._callbacks) - self.running, 0)

  @property
  def running(self) -> int:
    return self.stats().running

  def stats(self) -> engine_stats.EngineStats:
    """As `Engine.stats`."""
    return self._engine.stats()

  @property
  def vocab_size(self) -> int:
    """Of the model."""
    return self._engine.vocab_size

  def max_new_tokens(self, prompt_length: int) -> int:
    """As `Engine.max_new_tokens`."""
    return self._engine.max_new_tokens(prompt_length)

  def _run(self) -> None:
    try:
      self._warm_up()
      while self._read():
        for output in self._engine.step():
          self._report(output)
    except BaseException as error:  # noqa: BLE001 - `error` keeps it
      traceback.print_exception(error)
      self.error = error
    with self._changed:
      self._closing = True
      for request, callback in self._callbacks.items():
        callback(requests.TokenOutput(request, None, 'aborted'))
      self._callbacks.clear()

  def _warm_up(self) -> None:
    for done, shape in enumerate(self._warm_up_shapes, 1):
      if self._closing:
        return
      self._engine.warm_up(shape)
      self._on_progress(done)
    self.is_ready = True

  def _read(self) -> bool:
    """Adds new and cancels cancelled requests; waits if there is no work.

    Returns:
      False if the thread is to end.
    """
    with self._changed:
      while not (self._closing or self._new or self._cancelled):
        if not self._engine.is_idle:
          break
        self._changed.wait()
      if self._closing:
        return False
      new = [request for request in self._new if request in self._callbacks]
      self._new = []
      cancelled, self._cancelled = self._cancelled, []
    for request in new:
      self._engine.add(request)
      self._submitted.add(request)
      self.counts['requests'] += 1
      self.counts['prompt_tokens'] += len(request.prompt)
    for request, reason in cancelled:
      if request in self._submitted:
        self._engine.cancel(request)
        self._end(request, reason)
      self._progress.pop(request, None)
    return True

  def _report(self, output: requests.TokenOutput) -> None:
    """Counts a token, and passes it to the callback of its request."""
    request = output.request
    self._count_token(request)
    if output.is_last:
      self._end(request, output.finish_reason)
    with self._changed:
      callback = self._callbacks.get(request)
      if output.is_last:
        self._callbacks.pop(request, None)
      if callback is not None:
        callback(output)

  def _count_token(self, request: requests.Request) -> None:
    now, progress = time.monotonic(), self._progress[request]
    self.counts['tokens'] += 1
    if progress.num_tokens:
      self.latencies.between_tokens.observe(now - progress.last_token)
    else:
      self.latencies.first_token.observe(now - progress.submitted)
      self.counts['cached_tokens'] += request.num_cached_tokens
      if not request.sampling.prompt_logprobs:  # these are not looked for
        self.counts['searched_tokens'] += len(request.prompt)
    progress.last_token = now
    progress.num_tokens += 1

  def _end(self, request: requests.Request, reason: str) -> None:
    """Counts a request that ends, and forgets it."""
    self._submitted.remove(request)
    progress = self._progress.pop(request)
    self.counts[reason] += 1
    self.latencies.whole.observe(time.monotonic() - progress.submitted)
    self.latencies.prompt_tokens.observe(len(request.prompt))
    self.latencies.tokens.observe(progress.num_tokens)
