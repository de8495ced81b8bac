"""Requests that share steps: they join and leave while others go on.

A `Session` has a cache of its own. Each of its steps computes at most one chunk
of prompts and then the last token of every row that has its prompt behind it,
with drafts of the next ones. Rows, tokens and pages of a step are rounded up to
a few sizes, each compiled once.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.inference import (
  block_pool,
  model_runner,
  ranks,
  sampling,
  scheduler,
)
from pallas_kernels.mla_decode import api as mla_decode

PAGE = mla_decode.PAGE  # tokens; also the least of a prefill
INVARIANT_ROWS = 16  # of every such decode step, where nobody asks for others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """How a request's tokens are drawn; see `sampling.Draws`.

  stream: tells requests of one seed apart.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stream: int = 0


@dataclasses.dataclass(eq=False)
class Request:
  """A request; `tokens` grows until `done`."""

  prompt: list[int]
  draw: Draw
  stop_ids: frozenset[int]
  job: scheduler.Job
  key_2: np.ndarray
  done: bool = False

  @property
  def tokens(self) -> list[int]:
    """What was generated so far, the stop token included."""
    return self.job.tokens[len(self.prompt) :]


class Size(NamedTuple):
  """What decides which step is compiled: its kind, and sizes of its arrays.

  kind: 'prefill', 'extend' or 'decode', as in `steps.Steps`.
  """

  rows: int
  tokens: int
  pages: int
  kind: str


class Told(NamedTuple):
  """A new token of a request, its last or not."""

  request: Request
  token: int
  is_last: bool


@dataclasses.dataclass
class Decoded:
  """What decode steps of a session did.

  rows: of all steps together. tokens: that they gave. drafted: tokens that they
  were to verify, and how many of these were accepted.
  """

  steps: int = 0
  rows: int = 0
  tokens: int = 0
  drafted: int = 0
  accepted: int = 0

  @property
  def acceptance(self) -> float:
    """Of drafts, 0 to 1; 0 if there were none."""
    return self.accepted / max(self.drafted, 1)

  @property
  def tokens_per_step(self) -> float:
    """That a row gets."""
    return self.tokens / max(self.rows, 1)


