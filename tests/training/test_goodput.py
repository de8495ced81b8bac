"""Seconds of a run's parts, over restarts, by a clock that the test sets."""

import json

import pytest

from dsv3_jax import errors
from dsv3_jax.training import goodput, loop, metrics
from tests import tiny_run


class Clock:
  """Tells the time that was set."""

  now = 1000.0

  def __call__(self):
    return self.now


def spend(times, clock, **parts):
  """Lets so many seconds pass in each part."""
  for part, seconds in parts.items():
    times.enter(part)
    clock.now += seconds
  times.enter('step')


def seconds(logged):
  """What is not zero, without the share."""
  named = {k.removesuffix('_seconds'): v for k, v in logged.items() if v}
  return {k: v for k, v in named.items() if k != 'goodput'}


def test_a_killed_run_counts_what_it_lost_and_the_time_it_was_down(tmp_path):
  clock = Clock()
  times = goodput.Goodput(clock)
  clock.now += 4
  times.resume(tmp_path, None)
  spend(times, clock, compile=10, input=1, step=50)
  times.enter('save')
  times.saved(5)
  spend(times, clock, save=2, step=30, evaluation=3)
  logged = times.write()
  want = {'restore': 4, 'compile': 10, 'input': 1, 'step': 80, 'save': 2}
  assert seconds(logged) == want | {'evaluation': 3}
  assert logged['goodput'] == 80 / 100
  clock.now += 7  # killed; nothing was written
  again = goodput.Goodput(clock)
  clock.now += 1
  again.resume(tmp_path, 5)
  spend(again, clock, step=20)
  want |= {'evaluation': 3, 'restore': 4 + 7 + 1, 'step': 70, 'lost': 30}
  assert seconds(again.write()) == want
  # Goes back to the beginning: every step is lost.
  last = goodput.Goodput(clock)
  last.resume(tmp_path, None)
  want |= {'lost': 100}
  del want['step']
  assert seconds(last.write()) == want
  assert list(tmp_path.iterdir()) == [tmp_path / 'goodput.json']


def test_what_a_step_hides_is_no_wait():
  clock = Clock()
  times = goodput.Goodput(clock)
  for hidden in (True, False):
    times.enter('input')
    clock.now += 5
    times.enter('step', hidden=hidden)
  assert seconds(times.write()) == {'input': 5, 'step': 5}


def test_a_clock_that_is_set_back_takes_no_time_away(tmp_path):
  clock = Clock()
  times = goodput.Goodput(clock)
  times.resume(tmp_path, None)
  spend(times, clock, step=5)
  times.saved(1)
  times.write()
  clock.now -= 100
  again = goodput.Goodput(clock)
  again.resume(tmp_path, 1)
  assert seconds(again.write()) == {'step': 5}


def test_a_damaged_record_is_one_line(tmp_path):
  (tmp_path / 'goodput.json').write_text('{"seconds": 1}')
  with pytest.raises(errors.InputError, match=r'goodput\.json is damaged'):
    goodput.Goodput().resume(tmp_path, None)


def test_a_run_logs_its_parts_and_a_resumed_one_adds_to_them(tmp_path):
  cfg = tiny_run.make(tmp_path, sample__prompts=(), eval__max_bytes=100)
  workdir = tmp_path / 'run'
  loop.run(tiny_run.until(cfg, 2), workdir)
  first = json.loads((workdir / 'goodput.json').read_text())
  loop.run(tiny_run.until(cfg, 3), workdir)
  last = json.loads((workdir / 'goodput.json').read_text())
  for part in ('step', 'compile', 'save', 'evaluation', 'restore'):
    assert 0 < first['seconds'][part] < last['seconds'][part], part
  assert last['seconds']['lost'] == 0
  assert list(last['step_seconds_at']) == ['2', '3']
  lines = [x for x in metrics.read_metrics(workdir) if x['kind'] == 'goodput']
  assert [x['step'] for x in lines] == [1, 2, 2, 3, 3]
  shares = [x['goodput'] for x in lines]
  assert all(0 < x < 1 for x in shares[1:])
