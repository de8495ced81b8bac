"""Which page of the latent cache is whose: allocation, sharing, release.

A cache is pages of `size` tokens; a row has a list of them, its block table.
Everything here is bookkeeping on the host; arrays are elsewhere (`Copy` says
what must be copied in them, before anything else is written).

A full page whose tokens are known is kept after its row has gone, and a later
row that begins with the same tokens takes it: the prompt cache. Pages form a
tree, a page's key being its parent and its own tokens, so that what is found is
equal and not only of equal hash. A page that others read or may find is never
written: who wants to go on in the middle of it gets a copy of his own. Known
pages that nobody uses are given up when no empty ones are left, the longest
unused first, children before parents.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ROOT = 0  # the parent of first pages


class Copy(NamedTuple):
  """A whole page to be copied, in all layers."""

  source: int
  target: int


class OutOfPages(Exception):
  """There are fewer pages than asked for; nothing has changed."""


@dataclasses.dataclass(eq=False)
class Row:
  """Pages of one sequence: those of its first `length` tokens, and maybe more.

  nodes: of the first pages, as far as the tree knows their tokens.
  """

  pages: list[int] = dataclasses.field(default_factory=list)
  length: int = 0
  nodes: list[int] = dataclasses.field(default_factory=list)

  @property
  def node(self) -> int:
    """The parent of the next page."""
    return self.nodes[-1] if self.nodes else _ROOT


class BlockPool:
  """All pages of a cache."""

  def __init__(self, count: int, size: int):
    """Args: count: pages. size: tokens of each."""
    if count < 1 or size < 1:
      raise ValueError(f'count={count} and size={size} must be >= 1')
    self.count, self.size = count, size
    self._users = [0] * count
    self._empty = list(range(count))[::-1]  # the lowest is taken first
    self._nodes = itertools.count(_ROOT + 1)
    # (parent, tokens) -> (node, page), and the key of a page that is known.
    self._tree: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
    self._unused: dict[int, None] = {}  # known pages of no row, oldest first

  @property
  def available(self) -> int:
    """Pages that a row could get now."""
    return len(self._empty) + len(self._unused)

  @property
  def in_use(self) -> int:
    """Pages of rows."""
    return self.count - self.available

  def pages_for(self, length: int) -> int:
    """How many pages so many tokens take."""
    return -(-length // self.size)

  def begin(self, tokens: Sequence[int]) -> Row:
    """A row that holds what is known of these tokens, in whole pages.

    At least one token is left to be computed: it gives the next one.
    """
    row = Row()
    for node, page in self._known(tokens):
      self._use(page)
      row.pages.append(page)
      row.nodes.append(node)
    row.length = len(row.pages) * self.size
    return row

  def known(self, tokens: Sequence[int]) -> int:
    """How many pages `begin` would find."""
    return sum(1 for _ in self._known(tokens))

  def fork(self, row: Row) -> Row:
    """A second row with the same tokens, on the same pages.

    Without those that the first has for later tokens: each writes its own.
    """
    shared = row.pages[: self.pages_for(row.length)]
    for page in shared:
      self._use(page)
    return Row(shared, row.length, list(row.nodes))

  def extend(self, row: Row, length: int) -> list[Copy]:
    """Makes room to write the row's tokens from its length up to `length`.

    Returns:
      At most one page to copy; the row's length stays as it is.

    Raises:
      OutOfPages: nothing has changed then.
    """
    if length <= row.length:
      return []
    first = row.length // self.size  # the page that is written first
    shared = first < len(row.pages) and self._is_read(row.pages[first])
    more = max(self.pages_for(length) - len(row.pages), 0)
    if more + shared > self.available:
      raise OutOfPages(f'{more + shared} of {self.available} pages')
    copies = []
    if shared:
      old, row.pages[first] = row.pages[first], self._take()
      self._leave(old)
      copies.append(Copy(old, row.pages[first]))
    row.pages += [self._take() for _ in range(more)]
    return copies

  def written(
    self, row: Row, tokens: Sequence[int], known: int | None = None
  ) -> None:
    """Says that the row now holds these tokens, all from its first on.

    Args:
      known: how many of them others may find; None: all.
    """
    row.length = len(tokens)
    end = row.length if known is None else min(known, row.length)
    for page in row.pages[len(row.nodes) : end // self.size]:
      start = len(row.nodes) * self.size
      key = (row.node, tuple(tokens[start : start + self.size]))
      if key not in self._tree:  # else another row was quicker
        self._tree[key] = (next(self._nodes), page)
        self._keys[page] = key
      row.nodes.append(self._tree[key][0])

  def release(self, row: Row) -> None:
    """Gives the pages back; what is known of them stays until it must go."""
    for page in reversed(row.pages):  # children are given up before parents
      self._leave(page)
    row.pages, row.length, row.nodes = [], 0, []

  def _known(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Nodes and pages of what the tree knows, none with the last token."""
    node, end = _ROOT, (len(tokens) - 1) // self.size * self.size
    for start in range(0, end, self.size):
      key = (node, tuple(tokens[start : start + self.size]))
      if key not in self._tree:
        return
      node, page = self._tree[key]
      yield node, page

  def _is_read(self, page: int) -> bool:
    """By another row, now or after it has begun with what is known."""
    return self._users[page] > 1 or page in self._keys

  def _use(self, page: int) -> None:
    self._users[page] += 1
    self._unused.pop(page, None)

  def _leave(self, page: int) -> None:
    self._users[page] -= 1
    if self._users[page]:
      return
    if page in self._keys:
      self._unused[page] = None
    else:
      self._empty.append(page)

  def _take(self) -> int:
    """A page that is nobody's."""
    if self._empty:
      page = self._empty.pop()
    else:
      page = next(iter(self._unused))
      self._drop(page)
    self._users[page] = 1
    return page

  def _drop(self, page: int) -> None:
    del self._unused[page], self._tree[self._keys.pop(page)]
