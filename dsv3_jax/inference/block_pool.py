"""Blocks of the latent cache: allocation, prefix sharing, release.

The cache consists of blocks of `block_size` tokens. A sequence has a list of
them, its block table. This module is the bookkeeping on the host; it touches no
arrays. A `BlockCopy` says which block must be copied to which before the next
step writes.

Prefix cache: a full block whose tokens are known stays after its sequence has
been released. A later sequence that begins with the same tokens takes it. Known
blocks form a tree: the key of a block is its parent and its own tokens, so that
a match compares tokens and not hashes. Blocks that other sequences read, or can
still match, are copy-on-write. If no empty block is left, known blocks that no
sequence uses are evicted: least recently used first, children before parents.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ROOT = 0  # the parent of first blocks


class BlockCopy(NamedTuple):
  """A whole block to be copied, in all layers."""

  source: int
  target: int


class OutOfBlocks(Exception):
  """Fewer blocks are available than needed; nothing has changed."""


@dataclasses.dataclass(eq=False)
class BlockTable:
  """The blocks of one sequence.

  blocks: they hold its first `length` tokens; there may be more of them, as
  room for later tokens. nodes: tree nodes of the first blocks, as far as their
  tokens are known to the prefix cache.
  """

  blocks: list[int] = dataclasses.field(default_factory=list)
  length: int = 0
  nodes: list[int] = dataclasses.field(default_factory=list)

  @property
  def last_node(self) -> int:
    """The parent of the next block."""
    return self.nodes[-1] if self.nodes else _ROOT


class BlockPool:
  """All blocks of one rank's cache."""

  def __init__(self, num_blocks: int, block_size: int):
    """Args: block_size: tokens of a block."""
    if num_blocks < 1 or block_size < 1:
      raise ValueError(
        f'num_blocks={num_blocks} and block_size={block_size} must be >= 1'
      )
    self.num_blocks, self.block_size = num_blocks, block_size
    self._ref_counts = [0] * num_blocks
    self._empty = list(range(num_blocks))[::-1]  # the lowest is taken first
    self._nodes = itertools.count(_ROOT + 1)
    # (parent, tokens) -> (node, block), and the key of each known block.
    self._tree: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
    # Known blocks that no sequence uses, the least recently used first.
    self._evictable: dict[int, None] = {}

  @property
  def available(self) -> int:
    """Blocks that can be allocated now."""
    return len(self._empty) + len(self._evictable)

  @property
  def in_use(self) -> int:
    """Blocks that sequences have."""
    return self.num_blocks - self.available

  def blocks_for(self, length: int) -> int:
    """Number of blocks that `length` tokens take."""
    return -(-length // self.block_size)

  def match_prefix(self, tokens: Sequence[int]) -> BlockTable:
    """A block table with the known blocks that these tokens begin with.

    At least the last token is not matched: it must be computed, as it gives the
    next one.
    """
    table = BlockTable()
    for node, block in self._match(tokens):
      self._acquire(block)
      table.blocks.append(block)
      table.nodes.append(node)
    table.length = len(table.blocks) * self.block_size
    return table

  def num_matching_blocks(self, tokens: Sequence[int]) -> int:
    """Number of blocks that `match_prefix` would take."""
    return sum(1 for _ in self._match(tokens))

  def fork(self, table: BlockTable) -> BlockTable:
    """A second table with the same tokens, on the same blocks.

    Blocks that hold no token yet are not shared: each sequence writes its own.
    """
    shared = table.blocks[: self.blocks_for(table.length)]
    for block in shared:
      self._acquire(block)
    return BlockTable(shared, table.length, list(table.nodes))

  def extend(self, table: BlockTable, length: int) -> list[BlockCopy]:
    """Allocates blocks to write the tokens from `table.length` up to `length`.

    Returns:
      At most one block to copy; `table.length` does not change.

    Raises:
      OutOfBlocks: nothing has changed then.
    """
    if length <= table.length:
      return []
    first = table.length // self.block_size  # the block that is written first
    shared = first < len(table.blocks) and self._is_shared(table.blocks[first])
    more = max(self.blocks_for(length) - len(table.blocks), 0)
    if more + shared > self.available:
      raise OutOfBlocks(f'{more + shared} of {self.available} blocks')
    copies = []
    if shared:
      old, table.blocks[first] = table.blocks[first], self._allocate()
      self._release_block(old)
      copies.append(BlockCopy(old, table.blocks[first]))
    table.blocks += [self._allocate() for _ in range(more)]
    return copies

  def commit(
    self,
    table: BlockTable,
    tokens: Sequence[int],
    num_shareable: int | None = None,
  ) -> None:
    """Records that the sequence's blocks now hold these tokens.

    Args:
      tokens: all of the sequence, from its first on.
      num_shareable: how many of them enter the prefix cache; None: all.
    """
    table.length = len(tokens)
    end = table.length
    if num_shareable is not None:
      end = min(num_shareable, end)
    for block in table.blocks[len(table.nodes) : end // self.block_size]:
      start = len(table.nodes) * self.block_size
      key = (table.last_node, tuple(tokens[start : start + self.block_size]))
      if key not in self._tree:  # another sequence may have been first
        self._tree[key] = (next(self._nodes), block)
        self._keys[block] = key
      table.nodes.append(self._tree[key][0])

  def release(self, table: BlockTable) -> None:
    """Returns all blocks; known ones stay in the prefix cache until evicted."""
    for block in reversed(table.blocks):  # children are evicted before parents
      self._release_block(block)
    table.blocks, table.length, table.nodes = [], 0, []

  def _match(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Nodes and blocks of the longest known prefix without the last token."""
    node = _ROOT
    end = (len(tokens) - 1) // self.block_size * self.block_size
    for start in range(0, end, self.block_size):
      key = (node, tuple(tokens[start : start + self.block_size]))
      if key not in self._tree:
        return
      node, block = self._tree[key]
      yield node, block

  def _is_shared(self, block: int) -> bool:
    """Another sequence reads it, or can still match it."""
    return self._ref_counts[block] > 1 or block in self._keys

  def _acquire(self, block: int) -> None:
    self._ref_counts[block] += 1
    self._evictable.pop(block, None)

  def _release_block(self, block: int) -> None:
    self._ref_counts[block] -= 1
    if self._ref_counts[block]:
      return
    if block in self._keys:
      self._evictable[block] = None
    else:
      self._empty.append(block)

  def _allocate(self) -> int:
    """An empty block, or an evicted one."""
    if self._empty:
      block = self._empty.pop()
    else:
      block = next(iter(self._evictable))
      self._evict(block)
    self._ref_counts[block] = 1
    return block

  def _evict(self, block: int) -> None:
    del self._evictable[block], self._tree[self._keys.pop(block)]
