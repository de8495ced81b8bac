"""Watchdog and signals, in processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

from dsv3_jax import errors
from dsv3_jax.training import watchdog
from tests import limits


def run(code, **kwargs):
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, **kwargs
  )


def test_watchdog_ends_a_stuck_process_with_all_stacks():
  """Even when the main thread hangs in native code."""
  code = (
    'import threading\n'
    'from dsv3_jax.training import watchdog\n'
    'def stuck_loader(lock):\n'
    '  lock.acquire()\n'
    'lock = threading.Lock()\n'
    'lock.acquire()\n'
    'with watchdog.Watchdog(0.5):\n'
    '  stuck_loader(lock)\n'
  )
  done = run(code, timeout=limits.HANG)
  assert done.returncode == errors.EXIT_STUCK == 70
  assert 'train.watchdog_seconds' in done.stderr
  assert 'stuck_loader' in done.stderr


def test_beats_keep_the_process_alive():
  code = (
    'import time\n'
    'from dsv3_jax.training import watchdog\n'
    'with watchdog.Watchdog(3.0) as watchdog:\n'
    '  for _ in range(35):\n'
    '    time.sleep(0.1)\n'
    '    watchdog.beat()\n'
    "print('done')\n"
  )
  done = run(code, timeout=limits.HANG)
  assert (done.returncode, done.stdout) == (0, 'done\n'), done.stderr


def test_watchdog_of_zero_seconds_is_off():
  with watchdog.Watchdog(0.0):
    time.sleep(0.1)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request(number):
  before = signal.getsignal(number)
  with watchdog.StopSignal() as stop:
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested
  assert signal.getsignal(number) is before


def test_second_interrupt_is_an_interrupt():
  with watchdog.StopSignal():
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
