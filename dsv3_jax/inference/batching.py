"""Requests that share steps: they join and leave while others go on.

A `Session` has a cache of its own. Each of its steps computes at most one chunk
of prompts and then one token of every row that has its prompt behind it. Rows,
tokens and pages of a step are rounded up to a few sizes, each compiled once.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.inference import pages, sampling, scheduler, steps

PAGE = 64  # tokens of a page, and the least of a prefill


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
  """What a step is compiled for. fresh: nothing of its rows is in the cache."""

  rows: int
  tokens: int
  pages: int
  fresh: bool


class Told(NamedTuple):
  """A new token of a request, its last or not."""

  request: Request
  token: int
  is_last: bool


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
      tables of rows are rounded up; least_rows: likewise, when decoding.
    """
    self.steps, self.pool = made, pages.Pool(num_pages, PAGE)
    self.scheduler = scheduler.Scheduler(self.pool, max_rows, chunk)
    self.least_pages, self._least_rows = least_pages, least_rows
    self._caches = made.empty_caches(num_pages, PAGE)
    self._requests: dict[scheduler.Job, Request] = {}

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
    run = self.steps.prefill if size.fresh else self.steps.extend
    rows, draws = _empty(*size[:3])
    _key(Draw())
    # Twice: new caches are not yet bound to a device, those of a step are, and
    # for jit that makes another program.
    for _ in range(2):
      caches = self.steps.copy([pages.Copy(0, 0)], self._caches)
      next_B, self._caches = run(rows, caches, draws)
    jax.block_until_ready(next_B)

  @property
  def is_idle(self) -> bool:
    return self.scheduler.is_idle

  def step(self) -> list[Told]:
    """One chunk of prompts, and one token of every row behind its prompt."""
    return self.prefill() + self.decode()

  def prefill(self) -> list[Told]:
    """The prefill of a step alone."""
    found = self.scheduler.prefill()
    if found is None:
      return []
    fresh = all(job.row.length == 0 for job in found.jobs)
    run = self.steps.prefill if fresh else self.steps.extend
    longest = max(found.counts, default=0)
    return self._run(found, run, PAGE * _round_up(-(-longest // PAGE)))

  def decode(self) -> list[Told]:
    """The rest of a step."""
    found = self.scheduler.decode()
    return [] if found is None else self._run(found, self.steps.extend, 1)

  def _run(self, found: scheduler.Step, run, width: int) -> list[Told]:
    self._caches = self.steps.copy(found.copies, self._caches)
    if not found.jobs:
      return []
    rows, draws = self._arrays(found, width)
    next_B, self._caches = run(rows, self._caches, draws)
    pairs = list(zip(found.jobs, found.counts, strict=True))
    ends = [job.missing == count for job, count in pairs]
    new = np.asarray(next_B).tolist() if any(ends) else []
    told = []
    for b, (job, count) in enumerate(pairs):
      self.scheduler.done(job, count)
      if ends[b]:
        told.append(self._add(self._requests[job], new[b]))
    return told

  def _add(self, request: Request, token: int) -> Told:
    job = request.job
    job.tokens.append(token)
    is_last = token in request.stop_ids or len(job.tokens) == job.most
    if is_last:
      self._end(request)
    return Told(request, token, is_last)

  def _arrays(self, found: scheduler.Step, width: int):
    """What the compiled step takes, rounded up to sizes that it knows."""
    least_rows = self._least_rows if width == 1 else 1
    count = _round_up(max(len(found.jobs), least_rows))
    ends = [
      job.row.length + n
      for job, n in zip(found.jobs, found.counts, strict=True)
    ]
    most = max(self.pool.pages_for(max(ends)), self.least_pages)
    rows, draws = _empty(count, width, _round_up(most))
    for b, (job, end) in enumerate(zip(found.jobs, ends, strict=True)):
      start, n = job.row.length, end - job.row.length
      rows.tokens_BT[b, :n] = job.tokens[start:end]
      rows.index_BT[b, :n] = range(start, end)
      rows.last_B[b] = n - 1
      used = job.row.pages[: rows.table_Bb.shape[1]]
      rows.table_Bb[b, : len(used)] = used
      request = self._requests[job]
      draws.keys_B2[b], draw = request.key_2, request.draw
      draws.temperature_B[b], draws.top_p_B[b] = draw.temperature, draw.top_p
      draws.top_k_B[b] = draw.top_k
    return rows, draws

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


def _key(draw: Draw) -> np.ndarray:
  """Data of a request's PRNG key."""
  key = jax.random.fold_in(jax.random.key(draw.seed), draw.stream)
  return np.asarray(jax.random.key_data(key))


def _empty(
  count: int, width: int, num_pages: int
) -> tuple[steps.Rows, sampling.Draws]:
  """What a compiled step takes, with no tokens."""
  zeros = lambda *shape: np.zeros(shape, np.int32)
  no_tokens = np.full((count, width), -1, np.int32)
  rows = steps.Rows(
    zeros(count, width), no_tokens, zeros(count), zeros(count, num_pages)
  )
  temperature_B, top_p_B = np.zeros((2, count), np.float32)
  keys_B2 = np.zeros((count, 2), np.uint32)
  return rows, sampling.Draws(keys_B2, temperature_B, zeros(count), top_p_B)


def _round_up(count: int) -> int:
  """The next power of two."""
  return 1 << max(count - 1, 0).bit_length()
