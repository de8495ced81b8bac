"""Requests spread over ranks: each gets what it would get alone, nothing leaks.

The model only counts, on a cache of tokens; see `test_scheduler`.
"""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from dsv3_jax.inference import block_pool, scheduler
from dsv3_jax.inference import request as requests

SIZE = 4


class Player:
  """Runs steps; block b of rank r is r * count + b of its memory."""

  def __init__(self, num_ranks, count=12, max_rows=3, chunk=8):
    pools = [block_pool.BlockPool(count, SIZE) for _ in range(num_ranks)]
    self.scheduler = scheduler.Scheduler(pools, max_rows, chunk)
    self.memory = np.full((num_ranks * count, SIZE), -1)
    self.count = count

  def add(self, prompt, count, shares_prompt_with=None):
    request = requests.Request(
      prompt, count, shares_prompt_with=shares_prompt_with
    )
    self.scheduler.add(request)
    return request

  def step(self):
    prefills = self.scheduler.prefill()
    assert [step.is_uncached for step in prefills] in (
      [],
      [True],
      [False],
      [True, False],
    )
    for step in prefills:
      self._run(step)
    decoded = self.scheduler.decode()
    if decoded is not None:
      self._run(decoded)
    return bool(prefills or decoded)

  def _run(self, step):
    for source, target in step.copies:
      assert source // self.count == target // self.count
      self.memory[target] = self.memory[source]
    pairs = list(zip(step.requests, step.counts, strict=True))
    for request, count in pairs:  # all writes, then all reads
      for at in range(
        request.block_table.length, request.block_table.length + count
      ):
        block = self._blocks(request)[at // SIZE]
        self.memory[block, at % SIZE] = request.all_tokens[at]
    for request, count in pairs:
      ends, end = (
        count == request.num_uncomputed,
        request.block_table.length + count,
      )
      assert (
        self._row(request).reshape(-1)[:end].tolist()
        == request.all_tokens[:end]
      )
      self.scheduler.commit(request, count)
      if ends:
        request.all_tokens.append(sum(request.all_tokens) % 3)
        if len(request.all_tokens) == request.max_length:
          self.scheduler.finish(request)

  def _blocks(self, request):
    return [
      request.rank * self.count + block for block in request.block_table.blocks
    ]

  def _row(self, request):
    return self.memory[self._blocks(request)]

  def finish(self):
    for _ in range(2000):
      if self.scheduler.is_idle:
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
  submitted=REQUESTS,
  num_ranks=st.integers(1, 3),
  count=st.integers(8, 16),
  rows=st.integers(1, 3),
)
def test_every_request_gets_what_it_would_get_alone(
  submitted, num_ranks, count, rows
):
  player, added = Player(num_ranks, count, rows), []
  for prompt, new, gap, stays, again in submitted:
    for _ in range(gap):
      player.step()
    shared = None
    if again and added:
      shared, prompt, *_ = added[-1]
    added.append((player.add(prompt, new, shared), prompt, new, stays))
    for running in player.scheduler.running_by_rank:
      assert len(running) <= rows
      numbers = [request.number for request in running]
      assert numbers == sorted(numbers)
  for request, *_, stays in added:
    if not stays:
      player.scheduler.finish(request)
      player.scheduler.finish(request)
  player.finish()
  for request, prompt, new, stays in added:
    want = alone(prompt, new)
    assert request.all_tokens == want[: len(request.all_tokens)]
    assert len(request.all_tokens) == len(want) or not stays
    assert request.block_table is None
  assert all(pool.in_use == 0 for pool in player.scheduler.pools)
  assert player.scheduler.blocks_in_use == 0


def test_a_shared_prompt_has_its_blocks_on_one_rank():
  player, prompt = Player(2, count=20), [0, 1, 2, 1] * 4
  first = player.add(prompt, 4)
  others = [player.add(prompt, 4, first) for _ in range(2)]
  player.step()
  assert [request.rank for request in (first, *others)] == [0, 0, 0]
  player.step()
  # The last block is its own: its last token is computed once more.
  assert all(
    request.block_table.blocks[:3] == first.block_table.blocks[:3]
    for request in others
  )
  player.finish()
  assert first.all_tokens == others[0].all_tokens == others[1].all_tokens


def test_rows_are_spread_evenly():
  player = Player(4, max_rows=2)
  for i in range(7):
    player.add([i % 3, 1, i // 3], 6)
  player.step()
  counts = list(map(len, player.scheduler.running_by_rank))
  assert sorted(counts) == [1, 2, 2, 2]
  for i in range(2):
    player.add([2, i], 6)
  player.step()
  assert len(player.scheduler.running) == 8  # two rows on each of four ranks
  assert len(player.scheduler.waiting) == 1
  player.finish()


def test_a_request_goes_to_where_its_prompt_is_known():
  player, prompt = Player(3, count=20), [0, 1, 2, 1] * 4
  first = player.add([2, 2], 2)
  known = player.add(prompt, 2)
  player.finish()
  again = player.add([*prompt, 1], 3)
  player.step()
  assert (first.rank, known.rank, again.rank) == (0, 1, 1)
  assert again.num_cached_tokens == 16
  other = player.add([1, 0, 1], 2)
  player.step()
  assert other.rank != 1
  player.finish()


def test_many_that_begin_alike_are_spread_all_the_same():
  """One block in common does not outweigh a rank without work."""
  player = Player(2, count=20, max_rows=4)
  player.add([0, 1, 2, 1], 2)
  player.finish()
  for i in range(8):
    player.add([0, 1, 2, 1, i % 3, i // 3], 4)
  player.step()
  assert list(map(len, player.scheduler.running_by_rank)) == [4, 4]
  player.finish()


def test_a_preempted_request_may_go_to_another_rank():
  """Rank 0 runs out of blocks while rank 1 becomes idle."""
  player = Player(2, count=4, max_rows=2)
  first = player.add([0] * 7, 9)
  other = player.add([1] * 7, 1)
  third = player.add([2] * 7, 9)
  player.step()
  assert (first.rank, other.rank) == (0, 1) and other.block_table is None
  assert third.rank == 0
  while not player.scheduler.preempted:
    player.step()
  assert first.block_table is not None and third.block_table is None
  player.step()
  assert third.rank == 1
  player.finish()
  assert third.all_tokens == alone([2] * 7, 9)
