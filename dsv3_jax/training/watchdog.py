"""Signals that stop a run, and a watchdog that ends one that hangs."""

import faulthandler
import os
import signal
import sys
import threading
import time
import types

from dsv3_jax import errors


class Stopped(Exception):
  """A signal ended the run after `step`, which is saved."""

  def __init__(self, step: int):
    super().__init__(step)
    self.step = step


class Watchdog:
  """Ends the process when nothing called `beat` for `seconds`; 0 is off.

  It has a thread of its own, so that it fires even while the main thread is
  blocked in native code. It ends by `os._exit`: a process that hangs cannot
  clean up.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._last = time.monotonic()
    self._done = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )

  def __enter__(self) -> 'Watchdog':
    self.beat()
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._done.set()
    if self._seconds:
      self._thread.join()

  def beat(self) -> None:
    """Reports that the run is alive."""
    self._last = time.monotonic()

  def _watch(self) -> None:
    while True:
      left = self._last + self._seconds - time.monotonic()
      if left <= 0:
        break
      if self._done.wait(left):
        return
    message = (
      f'watchdog: no step finished for {self._seconds:g} s '
      '(train.watchdog_seconds); stacks of all threads follow'
    )
    print(message, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    os._exit(errors.EXIT_STUCK)


class StopSignal:
  """Turns SIGTERM and the first SIGINT into `requested`, while entered."""

  def __init__(self):
    self.requested = False
    self._previous: dict[int, object] = {}

  def __enter__(self) -> 'StopSignal':
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True
