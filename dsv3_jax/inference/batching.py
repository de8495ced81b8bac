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
from dsv3_jax.inference import pages, ranks, sampling, scheduler, steps
from pallas_kernels.mla_decode import api as mla_decode

PAGE = mla_decode.PAGE  # tokens; also the least of a prefill


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


class Session:
  """Requests on one set of steps, with one cache."""

  def __init__(
    self,
    made: steps.Steps,
    *,
    num_pages: int,
    max_rows: int,
    chunk: int = 1024,
    least_pages: int = 1,
    least_rows: int = 1,
  ):
    """Args:
    num_pages: of the cache. max_rows: requests that run at a time; others
      wait. chunk: most tokens of a prefill. least_pages: to which the block
      tables of rows are rounded up; least_rows: likewise, when decoding. On a
      mesh, all numbers are those of each rank.
    """
    self.steps = made
    # Drafts, and as many again by the module's own hidden states.
    ahead = 2 * made.num_drafts
    each = [
      scheduler.Scheduler(pages.Pool(num_pages, PAGE), max_rows, chunk, ahead)
      for _ in range(made.num_ranks)
    ]
    self.scheduler, self.pool = ranks.Ranks(each), each[0].pool
    self._least_pages, self._least_rows = least_pages, least_rows
    self._caches = made.empty_caches(num_pages, PAGE)
    self._requests: dict[scheduler.Job, Request] = {}
    self.decoded = Decoded()

  def submit(
    self,
    prompt: Sequence[int],
    max_new_tokens: int,
    draw: Draw = Draw(),
    stop_ids: Sequence[int] = (),
  ) -> Request:
    """Puts a request into the queue.

    Raises:
      InputError: as `check`.
    """
    self.check(prompt, max_new_tokens)
    job = self.scheduler.add(prompt, max_new_tokens)
    key = jax.random.fold_in(jax.random.key(draw.seed), draw.stream)
    key_2 = np.asarray(jax.random.key_data(key))
    request = Request(list(prompt), draw, frozenset(stop_ids), job, key_2)
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
    run = self.steps.prefill if found.is_new else self.steps.extend
    longest, told = max(found.counts, default=0), []
    made = self._run(found, run, PAGE * _round_up(-(-longest // PAGE)))
    for b, (job, count) in enumerate(_pairs(found)):
      is_end = job.missing == count
      self.scheduler.done(job, count)
      if is_end:
        told += self._add(job, made, b)
        self._end_if(told[-1])
    return told

  def decode(self) -> list[Told]:
    """The rest of a step."""
    found = self.scheduler.decode()
    if found is None:
      return []
    made = self._run(found, self.steps.decode)
    told = []
    for b, (job, count) in enumerate(_pairs(found)):
      new = self._add(job, made, b)
      self.decoded.rows += 1
      self.decoded.tokens += len(new)
      self.decoded.drafted += count - 1
      self.decoded.accepted += made.count_B[b] - 1
      self.scheduler.done(job, len(new))
      self._end_if(new[-1])
      told += new
    return told

  def _run(
    self, found: scheduler.Step, run, width: int = 0
  ) -> steps.Made | None:
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
    return steps.Made(*(x[places].tolist() for x in jax.device_get(made)))

  def _add(self, job: scheduler.Job, made: steps.Made, b: int) -> list[Told]:
    """New tokens of a job, none behind its last."""
    request, told = self._requests[job], []
    for token in made.tokens_Bt[b][: made.count_B[b]]:
      job.tokens.append(token)
      is_last = token in request.stop_ids or len(job.tokens) == job.most
      told.append(Told(request, token, is_last))
      if is_last:
        break
    job.drafts = made.drafts_Bk[b]
    return told

  def _end_if(self, told: Told) -> None:
    if told.is_last:
      self._end(told.request)

  def _arrays(self, found: scheduler.Step, width: int):
    """What the compiled step takes, rounded up to sizes that it knows.

    First comes where in it each job is.
    """
    ahead, least = self.steps.num_drafts, 1
    if not width:
      width, least = 1 + ahead, self._least_rows
    places, count = self._places(found.jobs, least)
    tokens_BT = np.zeros((count, width), np.int32)
    index_BT = np.full((count, width), -1, np.int32)
    last_B, after_B = np.zeros((2, count), np.int32)
    ends = [job.row.length + n for job, n in _pairs(found)]
    furthest = max(job.row.length for job in found.jobs) + max(width, 2 * ahead)
    most = max(self.pool.pages_for(furthest), self._least_pages)
    # What is no page of a row is no page: nothing can be written there.
    table_Bb = np.full((count, _round_up(most)), self.pool.count, np.int32)
    keys_B2 = np.zeros((count, 2), np.uint32)
    temperature_B, top_p_B = np.zeros((2, count), np.float32)
    top_k_B = np.zeros(count, np.int32)
    for b, job, end in zip(places, found.jobs, ends, strict=True):
      start, n = job.row.length, end - job.row.length
      tokens_BT[b, :n] = (job.tokens[start:end] + job.drafts)[:n]
      index_BT[b, :n] = range(start, end)
      last_B[b] = n - 1
      after_B[b] = job.tokens[end] if end < len(job.tokens) else -1
      used = job.row.pages[: table_Bb.shape[1]]
      table_Bb[b, : len(used)] = used
      request = self._requests[job]
      keys_B2[b], draw = request.key_2, request.draw
      temperature_B[b], top_p_B[b] = draw.temperature, draw.top_p
      top_k_B[b] = draw.top_k
    rows = steps.Rows(tokens_BT, index_BT, last_B, after_B, table_Bb)
    draws = sampling.Draws(keys_B2, temperature_B, top_k_B, top_p_B)
    return places, rows, draws

  def _places(
    self, jobs: list[scheduler.Job], least: int
  ) -> tuple[list[int], int]:
    """A row for each job, among as many for every rank, and how many in all."""
    ranks_of = [job.rank for job in jobs]
    each = _round_up(max(least, *map(ranks_of.count, ranks_of)))
    numbers = [itertools.count(r * each) for r in range(self.steps.num_ranks)]
    places = [next(numbers[rank]) for rank in ranks_of]
    return places, each * self.steps.num_ranks

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


def _round_up(count: int) -> int:
  """The next power of two."""
  return 1 << max(count - 1, 0).bit_length()
