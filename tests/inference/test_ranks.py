"""Requests spread over ranks: each gets what it would get alone, nothing leaks.

The model only counts, on a cache of tokens; see `test_scheduler`.
"""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from dsv3_jax.inference import block_pool, ranks, scheduler

SIZE = 4


class Player:
  """Runs steps; page p of rank r is r * count + p of its memory."""

  def __init__(self, num_ranks, count=12, max_rows=3, chunk=8):
    make = lambda: scheduler.Scheduler(
      block_pool.BlockPool(count, SIZE), max_rows, chunk
    )
    self.ranks = ranks.Ranks([make() for _ in range(num_ranks)])
    self.memory = np.full((num_ranks * count, SIZE), -1)
    self.count = count

  def step(self):
    found = self.ranks.prefill()
    assert [step.is_new for step in found] in (
      [],
      [True],
      [False],
      [True, False],
    )
    for step in found:
      self._run(step)
    decoded = self.ranks.decode()
    if decoded is not None:
      self._run(decoded)
    return bool(found or decoded)

  def _run(self, step):
    for source, target in step.copies:
      assert source // self.count == target // self.count
      self.memory[target] = self.memory[source]
    pairs = list(zip(step.jobs, step.counts, strict=True))
    for job, count in pairs:  # all writes, then all reads
      for at in range(job.row.length, job.row.length + count):
        page = self._pages(job)[at // SIZE]
        self.memory[page, at % SIZE] = job.tokens[at]
    for job, count in pairs:
      ends, end = count == job.missing, job.row.length + count
      assert self._row(job).reshape(-1)[:end].tolist() == job.tokens[:end]
      self.ranks.done(job, count)
      if ends:
        job.tokens.append(sum(job.tokens) % 3)
        if len(job.tokens) == job.most:
          self.ranks.end(job)

  def _pages(self, job):
    return [job.rank * self.count + page for page in job.row.pages]

  def _row(self, job):
    return self.memory[self._pages(job)]

  def finish(self):
    for _ in range(2000):
      if self.ranks.is_idle:
        return
      assert self.step(), 'nothing goes on'
    raise AssertionError('it does not end')


def alone(prompt, count):
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(sum(tokens) % 3)
  return tokens


REQUESTS = st.lists(
  st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.integers(1, 12),  # new tokens
    st.integers(0, 3),  # steps until it comes
    st.booleans(),  # whether its client stays
    st.booleans(),  # whether it has the prompt of the one before
  ),
  min_size=1,
  max_size=12,
)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  requests=REQUESTS,
  num_ranks=st.integers(1, 3),
  count=st.integers(8, 16),
  rows=st.integers(1, 3),
)
def test_every_request_gets_what_it_would_get_alone(
  requests, num_ranks, count, rows
):
  player, jobs = Player(num_ranks, count, rows), []
  for prompt, new, gap, stays, again in requests:
    for _ in range(gap):
      player.step()
    twin = None
    if again and jobs:
      twin, prompt, *_ = jobs[-1]
    jobs.append((player.ranks.add(prompt, new, twin), prompt, new, stays))
    for one in player.ranks.each:
      assert len(one.running) <= rows
      numbers = [job.number for job in one.running]
      assert numbers == sorted(numbers)
  for job, *_, stays in jobs:
    if not stays:
      player.ranks.end(job)
      player.ranks.end(job)
  player.finish()
  for job, prompt, new, stays in jobs:
    want = alone(prompt, new)
    assert job.tokens == want[: len(job.tokens)]
    assert len(job.tokens) == len(want) or not stays
    assert job.row is None
  assert all(one.pool.in_use == 0 for one in player.ranks.each)
  assert player.ranks.pages_in_use == 0


def test_a_twin_takes_over_the_pages_of_its_rank():
  player, prompt = Player(2, count=20), [0, 1, 2, 1] * 4
  first = player.ranks.add(prompt, 4)
  others = [player.ranks.add(prompt, 4, first) for _ in range(2)]
  player.step()
  assert [job.rank for job in (first, *others)] == [0, 0, 0]
  player.step()
  # The last page is its own: its last token is computed once more.
  assert all(job.row.pages[:3] == first.row.pages[:3] for job in others)
  player.finish()
  assert first.tokens == others[0].tokens == others[1].tokens


def test_rows_are_spread_evenly():
  player = Player(4, max_rows=2)
  for i in range(7):
    player.ranks.add([i % 3, 1, i // 3], 6)
  player.step()
  counts = [len(one.running) for one in player.ranks.each]
  assert sorted(counts) == [1, 2, 2, 2]
  assert player.ranks.max_rows == 8
  player.finish()


def test_a_request_goes_to_where_its_prompt_is_known():
  player, prompt = Player(3, count=20), [0, 1, 2, 1] * 4
  first = player.ranks.add([2, 2], 2)
  known = player.ranks.add(prompt, 2)
  player.finish()
  again = player.ranks.add([*prompt, 1], 3)
  player.step()
  assert (first.rank, known.rank, again.rank) == (0, 1, 1)
  assert again.found == 16
  other = player.ranks.add([1, 0, 1], 2)
  player.step()
  assert other.rank != 1
  player.finish()


def test_many_that_begin_alike_are_spread_all_the_same():
  """One page in common does not outweigh a rank without work."""
  player = Player(2, count=20, max_rows=4)
  player.ranks.add([0, 1, 2, 1], 2)
  player.finish()
  for i in range(8):
    player.ranks.add([0, 1, 2, 1, i % 3, i // 3], 4)
  player.step()
  assert [len(one.running) for one in player.ranks.each] == [4, 4]
  player.finish()


def test_who_gives_way_may_go_on_elsewhere():
  """Rank 0 runs out of pages while rank 1 becomes idle."""
  player = Player(2, count=4, max_rows=2)
  first = player.ranks.add([0] * 7, 9)
  other = player.ranks.add([1] * 7, 1)
  third = player.ranks.add([2] * 7, 9)
  player.step()
  assert (first.rank, other.rank) == (0, 1) and other.row is None
  assert third.rank == 0
  while not player.ranks.preempted:
    player.step()
  assert first.row is not None and third.row is None
  player.step()
  assert third.rank == 1
  player.finish()
  assert third.tokens == alone([2] * 7, 9)
