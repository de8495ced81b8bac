"""Continuous batching with a model that only counts: nothing is ever lost."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import block_pool, scheduler
from dsv3_jax.inference import request as requests

SIZE = 4


class Player:
  """Runs steps on a cache of tokens; the next token is a sum of all before."""

  def __init__(self, count=12, max_rows=3, chunk=5):
    self.pool = block_pool.BlockPool(count, SIZE)
    self.scheduler = scheduler.Scheduler([self.pool], max_rows, chunk)
    self.memory = np.full((count, SIZE), -1)
    self.steps = 0

  def add(self, prompt, count, shares_prompt_with=None):
    request = requests.Request(
      prompt, count, shares_prompt_with=shares_prompt_with
    )
    self.scheduler.add(request)
    return request

  def step(self):
    prefills = self.scheduler.prefill()
    assert len(prefills) <= 1
    ran = [self._run(schedule) for schedule in prefills]
    ran.append(self._run(self.scheduler.decode()))
    self.steps += any(ran)
    return any(ran)

  def _run(self, step):
    if step is None:
      return False
    for source, target in step.copies:
      self.memory[target] = self.memory[source]
    assert len(step.requests) <= self.scheduler.max_rows
    pairs = list(zip(step.requests, step.counts, strict=True))
    for request, count in pairs:  # all writes, then all reads
      assert count <= self.scheduler.chunk
      for at in range(
        request.block_table.length, request.block_table.length + count
      ):
        self.memory[request.block_table.blocks[at // SIZE], at % SIZE] = (
          request.all_tokens[at]
        )
    for request, count in pairs:
      ends = count == request.num_uncomputed
      end = request.block_table.length + count
      read = self.memory[request.block_table.blocks].reshape(-1)[:end].tolist()
      assert read == request.all_tokens[:end]
      self.scheduler.commit(request, count)
      if ends:
        request.all_tokens.append(following(read))
        if len(request.all_tokens) == request.max_length:
          self.scheduler.finish(request)
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
def test_every_request_gets_what_it_would_get_alone(submitted, count, rows):
  player, added = Player(count, rows), []
  for prompt, new, gap, stays, answers in submitted:
    for _ in range(gap):
      player.step()
    first = None
    for i in range(answers):
      request = player.add(prompt, new + i, first)
      added.append((request, prompt, new + i, stays or i % 2))
      first = first or request
  player.step()
  for request, *_, stays in added:
    if not stays:
      player.scheduler.finish(request)
      player.scheduler.finish(request)
  while not player.scheduler.is_idle:
    assert player.step(), 'nothing goes on'
    assert player.steps < 2000
  for request, prompt, new, stays in added:
    want = alone(prompt, new)
    assert request.all_tokens == want[: len(request.all_tokens)]
    assert len(request.all_tokens) == len(want) or not stays
    assert request.block_table is None
  assert player.pool.in_use == 0


def test_who_came_last_gives_way_and_comes_back_first():
  player = Player(count=4, max_rows=3)
  first = player.add([1, 1, 1, 1, 1, 1, 1], 9)
  second = player.add([2, 2, 2, 2, 2, 2, 2], 8)
  third = player.add([1], 1)
  while first.block_table is None or len(first.all_tokens) < first.max_length:
    player.step()
    if player.scheduler.preempted:
      break
  assert second in player.scheduler.waiting and second.block_table is None
  assert player.scheduler.waiting[0] is second
  assert first in player.scheduler.running
  while not player.scheduler.is_idle:
    player.step()
  assert first.all_tokens == alone([1] * 7, 9)
  assert second.all_tokens == alone([2] * 7, 8)
  assert third.all_tokens == alone([1], 1)


def test_a_long_prompt_does_not_stop_the_others():
  """They get a token between any two chunks."""
  player = Player(count=20, chunk=4)
  short = player.add([1, 2], 12)
  player.step()
  long = player.add([0] * 40, 1)
  before = len(short.all_tokens)
  for steps in range(1, 9):
    player.step()
    assert len(short.all_tokens) == before + steps
  assert long.block_table.length == 32


def test_a_known_prompt_is_not_computed_again():
  player = Player(count=20)
  prompt = [1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
  first = player.add(prompt, 2)
  while not player.scheduler.is_idle:
    player.step()
  before = player.steps
  second = player.add(prompt, 2)
  while not player.scheduler.is_idle:
    player.step()
  assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
  assert first.all_tokens == second.all_tokens
  assert player.steps - before == 1  # turn: a chunk of two and one more token


@pytest.mark.parametrize('size', [1, 2, 4, 10, 12])
def test_twins_compute_their_prompt_once(size):
  player = Player(count=40, max_rows=8, chunk=4)
  prompt = [1, 2, 0] * 4
  first = player.add(prompt[:size], 5)
  added = [first]
  added += [player.add(prompt[:size], 5, first) for _ in range(5)]
  for _ in range(-(-size // 4)):
    player.step()
  in_use = 6 if size == 1 else size // SIZE + 6
  assert player.pool.in_use == in_use
  while not player.scheduler.is_idle:
    player.step()
  assert all(request.all_tokens == alone(prompt[:size], 5) for request in added)
  if size > 1:
    assert [request.num_cached_tokens for request in added] == [0] + [
      size - 1
    ] * 5


def test_twins_of_one_that_goes_go_on():
  player = Player(count=20, max_rows=4, chunk=4)
  first = player.add([1, 2, 0] * 4, 5)
  added = [player.add([1, 2, 0] * 4, 5, first) for _ in range(2)]
  player.step()
  player.scheduler.finish(first)
  while not player.scheduler.is_idle:
    player.step()
  assert all(request.all_tokens == alone([1, 2, 0] * 4, 5) for request in added)
  assert player.pool.in_use == 0 and player.scheduler.preempted == 0


def test_what_can_never_fit_is_refused_at_once():
  player = Player(count=3)
  with pytest.raises(errors.InputError, match='needs 13 places in'):
    player.add([1] * 10, 3)
  player.add([1] * 10, 2)


def test_sizes_are_checked():
  with pytest.raises(ValueError, match='max_rows=0'):
    scheduler.Scheduler([block_pool.BlockPool(1, 1)], 0, 1)