class Engine:
  """Requests on one set of steps, with one cache."""

  def __init__(
    self,
    made: model_runner.ModelRunner,
    *,
    num_pages: int,
    max_rows: int,
    chunk: int = 1024,
    least_pages: int = 1,
    least_rows: int = 1,
    invariant: bool = False,
  ):
    """Args:
    num_pages: of the cache. max_rows: requests that run at a time; others
      wait. chunk: most tokens of a prefill. least_pages: to which the block
      tables of rows are rounded up; least_rows: likewise, when decoding. On a
      mesh, these are the numbers of each rank.
      invariant: a request gets the same tokens, to the bit of what they are
      drawn from, whatever shares its steps. All steps have their largest size
      then, prefills one row: slow.
    """
    self.steps = made
    # Drafts, and as many again by the module's own hidden states.
    ahead = 2 * made.num_drafts
    each = [
      scheduler.Scheduler(
        block_pool.BlockPool(num_pages, PAGE),
        max_rows,
        chunk,
        ahead,
        alike=invariant,
      )
      for _ in range(made.num_ranks)
    ]
    self.scheduler, self.pool = ranks.Ranks(each), each[0].pool
    self.invariant = invariant
    if invariant:  # all steps are of one size, which others must not change
      least_pages, least_rows = 1, max_rows
    self.least_pages, self._least_rows = least_pages, least_rows
    self._caches = made.empty_caches(num_pages, PAGE)
    self._requests: dict[scheduler.Job, Request] = {}
    self.decoded = Decoded()

  def submit(
    self,
    prompt: Sequence[int],
    max_new_tokens: int,
    draw: Draw = Draw(),
    stop_ids: Sequence[int] = (),
    twin: Request | None = None,
  ) -> Request:
    """Puts a request into the queue.

    Args:
      twin: an earlier one with the same prompt; see `Job.twin`.

    Raises:
      InputError: as `check`.
    """
    self.check(prompt, max_new_tokens)
    of = twin.job if twin else None
    job = self.scheduler.add(prompt, max_new_tokens, of)
    request = Request(list(prompt), draw, frozenset(stop_ids), job, _key(draw))
    self._requests[job] = request
    return request

  def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Whether `submit` would take it; from any thread.

    Raises:
      InputError: no token is asked for, `check_prompt` refuses it, or it needs
        more pages than there are.
    """
    if max_new_tokens < 1:
      raise errors.InputError(f'max_new_tokens={max_new_tokens} must be >= 1')
    check_prompt(self.steps.cfg.model, prompt, max_new_tokens)
    self.scheduler.check(len(prompt), max_new_tokens)

  def room(self, length: int) -> int:
    """How many tokens may follow a prompt of so many."""
    places = self.pool.count * self.pool.size
    return min(self.steps.cfg.model.max_seq_len, places) - length

  def cancel(self, request: Request) -> None:
    """Ends a request that nobody waits for any more."""
    self._end(request)

  def warm(self, size: Size) -> None:
    """Compiles a step, by a run on rows that have no tokens."""
    rows, draws = self._empty(*size[:3])
    _key(Draw())
    caches = self.steps.copy([block_pool.Copy(0, 0)], self._caches)
    run = getattr(self.steps, size.kind)
    made, self._caches = run(rows, caches, draws)
    jax.block_until_ready(made)

  @property
  def is_idle(self) -> bool:
    return self.scheduler.is_idle

  def step(self) -> list[Told]:
    """One chunk of prompts, and what follows in every row behind its prompt.

    That is a token, and as many more as drafts were right.
    """
    return self.prefill() + self.decode()

  def prefill(self) -> list[Told]:
    """The prefill of a step alone."""
    told = []
    for found in self.scheduler.prefill():
      told += self._prefill(found)
    return told

  def _prefill(self, found: scheduler.Step) -> list[Told]:
    """Of rows that begin, or of rows that go on."""
    is_new, told = found.is_new, []
    longest = max(found.counts, default=0)
    if self.invariant:
      is_new, longest = False, self.scheduler.chunk
    run = self.steps.prefill if is_new else self.steps.extend
    made = self._run(found, run, PAGE * round_up(-(-longest // PAGE)))
    for b, (job, count) in enumerate(_pairs(found)):
      is_end = job.missing == count
      self.scheduler.done(job, count)
      if is_end:
        new = self._add(job, made, b)
        told += self._tell(job, new)
    return told

  def decode(self) -> list[Told]:
    """The rest of a step."""
    found = self.scheduler.decode()
    if found is None:
      return []
    made = self._run(found, self.steps.decode)
    self.decoded.steps += 1
    told = []
    for b, (job, count) in enumerate(_pairs(found)):
      new = self._add(job, made, b)
      self.decoded.rows += 1
      self.decoded.tokens += new
      self.decoded.drafted += count - 1
      self.decoded.accepted += made.count_B[b] - 1
      self.scheduler.done(job, new)
      told += self._tell(job, new)
    return told

  def _run(
    self, found: scheduler.Step, run, width: int = 0
  ) -> model_runner.StepOutput | None:
    """What is made of the jobs, in their order.

    Args:
      width: tokens of a row; 0: those of a decode step.
    """
    self._caches = self.steps.copy(found.copies, self._caches)
    if not found.jobs:
      return None
    places, rows, draws = self._arrays(found, width)
    made, self._caches = run(rows, self._caches, draws)
    if all(job.missing > count for job, count in _pairs(found)):
      return None  # there is nothing to wait for
    return model_runner.StepOutput(
      *(x[places].tolist() for x in jax.device_get(made))
    )

  def _add(
    self, job: scheduler.Job, made: model_runner.StepOutput, b: int
  ) -> int:
    """Adds a job's new tokens, none behind its last; returns how many."""
    new = made.tokens_Bt[b][: made.count_B[b]]
    ends = [
      i for i, t in enumerate(new, 1) if t in self._requests[job].stop_ids
    ]
    new = new[: min(ends, default=len(new))]
    job.tokens += new
    job.drafts = made.drafts_Bk[b]
    return len(new)

  def _tell(self, job: scheduler.Job, new: int) -> list[Told]:
    """Of the last tokens of a job those that were not told; ends it if over."""
    request, size = self._requests[job], len(job.tokens)
    over = job.tokens[-1] in request.stop_ids or size == job.most
    told = [
      Told(request, job.tokens[at], over and at == size - 1)
      for at in range(max(size - new, job.told), size)
    ]
    if over:
      self._end(request)
    return told

  def _arrays(self, found: scheduler.Step, width: int):
    """What the compiled step takes, rounded up to sizes that it knows.

    First comes where in it each job is.
    """
    furthest = max(job.row.length for job in found.jobs)
    if self.invariant:
      furthest = self.steps.cfg.model.max_seq_len
    least = 1 if width else self._least_rows
    width = width or 1 + self.steps.num_drafts
    places, total = self._places(found.jobs, least)
    most = self.pages_of_table(furthest, width)
    rows, draws = self._empty(total, width, most)
    for b, (job, count) in zip(places, _pairs(found), strict=True):
      start, end = job.row.length, job.row.length + count
      rows.tokens_BT[b, :count] = (job.tokens[start:end] + job.drafts)[:count]
      rows.index_BT[b, :count] = range(start, end)
      rows.last_B[b] = count - 1
      if end < len(job.tokens):
        rows.after_B[b] = job.tokens[end]
      used = job.row.pages[: rows.table_Bb.shape[1]]
      rows.table_Bb[b, : len(used)] = used
      request = self._requests[job]
      draws.keys_B2[b], draw = request.key_2, request.draw
      draws.temperature_B[b], draws.top_p_B[b] = draw.temperature, draw.top_p
      draws.top_k_B[b] = draw.top_k
    return places, rows, draws

  def _places(
    self, jobs: list[scheduler.Job], least: int
  ) -> tuple[list[int], int]:
    """A row for each job, among as many for every rank, and how many in all."""
    ranks_of = [job.rank for job in jobs]
    each = round_up(max(least, *map(ranks_of.count, ranks_of)))
    numbers = [itertools.count(r * each) for r in range(self.steps.num_ranks)]
    places = [next(numbers[rank]) for rank in ranks_of]
    return places, each * self.steps.num_ranks

  def pages_of_table(self, furthest: int, width: int) -> int:
    """Pages of a step's block tables, padding and later drafts included.

    Args: furthest: tokens that the longest row has. width: that are computed.
    """
    ends = furthest + max(width, 2 * self.steps.num_drafts)
    return round_up(max(self.pool.pages_for(ends), self.least_pages))

  def _empty(
    self, count: int, width: int, num_pages: int
  ) -> tuple[model_runner.Rows, sampling.Draws]:
    """What a compiled step takes, with no tokens."""
    full = lambda value, *shape: np.full(shape, value, np.int32)
    rows = model_runner.Rows(
      tokens_BT=full(0, count, width),
      index_BT=full(-1, count, width),
      last_B=full(0, count),
      after_B=full(-1, count),
      # What is no page of a row is no page: nothing can be written there.
      table_Bb=full(self.pool.count, count, num_pages),
    )
    temperature_B, top_p_B = np.zeros((2, count), np.float32)
    draws = (np.zeros((count, 2), np.uint32), temperature_B, full(0, count))
    return rows, sampling.Draws(*draws, top_p_B)

  def _end(self, request: Request) -> None:
    request.done = True
    self.scheduler.end(request.job)
    self._requests.pop(request.job, None)


