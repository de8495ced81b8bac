"""Blocks of the cache: whatever happens, every row reads its own tokens."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import stateful

from dsv3_jax.inference import block_pool

SIZE, COUNT = 4, 12


def write(pool, row, memory, tokens):
  """As a step does: room, copies, tokens from the row's length on."""
  for source, target in pool.extend(row, len(tokens)):
    memory[target] = memory[source]
  for at in range(row.length, len(tokens)):
    memory[row.blocks[at // SIZE], at % SIZE] = tokens[at]
  pool.commit(row, tokens)


def read(row, memory):
  return memory[row.blocks].reshape(-1)[: row.length].tolist()


def begun(pool, memory, tokens):
  row = pool.match_prefix(tokens)
  num_cached = row.length
  write(pool, row, memory, tokens)
  return row, num_cached


@pytest.fixture
def memory():
  return np.full((COUNT, SIZE), -1)


def test_a_row_takes_as_many_blocks_as_it_needs(memory):
  pool = block_pool.BlockPool(COUNT, SIZE)
  row, num_cached = begun(pool, memory, [1, 2, 3, 4, 5])
  assert num_cached == 0 and len(row.blocks) == pool.in_use == 2
  assert pool.blocks_for(8) == 2 and pool.blocks_for(9) == 3
  write(pool, row, memory, [1, 2, 3, 4, 5, 6, 7, 8])
  assert pool.in_use == 2
  pool.release(row)
  assert pool.in_use == 0 and pool.available == COUNT


def test_full_blocks_are_shared_also_after_their_row_has_gone(memory):
  pool = block_pool.BlockPool(COUNT, SIZE)
  prompt = list(range(10))
  first, _ = begun(pool, memory, prompt)
  second, num_cached = begun(pool, memory, [*prompt, 11])
  assert num_cached == 8 and second.blocks[:2] == first.blocks[:2]
  assert pool.in_use == 4
  pool.release(first)
  pool.release(second)
  third, num_cached = begun(pool, memory, [*range(8), 99, 98])
  assert num_cached == 8 and read(third, memory) == [*range(8), 99, 98]
  _, num_cached = begun(pool, memory, [*range(1, 8)])
  assert num_cached == 0


def test_the_block_of_the_last_token_is_never_taken(memory):
  """It would have to be copied, for which there may be no block."""
  pool = block_pool.BlockPool(3, SIZE)
  prompt = list(range(2 * SIZE))
  first, _ = begun(pool, memory, prompt)
  pool.release(first)
  row = pool.match_prefix(prompt)
  assert row.length == SIZE and len(row.blocks) == 1
  assert pool.extend(row, 2 * SIZE + 2) == [] and len(row.blocks) == 3


def test_forks_do_not_share_what_a_row_has_for_later_tokens(memory):
  pool = block_pool.BlockPool(COUNT, SIZE)
  one = pool.match_prefix([1, 2, 3])
  pool.extend(one, SIZE + 2)
  write(pool, one, memory, [1, 2, 3])
  two = pool.fork(one)
  assert len(one.blocks) == 2 and len(two.blocks) == 1
  left, right = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]
  write(pool, two, memory, right)
  write(pool, one, memory, left)
  assert read(one, memory) == left and read(two, memory) == right


def test_forks_part_where_they_are_written(memory):
  pool = block_pool.BlockPool(COUNT, SIZE)
  one, _ = begun(pool, memory, [1, 2, 3, 4, 5, 6])
  two = pool.fork(one)
  assert pool.in_use == 2
  write(pool, two, memory, [1, 2, 3, 4, 5, 6, 70])
  write(pool, one, memory, [1, 2, 3, 4, 5, 6, 7])
  assert pool.in_use == 3 and one.blocks[0] == two.blocks[0]
  assert read(one, memory)[-1] == 7 and read(two, memory)[-1] == 70


def test_too_few_blocks_change_nothing(memory):
  pool = block_pool.BlockPool(3, SIZE)
  row, _ = begun(pool, memory, [1, 2, 3, 4, 5])
  before = (list(row.blocks), row.length, pool.available)
  with pytest.raises(block_pool.OutOfBlocks, match='2 of 1 blocks'):
    pool.extend(row, 13)
  assert before == (list(row.blocks), row.length, pool.available)
  pool.extend(row, 12)
  assert pool.available == 0


def test_the_longest_unused_goes_first_and_ends_before_beginnings(memory):
  pool = block_pool.BlockPool(4, SIZE)
  old, _ = begun(pool, memory, [*range(8)])
  pool.release(old)
  new, _ = begun(pool, memory, [*range(50, 58)])
  pool.release(new)
  row, _ = begun(pool, memory, [9, 9, 9])  # takes the end of the old one
  assert pool.match_prefix([*range(8), 1]).length == 4
  assert pool.match_prefix([*range(50, 58), 1]).length == 8
  assert read(row, memory) == [9, 9, 9]


def test_a_pool_of_nothing_is_refused():
  with pytest.raises(ValueError, match='num_blocks=0'):
    block_pool.BlockPool(0, 4)


class Rows(stateful.RuleBasedStateMachine):
  """Rows come, grow, fork and go in any order."""

  def __init__(self):
    super().__init__()
    self.pool, self.rows = block_pool.BlockPool(COUNT, SIZE), []
    self.memory = np.full((COUNT, SIZE), -1)

  def _write(self, row, tokens):
    """Whether there was room."""
    free = self.pool.available
    before = (list(row.blocks), row.length)
    try:
      write(self.pool, row, self.memory, tokens)
    except block_pool.OutOfBlocks:
      assert before == (row.blocks, row.length)
      assert free == self.pool.available
      return False
    return True

  # Few letters, so that beginnings are often the same.
  @stateful.rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
  def begin(self, tokens):
    row = self.pool.match_prefix(tokens)
    assert row.length < len(tokens)
    assert read(row, self.memory) == tokens[: row.length]
    if self._write(row, tokens):
      self.rows.append((row, tokens))
    else:
      self.pool.release(row)

  @stateful.precondition(lambda self: self.rows)
  @stateful.rule(data=st.data())
  def grow(self, data):
    row, tokens = data.draw(st.sampled_from(self.rows))
    more = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
    if self._write(row, tokens + more):
      tokens += more

  @stateful.precondition(lambda self: self.rows)
  @stateful.rule(data=st.data())
  def room_for_speculative_tokens_that_are_not_accepted(self, data):
    """Blocks are allocated, tokens written, and fewer of them accepted."""
    row, tokens = data.draw(st.sampled_from(self.rows))
    num_speculative = data.draw(st.integers(1, 6))
    try:
      copies = self.pool.extend(row, row.length + num_speculative)
    except block_pool.OutOfBlocks:
      return
    for source, target in copies:
      self.memory[target] = self.memory[source]
    for at in range(row.length, row.length + num_speculative):
      self.memory[row.blocks[at // SIZE], at % SIZE] = 7
    self._write(row, tokens + [0])
    tokens.append(0)

  @stateful.precondition(lambda self: self.rows)
  @stateful.rule(data=st.data())
  def fork(self, data):
    row, tokens = data.draw(st.sampled_from(self.rows))
    self.rows.append((self.pool.fork(row), list(tokens)))

  @stateful.precondition(lambda self: self.rows)
  @stateful.rule(data=st.data())
  def release(self, data):
    at = data.draw(st.integers(0, len(self.rows) - 1))
    row, _ = self.rows.pop(at)
    self.pool.release(row)
    assert not row.blocks

  @stateful.invariant()
  def every_row_reads_its_own_tokens(self):
    for row, tokens in self.rows:
      assert read(row, self.memory) == tokens

  @stateful.invariant()
  def blocks_in_use_are_those_of_rows(self):
    used = {block for row, _ in self.rows for block in row.blocks}
    assert self.pool.in_use == len(used)

  def teardown(self):
    for row, _ in self.rows:
      self.pool.release(row)
    assert self.pool.available == COUNT


TestRows = Rows.TestCase
TestRows.settings = hypothesis.settings(
  max_examples=150, stateful_step_count=40
)
