"""Continuous batching with a model that only counts: nothing is ever lost."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import block_pool, scheduler

SIZE = 4


class Player:
  """Runs steps on a cache of tokens; the next token is a sum of all before."""

  def __init__(self, count=12, max_rows=3, chunk=5):
    self.pool = block_pool.BlockPool(count, SIZE)
    self.scheduler = scheduler.Scheduler(self.pool, max_rows, chunk)
    self.memory = np.full((count, SIZE), -1)
    self.steps = 0

  def step(self):
    made = [self._run(self.scheduler.prefill())]
    made.append(self._run(self.scheduler.decode()))
    self.steps += any(made)
    return any(made)

  def _run(self, step):
    if step is None:
      return False
    for source, target in step.copies:
      self.memory[target] = self.memory[source]
    assert len(step.jobs) <= self.scheduler.max_rows
    pairs = list(zip(step.jobs, step.counts, strict=True))
    for job, count in pairs:  # all writes, then all reads
      assert count <= self.scheduler.chunk
      for at in range(job.row.length, job.row.length + count):
        self.memory[job.row.pages[at // SIZE], at % SIZE] = job.tokens[at]
    for job, count in pairs:
      ends = count == job.missing
      end = job.row.length + count
      read = self.memory[job.row.pages].reshape(-1)[:end].tolist()
      assert read == job.tokens[:end]
      self.scheduler.done(job, count)
      if ends:
        job.tokens.append(following(read))
        if len(job.tokens) == job.most:
          self.scheduler.end(job)
    return True


def following(tokens):
  return sum(tokens) % 3


def alone(prompt, count):
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(following(tokens))
  return tokens


REQUESTS = st.lists(
  st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.integers(1, 12),  # new tokens
    st.integers(0, 6),  # steps until it comes
    st.booleans(),  # whether its client stays
    st.integers(1, 4),  # answers
  ),
  min_size=1,
  max_size=8,
)


@hypothesis.settings(max_examples=200)
@hypothesis.given(REQUESTS, st.integers(9, 20), st.integers(1, 6))
def test_every_request_gets_what_it_would_get_alone(requests, count, rows):
  player, jobs = Player(count, rows), []
  for prompt, new, gap, stays, answers in requests:
    for _ in range(gap):
      player.step()
    first = None
    for i in range(answers):
      job = player.scheduler.add(prompt, new + i, first)
      jobs.append((job, prompt, new + i, stays or i % 2))
      first = first or job
  player.step()
  for job, *_, stays in jobs:
    if not stays:
      player.scheduler.end(job)
      player.scheduler.end(job)
  while not player.scheduler.is_idle:
    assert player.step(), 'nothing goes on'
    assert player.steps < 2000
  for job, prompt, new, stays in jobs:
    want = alone(prompt, new)
    assert job.tokens == want[: len(job.tokens)]
    assert len(job.tokens) == len(want) or not stays
    assert job.row is None
  assert player.pool.in_use == 0


def test_who_came_last_gives_way_and_comes_back_first():
  player = Player(count=4, max_rows=3)
  first = player.scheduler.add([1, 1, 1, 1, 1, 1, 1], 9)
  second = player.scheduler.add([2, 2, 2, 2, 2, 2, 2], 8)
  third = player.scheduler.add([1], 1)
  while first.row is None or len(first.tokens) < first.most:
    player.step()
    if player.scheduler.preempted:
      break
  assert second in player.scheduler.waiting and second.row is None
  assert player.scheduler.waiting[0] is second
  assert first in player.scheduler.running
  while not player.scheduler.is_idle:
    player.step()
  assert first.tokens == alone([1] * 7, 9)
  assert second.tokens == alone([2] * 7, 8)
  assert third.tokens == alone([1], 1)


def test_a_long_prompt_does_not_stop_the_others():
  """They get a token between any two chunks."""
  player = Player(count=20, chunk=4)
  short = player.scheduler.add([1, 2], 12)
  player.step()
  long = player.scheduler.add([0] * 40, 1)
  before = len(short.tokens)
  for steps in range(1, 9):
    player.step()
    assert len(short.tokens) == before + steps
  assert long.row.length == 32


def test_a_known_prompt_is_not_computed_again():
  player = Player(count=20)
  prompt = [1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
  first = player.scheduler.add(prompt, 2)
  while not player.scheduler.is_idle:
    player.step()
  before = player.steps
  second = player.scheduler.add(prompt, 2)
  while not player.scheduler.is_idle:
    player.step()
  assert (first.found, second.found) == (0, 8)
  assert first.tokens == second.tokens
  assert player.steps - before == 1  # turn: a chunk of two and one more token


@pytest.mark.parametrize('size', [1, 2, 4, 10, 12])
def test_twins_compute_their_prompt_once(size):
  player = Player(count=40, max_rows=8, chunk=4)
  prompt = [1, 2, 0] * 4
  first = player.scheduler.add(prompt[:size], 5)
  jobs = [first]
  jobs += [player.scheduler.add(prompt[:size], 5, first) for _ in range(5)]
  for _ in range(-(-size // 4)):
    player.step()
  in_use = 6 if size == 1 else size // SIZE + 6
  assert player.pool.in_use == in_use
  while not player.scheduler.is_idle:
    player.step()
  assert all(job.tokens == alone(prompt[:size], 5) for job in jobs)
  if size > 1:
    assert [job.found for job in jobs] == [0] + [size - 1] * 5


def test_twins_of_one_that_goes_go_on():
  player = Player(count=20, max_rows=4, chunk=4)
  first = player.scheduler.add([1, 2, 0] * 4, 5)
  jobs = [player.scheduler.add([1, 2, 0] * 4, 5, first) for _ in range(2)]
  player.step()
  player.scheduler.end(first)
  while not player.scheduler.is_idle:
    player.step()
  assert all(job.tokens == alone([1, 2, 0] * 4, 5) for job in jobs)
  assert player.pool.in_use == 0 and player.scheduler.preempted == 0


def test_what_can_never_fit_is_refused_at_once():
  player = Player(count=3)
  with pytest.raises(errors.InputError, match='needs 13 places in'):
    player.scheduler.add([1] * 10, 3)
  player.scheduler.add([1] * 10, 2)


def test_sizes_are_checked():
  with pytest.raises(ValueError, match='max_rows=0'):
    scheduler.Scheduler(block_pool.BlockPool(1, 1), 0, 1)