def check_prompt(
  cfg: config.ModelConfig,
  prompt: Sequence[int],
  max_new_tokens: int,
  name: str = 'the prompt',
) -> None:
  """What a session of this model can take.

  Raises:
    InputError: an empty prompt, a token outside the vocabulary, or a prompt
      that leaves no room for `max_new_tokens`; says `name`.
  """
  room = cfg.max_seq_len - max_new_tokens
  if not prompt:
    raise errors.InputError(f'{name} is empty: it needs one token at least')
  if room < 1:
    raise errors.InputError(
      f'max_new_tokens={max_new_tokens} must be below model.max_seq_len='
      f'{cfg.max_seq_len}, which a prompt shares'
    )
  if len(prompt) > room:
    raise errors.InputError(
      f'{name} has {len(prompt)} tokens; with max_new_tokens='
      f'{max_new_tokens} and model.max_seq_len={cfg.max_seq_len} at most '
      f'{room} fit'
    )
  if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
    raise errors.InputError(f'{name} has ids outside 0..{cfg.vocab_size - 1}')


def _pairs(found: scheduler.Step) -> list[tuple[scheduler.Job, int]]:
  return list(zip(found.jobs, found.counts, strict=True))


def _key(draw: Draw) -> np.ndarray:
  """Data of a request's PRNG key."""
  key = jax.random.fold_in(jax.random.key(draw.seed), draw.stream)
  return np.asarray(jax.random.key_data(key))


def round_up(count: int) -> int:
  """The next power of two."""
  return 1 << max(count - 1, 0).bit_length()
