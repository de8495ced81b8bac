"""Requests of a mesh: one queue, and a scheduler with pages for each rank.

A rank is a device that has rows of its own, or several that share its rows
(`sharding.BATCH_AXES`). A row lives on one rank: its pages are there, and all
of its tokens are computed there. The oldest request that waits goes to the rank
that suits it best as soon as one has room; who had to give his pages back waits
with the others, and may go elsewhere. Nothing here knows of arrays.
"""

from collections.abc import Sequence

from dsv3_jax.inference import block_pool, scheduler


class Ranks:
  """What a `scheduler.Scheduler` does, for several; of one, it is the same."""

  def __init__(self, each: Sequence[scheduler.Scheduler]):
    """Args: each: of a rank, all made alike."""
    self.each = list(each)
    self.waiting: list[scheduler.Job] = []
    for one in self.each:
      one.waiting = self.waiting  # preempted jobs go there too

  @property
  def running(self) -> list[scheduler.Job]:
    return [job for one in self.each for job in one.running]

  @property
  def max_rows(self) -> int:
    return sum(one.max_rows for one in self.each)

  @property
  def chunk(self) -> int:
    """Of each rank."""
    return self.each[0].chunk

  @property
  def preempted(self) -> int:
    return sum(one.preempted for one in self.each)

  @property
  def num_pages(self) -> int:
    """Of all ranks."""
    return sum(one.pool.count for one in self.each)

  @property
  def pages_in_use(self) -> int:
    return sum(one.pool.in_use for one in self.each)

  @property
  def is_idle(self) -> bool:
    return not (self.waiting or self.running)

  def check(self, length: int, max_new_tokens: int) -> None:
    """As `Scheduler.check`: each rank has as much room."""
    self.each[0].check(length, max_new_tokens)

  def add(
    self,
    prompt: Sequence[int],
    max_new_tokens: int,
    twin: scheduler.Job | None = None,
  ) -> scheduler.Job:
    """Puts a request at the end of the queue; raises as `check`."""
    return self.each[0].add(prompt, max_new_tokens, twin)

  def end(self, job: scheduler.Job) -> None:
    """Takes a job out, done or not; twice is no fault."""
    self.each[job.rank].end(job)

  def prefill(self) -> list[scheduler.Step]:
    """A chunk of every rank: first of those whose rows begin, then the rest.

    What they run is compiled apart.
    """
    while self.waiting and self._admit(self.waiting[0]):
      self.waiting.pop(0)
    found = [one.next_chunk() for one in self.each]
    new, begun = [], []
    for rank, step in enumerate(found):
      if step is not None:
        (new if step.is_new else begun).append((rank, step))
    return [self._joined(steps) for steps in (new, begun) if steps]

  def decode(self) -> scheduler.Step | None:
    """As `Scheduler.decode`, of all ranks at once."""
    found = [(rank, one.decode()) for rank, one in enumerate(self.each)]
    found = [(rank, step) for rank, step in found if step is not None]
    return self._joined(found) if found else None

  def done(self, job: scheduler.Job, count: int) -> None:
    """Says that `count` more of its tokens are in the cache."""
    self.each[job.rank].done(job, count)

  def _admit(self, job: scheduler.Job) -> bool:
    """A page that it finds counts as much as a row less; then free pages."""

    def cost(rank):
      one = self.each[rank]
      rows = len(one.running) - one.pool.known(job.tokens)
      return rows, -one.pool.available

    pairs = enumerate(self.each)
    free = [r for r, one in pairs if len(one.running) < one.max_rows]
    if scheduler.waits_for_twin(job):  # whose pages it will take over
      if job.twin.rank in free:
        free = [job.twin.rank]
      else:  # others need not wait behind it
        job.twin = None
    for rank in sorted(free, key=cost):
      if self.each[rank].admit(job):
        job.rank = rank
        return True
    return False

  def _joined(self, found: list[tuple[int, scheduler.Step]]) -> scheduler.Step:
    """Steps of several ranks as one; copies count the pages of all of them."""
    jobs, counts, copies = [], [], []
    for rank, step in found:
      first = rank * self.each[rank].pool.count
      jobs += step.jobs
      counts += step.counts
      copies += [block_pool.Copy(first + a, first + b) for a, b in step.copies]
    return scheduler.Step(jobs, counts, copies)
