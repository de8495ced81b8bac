"""Continuous batching: which requests run, and what the next step computes.

A request's tokens are its prompt and what was generated so far; its row of the
cache holds the first of them. What is not in the cache yet is computed: many
tokens, or the first, in chunks (prefill), the last one together with those of
other requests (decode). Requests join and leave between steps, in order of
arrival.

Where pages run out, the request that came last gives back all of its own and
waits at the head of the queue; its tokens are computed anew later, apart from
what others' pages or the prompt cache still hold of them. So the oldest always
goes on. Nothing here knows of arrays.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from dsv3_jax import errors
from dsv3_jax.inference import block_pool


@dataclasses.dataclass(eq=False)
class Job:
  """A request on its way.

  tokens: prompt and generated ones. most: how many there may be in the end.
  number: of its arrival. row: what of it is in the cache, None while it waits.
  rank: whose cache that is. found: how many tokens of the prompt the cache had
  when it first began. drafts: what may follow its tokens. asked: tokens of its
  prompt. told: tokens that it had when it was last told to give way.
  twin: an earlier job that computes the same prompt, as long as this one waits
  for it, in its place but without pages, to take them over.
  """

  tokens: list[int]
  most: int
  number: int
  row: block_pool.Row | None = None
  rank: int = 0
  found: int | None = None
  drafts: list[int] = dataclasses.field(default_factory=list)
  twin: 'Job | None' = None
  asked: int = 0
  told: int = 0

  @property
  def missing(self) -> int:
    """Tokens to be computed before there is a next one."""
    return len(self.tokens) - self.row.length


@dataclasses.dataclass(frozen=True)
class Step:
  """Of each job, the next `counts` tokens that the cache has not; see `Copy`.

  Copies come first. A job whose missing tokens are all in the step gets its
  next token by it. Drafts count as tokens.
  """

  jobs: list[Job]
  counts: list[int]
  copies: list[block_pool.Copy]

  @property
  def is_new(self) -> bool:
    """Its jobs have nothing in the cache."""
    return all(map(_is_new, self.jobs))


class Scheduler:
  """Jobs, waiting and running, and the pages that they have."""

  def __init__(
    self,
    pool: block_pool.BlockPool,
    max_rows: int,
    chunk: int,
    ahead: int = 0,
    *,
    alike: bool = False,
  ):
    """Args:
    max_rows: jobs that run at a time. chunk: tokens of a prefill. ahead: places
      behind its tokens that a job has too, for drafts. alike: all tokens of
      prompts are computed by prefills of one job, and all others, which no
      other job reads, by decoding, whatever happens on the way.
    """
    if max_rows < 1 or chunk < 1:
      raise ValueError(f'max_rows={max_rows} and chunk={chunk} must be >= 1')
    self.pool, self.max_rows, self.chunk = pool, max_rows, chunk
    self.ahead, self.alike = ahead, alike
    self.waiting: list[Job] = []
    self.running: list[Job] = []  # in order of arrival
    self.preempted = 0
    self._numbers = itertools.count()

  @property
  def is_idle(self) -> bool:
    return not (self.waiting or self.running)

  def check(self, length: int, max_new_tokens: int) -> None:
    """Whether a request of these sizes can be added.

    Raises:
      InputError: it would not fit if it were alone.
    """
    most = length + max_new_tokens
    room = self.pool.count * self.pool.size
    if most > room:
      raise errors.InputError(
        f'a prompt of {length} tokens with max_new_tokens={max_new_tokens} '
        f'needs {most} places in the cache, which has {room}'
      )

  def add(
    self, prompt: Sequence[int], max_new_tokens: int, twin: Job | None = None
  ) -> Job:
    """Puts a request at the end of the queue; raises as `check`."""
    self.check(len(prompt), max_new_tokens)
    most = len(prompt) + max_new_tokens
    job = Job(list(prompt), most, next(self._numbers), twin=twin)
    job.asked = len(prompt)
    self.waiting.append(job)
    return job

  def end(self, job: Job) -> None:
    """Takes a job out, done or not; twice is no fault."""
    if job in self.waiting:
      self.waiting.remove(job)
    if job in self.running:
      self.running.remove(job)
      self._leave(job)

  def prefill(self) -> Step | None:
    """Lets jobs in while they find room; then `next_chunk`."""
    while self.waiting and self.admit(self.waiting[0]):
      self.waiting.pop(0)
    return self.next_chunk()

  def next_chunk(self) -> Step | None:
    """A chunk of the oldest job that is not ready to decode.

    Younger ones come along if theirs fit into the chunk too, all padded to the
    longest and to whole pages; jobs that have nothing in the cache, and those
    that have, not together.
    """
    jobs, counts = [], []
    for job in self.running:
      if job.twin or self._decodes(job):
        continue
      if jobs and (self.alike or _is_new(job) != _is_new(jobs[0])):
        continue
      count = min(job.missing, self.chunk)
      longest = self.pool.size * self.pool.pages_for(max([count, *counts]))
      if jobs and longest * (len(jobs) + 1) > self.chunk:
        break
      jobs.append(job)
      counts.append(count)
    return Step(jobs, counts, []) if jobs else None

  def decode(self) -> Step | None:
    """The last token of all jobs that miss no other, and their drafts."""
    jobs, copies = [], []
    for job in list(self.running):
      while job.row is not None and self._decodes(job):
        try:
          copies += self.pool.extend(job.row, self._places(job))
        except block_pool.OutOfPages:  # the last one: no job is before its turn
          self._preempt(self.running[-1])
          self.preempted += 1
        else:
          jobs.append(job)
          break
    if not jobs:
      return None
    for job in jobs:  # nothing is drawn behind the last place but one
      del job.drafts[max(job.most - len(job.tokens) - 1, 0) :]
    return Step(jobs, [1 + len(job.drafts) for job in jobs], copies)

  def done(self, job: Job, count: int) -> None:
    """Says that `count` more of its tokens are in the cache."""
    known = job.asked if self.alike else None
    self.pool.written(job.row, job.tokens[: job.row.length + count], known)
    for other in self._twins(job):
      if job.row.length == len(other.tokens):
        other.row, other.twin = self.pool.fork(job.row), None
        # Its last token is computed again: the next one is drawn after it.
        other.row.length = other.found = len(other.tokens) - 1

  def admit(self, job: Job) -> bool:
    """Lets a job in if it finds a row, and pages for all it has so far."""
    if len(self.running) == self.max_rows:
      return False
    if self.alike or not waits_for_twin(job):
      job.twin = None
    row = block_pool.Row() if job.twin else self.pool.begin(job.tokens)
    places = 0 if job.twin else self._places(job)
    try:
      self.pool.extend(row, places)  # copies nothing: it has whole pages
    except block_pool.OutOfPages:
      self.pool.release(row)
      return False
    job.row = row
    if job.found is None and not job.twin:
      job.found = row.length
    bisect.insort(self.running, job, key=_number)
    return True

  def _decodes(self, job: Job) -> bool:
    """All but its last token are in the cache."""
    if self.alike:
      return job.row.length >= job.asked
    return job.missing == 1 and not _is_new(job)

  def _places(self, job: Job) -> int:
    return min(len(job.tokens) + self.ahead, job.most)

  def _preempt(self, job: Job) -> None:
    self.running.remove(job)
    self._leave(job)
    job.told = max(job.told, len(job.tokens))
    if self.alike:  # what was generated must not become part of a prefill
      del job.tokens[job.asked :]
    bisect.insort(self.waiting, job, key=_number)

  def _leave(self, job: Job) -> None:
    """Gives its pages back; who waits for them queues again."""
    for other in self._twins(job):
      self._preempt(other)
    self.pool.release(job.row)
    job.row, job.drafts = None, []

  def _twins(self, job: Job) -> list[Job]:
    """Those that wait for its prompt."""
    return [other for other in self.running if other.twin is job]


def waits_for_twin(job: Job) -> bool:
  """Its twin computes their prompt, of which more than a token is left."""
  twin = job.twin
  if twin is None or twin.row is None or len(job.tokens) < 2:
    return False
  # One that comes back with more tokens would pass by where they part.
  is_there = len(twin.tokens) == len(job.tokens)
  return is_there and twin.row.length < len(job.tokens)


def _number(job: Job) -> int:
  return job.number


def _is_new(job: Job) -> bool:
  """Nothing of it is in the cache."""
  return job.row.length == 0
