"""A session in a thread of its own, for callers in other threads.

Only that thread touches the session: callers leave word of new and of cancelled
requests, which it reads between two steps, and are told of tokens by a function
of theirs, called in the thread. It must neither block nor raise.
"""

import collections
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax.inference import engine


class Full(Exception):
  """As many requests wait as may wait: come back later."""


class Closed(Exception):
  """The thread has ended, by `close` or by an error."""


@dataclasses.dataclass(frozen=True)
class News:
  """A new token; or None where the thread has ended before the request."""

  token: int | None
  is_last: bool


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request as its caller knows it; `request` is None until it is read."""

  arguments: tuple
  tell: Callable[[News], Any]
  twin: 'Ticket | None' = None
  request: engine.Request | None = None
  begun: bool = False
  over: bool = False


class Worker:
  """Runs a session's steps while there is anything to do."""

  def __init__(
    self,
    session: engine.Engine,
    most_waiting: int,
    warm: Sequence[engine.Size] = (),
    progress: Callable[[int], Any] = lambda done: None,
  ):
    """Args:
    most_waiting: requests that may wait beside those that run. warm: sizes to
      be compiled first; `progress` is told how many of them are, in the thread.
    """
    self.session, self._warm, self._progress = session, warm, progress
    self.is_ready = not warm
    self.most = session.scheduler.max_rows + most_waiting
    self._open = 0  # tickets that are not over
    self.error: BaseException | None = None
    self.counts = collections.Counter()
    self._new: list[Ticket] = []
    self._cancelled: list[Ticket] = []
    self._tickets: dict[engine.Request, Ticket] = {}
    self._closing = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._run, name='model', daemon=True)
    self._thread.start()

  def submit(
    self,
    prompt: Sequence[int],
    max_new_tokens: int,
    draw: engine.Draw,
    stop_ids: Sequence[int],
    tell: Callable[[News], Any],
    twin: Ticket | None = None,
  ) -> Ticket:
    """Leaves word of a request.

    Args:
      twin: with the same prompt, which is then computed once.

    Raises:
      InputError: as `Session.submit`. Full, Closed: it was not taken.
    """
    self.session.check(prompt, max_new_tokens)
    ticket = Ticket((prompt, max_new_tokens, draw, stop_ids), tell, twin)
    with self._changed:
      if self._closing or self.error is not None:
        raise Closed
      if self._open >= self.most:
        self.counts['refused'] += 1
        raise Full
      self._open += 1
      self._new.append(ticket)
      self._changed.notify()
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Leaves word that nobody waits for it; nothing more is told of it."""
    with self._changed:
      if self._is_over(ticket, now=True):
        return
      self._cancelled.append(ticket)
      self._changed.notify()

  def stop(self) -> None:
    """Ends the thread after its step; requests that are under way are told."""
    with self._changed:
      self._closing = True
      self._changed.notify()

  def close(self) -> None:
    """Stops it, and waits until it has ended."""
    self.stop()
    self._thread.join()

  @property
  def is_alive(self) -> bool:
    return self._thread.is_alive()

  @property
  def waiting(self) -> int:
    """Requests that have got no row yet."""
    return max(self._open - self.running, 0)

  @property
  def running(self) -> int:
    return len(self.session.scheduler.running)

  def _run(self) -> None:
    try:
      self._warm_up()
      while self._read():
        for told in self.session.step():
          self._tell(*told)
    except BaseException as error:  # noqa: BLE001 - told to all, and kept
      traceback.print_exception(error)
      self.error = error
    with self._changed:
      self._closing = True
      left = [*self._tickets.values(), *self._new]
      for ticket in left:
        if not self._is_over(ticket, now=True):
          ticket.tell(News(None, True))

  def _warm_up(self) -> None:
    for done, size in enumerate(self._warm, 1):
      if self._closing:
        return
      self.session.warm(size)
      self._progress(done)
    self.is_ready = True

  def _read(self) -> bool:
    """Takes note of what callers left, or waits for it; False at the end."""
    with self._changed:
      while not (self._closing or self._new or self._cancelled):
        if not self.session.is_idle:
          break
        self._changed.wait()
      if self._closing:
        return False
      new = list(self._new)
      gone, self._cancelled = self._cancelled, []
    for ticket in new:
      if not ticket.over:
        twin = ticket.twin.request if ticket.twin else None
        ticket.twin = None
        ticket.request = self.session.submit(*ticket.arguments, twin)
        self._tickets[ticket.request] = ticket
        self.counts['requests'] += 1
        self.counts['prompt_tokens'] += len(ticket.request.prompt)
      with self._changed:  # not sooner: an error must find it
        self._new.remove(ticket)
    for ticket in gone:
      if ticket.request is not None:
        self.session.cancel(ticket.request)
        if self._tickets.pop(ticket.request, None) is not None:
          self.counts['cancelled'] += 1
    return True

  def _tell(self, request: engine.Request, token: int, is_last: bool) -> None:
    ticket = self._tickets[request]
    self.counts['tokens'] += 1
    if not ticket.begun:
      ticket.begun = True
      self.counts['found_tokens'] += request.job.found
    if is_last:
      del self._tickets[request]
      self.counts['finished'] += 1
    with self._changed:
      if not self._is_over(ticket, now=is_last):
        ticket.tell(News(token, is_last))

  def _is_over(self, ticket: Ticket, *, now: bool) -> bool:
    """Whether it was so before; `now`: whether it is so from now on."""
    before = ticket.over
    if now and not before:
      ticket.over = True
      self._open -= 1
    return before
