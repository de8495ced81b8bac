"""Continuous batching: which requests run, and what the next step computes.

The tokens of a request are its prompt and the tokens generated so far. Prefill
steps compute them in chunks; the last chunk samples the next token. From then
on only the last token is not in the cache. A decode step computes it, for all
such requests together, and samples the next one. Requests join and leave
between steps, first come, first served.

A rank is a device of the mesh with rows of its own, or several devices that
share their rows (`sharding.BATCH_AXES`). One queue stands before all ranks;
each rank has a block pool. A running request lives on one rank: its blocks are
there, and all of its tokens are computed there.

If the blocks of a rank run out, the youngest request there is preempted: it
releases its blocks and waits again, in its place in the order of arrival. Its
tokens are recomputed later, perhaps on another rank, except those that the
prefix cache still holds. So the oldest request always makes progress. This
module touches no arrays.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Sequence

from dsv3_jax import errors
from dsv3_jax.inference import block_pool
from dsv3_jax.inference import request as requests

RUNNING, WAITING = requests.RequestState.RUNNING, requests.RequestState.WAITING
FINISHED = requests.RequestState.FINISHED
# Tokens of a prompt that are scored at a time: each has logits of its own.
SCORED_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
  """Requests of a step, and how many tokens of each it computes.

  counts: of each request, the next tokens that the cache does not hold, with
  its speculative tokens. If the step computes all that are left, it also
  samples the next token.
  copies: done before the step; they number the blocks of all ranks, one rank
  after the other.
  """

  requests: list[requests.Request]
  counts: list[int]
  copies: list[block_pool.BlockCopy]

  @property
  def is_uncached(self) -> bool:
    """The cache holds no token of its requests, which are not scored."""
    return not self.is_scored and all(r.is_uncached for r in self.requests)

  @property
  def is_scored(self) -> bool:
    """Log-probabilities of its prompt are wanted; it has one request a rank."""
    return any(request.sampling.prompt_logprobs for request in self.requests)


class Scheduler:
  """Waiting and running requests, and the block pool of each rank."""

  def __init__(
    self,
    pools: Sequence[block_pool.BlockPool],
    max_rows: int,
    chunk: int,
    lookahead: int = 0,
    *,
    batch_invariant: bool = False,
  ):
    """Args:
    pools: one for each rank, all of the same size.
    max_rows: requests that run at a time on each rank.
    chunk: most tokens of a prefill on each rank.
    lookahead: places behind its tokens for which a request has blocks too, for
      speculative tokens.
    batch_invariant: a prefill computes prompt tokens of one request only, and
      decode steps compute all generated tokens, also after a preemption.
      Generated tokens do not enter the prefix cache.
    """
    if max_rows < 1 or chunk < 1:
      raise ValueError(f'max_rows={max_rows} and chunk={chunk} must be >= 1')
    self.pools = list(pools)
    self.max_rows, self.chunk = max_rows, chunk
    self.lookahead, self.batch_invariant = lookahead, batch_invariant
    self.waiting: list[requests.Request] = []
    # Both in order of arrival.
    self.running_by_rank: list[list[requests.Request]] = [[] for _ in pools]
    self.preempted = 0
    self._numbers = itertools.count()

  @property
  def running(self) -> list[requests.Request]:
    return [request for rank in self.running_by_rank for request in rank]

  @property
  def is_idle(self) -> bool:
    return not (self.waiting or self.running)

  @property
  def num_blocks_per_rank(self) -> int:
    return self.pools[0].num_blocks

  @property
  def room(self) -> int:
    """Tokens that the cache of a rank has room for."""
    return self.num_blocks_per_rank * self.pools[0].block_size

  @property
  def num_blocks(self) -> int:
    """Of all ranks."""
    return sum(pool.num_blocks for pool in self.pools)

  @property
  def blocks_in_use(self) -> int:
    """Of all ranks."""
    return sum(pool.in_use for pool in self.pools)

  def check(self, length: int, max_new_tokens: int) -> None:
    """Checks that a request of these sizes can be added.

    Raises:
      InputError: it would not fit into the cache of a rank if it were alone.
    """
    places = length + max_new_tokens
    if places > self.room:
      raise errors.InputError(
        f'a prompt of {length} tokens with max_new_tokens={max_new_tokens} '
        f'needs {places} places in the cache, which has {self.room}'
      )

  def add(self, request: requests.Request) -> None:
    """Puts a request at the end of the queue; raises as `check`."""
    self.check(len(request.prompt), request.max_new_tokens)
    request.number = next(self._numbers)
    self.waiting.append(request)

  def finish(self, request: requests.Request) -> None:
    """Takes a request out, complete or not; a second call does nothing."""
    if request.state is WAITING:
      self.waiting.remove(request)
    elif request.state is RUNNING:
      self.running_by_rank[request.rank].remove(request)
      self._release(request)
    request.state = FINISHED

  def prefill(self) -> list[ScheduledStep]:
    """Admits requests while there is room, then schedules a chunk of each rank.

    Returns:
      At most three steps, which run different programs: of the ranks whose
      requests have nothing in the cache, of those whose prompts are scored, and
      of the others.
    """
    while self.waiting and self._admit(self.waiting[0]):
      self.waiting.pop(0)
    chunks = [self._next_chunk(rank) for rank in range(len(self.pools))]
    chunks = [step for step in chunks if step is not None]
    programs = collections.defaultdict(list)
    for step in chunks:
      programs[not step.is_uncached, step.is_scored].append(step)
    return [_join(programs[kind]) for kind in sorted(programs)]

  def decode(self) -> ScheduledStep | None:
    """Last and speculative tokens of all requests that are ready to decode."""
    steps = [self._decode(rank) for rank in range(len(self.pools))]
    steps = [step for step in steps if step.requests]
    return _join(steps) if steps else None

  def commit(self, request: requests.Request, count: int) -> None:
    """Records that `count` more of the request's tokens are in the cache."""
    pool, table = self.pools[request.rank], request.block_table
    num_shareable = len(request.prompt) if self.batch_invariant else None
    tokens = request.all_tokens[: table.length + count]
    pool.commit(table, tokens, num_shareable)
    for other in self._sharers(request):
      length = len(other.all_tokens)
      if table.length == length:
        other.block_table = pool.fork(table)
        other.shares_prompt_with = None
        # The last token is computed again, to sample the next one from it.
        other.block_table.length = other.num_cached_tokens = length - 1

  def _next_chunk(self, rank: int) -> ScheduledStep | None:
    """A chunk of the oldest request that is not ready to decode.

    Younger requests join if their chunks fit too, with all chunks padded to the
    longest and to whole blocks. Requests that have tokens in the cache, and
    those that have none, do not share a step.
    """
    chosen, counts, pool = [], [], self.pools[rank]
    for request in self.running_by_rank[rank]:
      if request.shares_prompt_with or self._is_ready_to_decode(request):
        continue
      is_scored = request.sampling.prompt_logprobs
      if chosen and (
        self.batch_invariant
        or is_scored
        or chosen[0].sampling.prompt_logprobs
        or request.is_uncached != chosen[0].is_uncached
      ):
        continue
      most = min(self.chunk, SCORED_CHUNK) if is_scored else self.chunk
      count = min(request.num_uncomputed, most)
      longest = pool.block_size * pool.blocks_for(max([count, *counts]))
      if chosen and longest * (len(chosen) + 1) > self.chunk:
        break
      chosen.append(request)
      counts.append(count)
    return ScheduledStep(chosen, counts, []) if chosen else None

  def _decode(self, rank: int) -> ScheduledStep:
    """The part of `decode` that one rank computes."""
    running, pool = self.running_by_rank[rank], self.pools[rank]
    chosen, copies = [], []
    for request in list(running):
      while request.state is RUNNING and self._is_ready_to_decode(request):
        try:
          new = pool.extend(request.block_table, self._num_places(request))
        except block_pool.OutOfBlocks:
          # The loop goes from old to young: the youngest is not in `chosen`.
          self._preempt(running[-1])
          self.preempted += 1
        else:
          first = rank * pool.num_blocks
          copies += [block_pool.BlockCopy(first + a, first + b) for a, b in new]
          chosen.append(request)
          break
    for request in chosen:  # k speculative tokens give at most k + 1 tokens
      most = max(request.max_length - len(request.all_tokens) - 1, 0)
      if request.matcher is not None:  # a grammar needs the tokens before
        most = 0
      del request.speculative_tokens[most:]
    counts = [1 + len(request.speculative_tokens) for request in chosen]
    return ScheduledStep(chosen, counts, copies)

  def _admit(self, request: requests.Request) -> bool:
    """Admits a request to the best rank that has room for it.

    The best rank has the lowest cost: its rows, minus the blocks of the request
    that its prefix cache holds. Ties go to the rank with most available blocks.
    """

    def cost(rank):
      pool = self.pools[rank]
      matching = pool.num_matching_blocks(request.all_tokens)
      return len(self.running_by_rank[rank]) - matching, -pool.available

    free = [
      rank
      for rank, running in enumerate(self.running_by_rank)
      if len(running) < self.max_rows
    ]
    if _waits_for_shared_prompt(request):
      rank = request.shares_prompt_with.rank
      if rank in free:
        free = [rank]  # where the blocks to share are
      else:  # it must not hold up the requests behind it
        request.shares_prompt_with = None
    return any(self._admit_to(rank, request) for rank in sorted(free, key=cost))

  def _admit_to(self, rank: int, request: requests.Request) -> bool:
    """Admits a request if the rank has blocks for the tokens so far."""
    if self.batch_invariant or not _waits_for_shared_prompt(request):
      request.shares_prompt_with = None
    pool, table = self.pools[rank], block_pool.BlockTable()
    if not request.shares_prompt_with:
      if not request.sampling.prompt_logprobs:  # all of it is computed
        table = pool.match_prefix(request.all_tokens)
      try:
        # Nothing is copied, as only whole blocks match.
        pool.extend(table, self._num_places(request))
      except block_pool.OutOfBlocks:
        pool.release(table)
        return False
    request.block_table, request.rank, request.state = table, rank, RUNNING
    if request.num_cached_tokens is None and not request.shares_prompt_with:
      request.num_cached_tokens = table.length
    bisect.insort(self.running_by_rank[rank], request, key=_number)
    return True

  def _is_ready_to_decode(self, request: requests.Request) -> bool:
    """The cache holds all of its tokens but the last."""
    if self.batch_invariant:
      return request.block_table.length >= len(request.prompt)
    return request.num_uncomputed == 1 and not request.is_uncached

  def _num_places(self, request: requests.Request) -> int:
    """Tokens that the request's blocks must have room for."""
    return min(len(request.all_tokens) + self.lookahead, request.max_length)

  def _preempt(self, request: requests.Request) -> None:
    self.running_by_rank[request.rank].remove(request)
    self._release(request)
    request.state = WAITING
    num_tokens = len(request.all_tokens)
    request.num_reported = max(request.num_reported, num_tokens)
    if self.batch_invariant:  # no prefill may compute generated tokens
      del request.all_tokens[len(request.prompt) :]
      request.logprobs.clear()
    bisect.insort(self.waiting, request, key=_number)

  def _release(self, request: requests.Request) -> None:
    """Releases its blocks; preempts requests that wait to share them."""
    for other in self._sharers(request):
      self._preempt(other)
    self.pools[request.rank].release(request.block_table)
    request.block_table, request.speculative_tokens = None, []

  def _sharers(self, request: requests.Request) -> list[requests.Request]:
    """Running requests that wait for its prompt."""
    running = self.running_by_rank[request.rank]
    return [r for r in running if r.shares_prompt_with is request]


def _waits_for_shared_prompt(request: requests.Request) -> bool:
  """Another request is prefilling the prompt, which has two or more tokens."""
  other = request.shares_prompt_with
  length = len(request.all_tokens)
  if other is None or other.state is not RUNNING or length < 2:
    return False
  # If it was preempted with generated tokens, its prefill has these too.
  return len(other.all_tokens) == length and other.block_table.length < length


def _join(steps: Sequence[ScheduledStep]) -> ScheduledStep:
  """Steps of several ranks as one."""
  chain = lambda field: [x for step in steps for x in getattr(step, field)]
  return ScheduledStep(chain('requests'), chain('counts'), chain('copies'))


def _number(request: requests.Request) -> int:
  return request.number
