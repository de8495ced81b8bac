"""The engine: requests that share steps, which join and leave at any time.

An `Engine` has a latent cache of its own. Each of its steps computes at most
one chunk of prompts on each rank, then the last token of every request whose
prompt is in the cache, together with speculative tokens. Rows, tokens and
blocks of a step are rounded up to a few sizes, each of which is compiled once.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax import errors
from dsv3_jax.inference import (
  block_pool,
  engine_stats,
  forward,
  model_runner,
  row_sampling,
  sampling,
  scheduler,
  token_outputs,
)
from dsv3_jax.inference import request as requests
from pallas_kernels.mla_decode import api as mla_decode

BLOCK_SIZE = mla_decode.PAGE  # a kernel's page; also the smallest prefill
# Rows of a batch invariant decode step where no option sets them.
BATCH_INVARIANT_ROWS = 16


class StepShape(NamedTuple):
  """What decides which step is compiled.

  rows, tokens: of the step, both padded. blocks: of each block table.
  kind: 'prefill', 'extend', 'score' or 'decode', as in
    `model_runner.ModelRunner`.
  """

  rows: int
  tokens: int
  blocks: int
  kind: str


class Engine:
  """Runs the steps of a `ModelRunner` for many requests, with one cache."""

  def __init__(
    self,
    runner: model_runner.ModelRunner,
    *,
    num_blocks: int,
    max_rows: int,
    chunk: int = 1024,
    min_blocks: int = 1,
    min_rows: int = 1,
    batch_invariant: bool = False,
  ):
    """On a mesh, all numbers are those of each rank.

    Args:
      num_blocks: of the cache.
      max_rows: requests that run at a time; others wait.
      chunk: most tokens of a prefill.
      min_blocks: smallest size of block tables.
      min_rows: smallest number of rows of decode steps.
      batch_invariant: the tokens of a request, and all bits that they are
        sampled from, do not depend on the other requests. Every step then has
        its largest shape, and a prefill one row: slow.
    """
    self._runner, self.batch_invariant = runner, batch_invariant
    pools = [
      block_pool.BlockPool(num_blocks, BLOCK_SIZE)
      for _ in range(runner.num_ranks)
    ]
    # Room for the speculative tokens of a step, and for as many again, which
    # the MTP module computes from its own hidden states.
    lookahead = 2 * runner.num_speculative_tokens
    self._scheduler = scheduler.Scheduler(
      pools, max_rows, chunk, lookahead, batch_invariant=batch_invariant
    )
    if batch_invariant:  # all steps have one shape
      min_blocks, min_rows = 1, max_rows
    self.min_blocks, self._min_rows = min_blocks, min_rows
    self._caches = runner.empty_caches(num_blocks, BLOCK_SIZE)
    self._counts = collections.Counter()

  @property
  def max_rows(self) -> int:
    """Requests that run at a time on each rank."""
    return self._scheduler.max_rows

  @property
  def max_running(self) -> int:
    """Requests that run at a time on all ranks."""
    return self._scheduler.max_rows * self.num_ranks

  @property
  def num_ranks(self) -> int:
    """See `model_runner.ModelRunner`."""
    return self._runner.num_ranks

  @property
  def max_seq_len(self) -> int:
    return self._runner.cfg.model.max_seq_len

  @property
  def vocab_size(self) -> int:
    return self._runner.cfg.model.vocab_size

  @property
  def decode_width(self) -> int:
    """Tokens of a row that a decode step computes."""
    return 1 + self._runner.num_speculative_tokens

  @property
  def chunk(self) -> int:
    """Most tokens of a prefill on each rank."""
    return self._scheduler.chunk

  @property
  def is_idle(self) -> bool:
    return self._scheduler.is_idle

  def stats(self) -> engine_stats.EngineStats:
    """A snapshot of this moment; from any thread."""
    rebalancer, rebalances, balancedness = self._runner.rebalancer, None, None
    if rebalancer is not None:
      rebalances = rebalancer.rebalances
      if rebalancer.balancedness is not None:
        balancedness = rebalancer.balancedness[0]
    names = ('decode_steps', 'decoded_rows', 'decoded_tokens')
    names += ('speculative_tokens', 'accepted_tokens')
    return engine_stats.EngineStats(
      running=len(self._scheduler.running),
      waiting=len(self._scheduler.waiting),
      preempted=self._scheduler.preempted,
      num_blocks=self._scheduler.num_blocks,
      blocks_in_use=self._scheduler.blocks_in_use,
      rebalances=rebalances,
      balancedness=balancedness,
      **{name: self._counts[name] for name in names},
    )

  def submit(
    self,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling_params: requests.SamplingParams = requests.GREEDY,
    stop_ids: Sequence[int] = (),
    shares_prompt_with: requests.Request | None = None,
  ) -> requests.Request:
    """Makes a request and adds it to the queue.

    Args:
      shares_prompt_with: an earlier request with the same prompt, which is then
        computed once.

    Raises:
      InputError: as `check`.
    """
    stops = frozenset(stop_ids)
    request = requests.Request(
      list(prompt), max_new_tokens, sampling_params, stops, shares_prompt_with
    )
    self.add(request)
    return request

  def add(self, request: requests.Request) -> None:
    """Adds a new request to the queue; raises as `check`."""
    self.check(request.prompt, request.max_new_tokens)
    request.key_2 = _key(request.sampling)
    self._scheduler.add(request)

  def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Checks that such a request can be added; from any thread.

    Raises:
      InputError: `max_new_tokens` is below 1, `check_prompt` fails, or the
        request needs more blocks than there are.
    """
    if max_new_tokens < 1:
      raise errors.InputError(f'max_new_tokens={max_new_tokens} must be >= 1')
    requests.check_prompt(self._runner.cfg.model, prompt, max_new_tokens)
    self._scheduler.check(len(prompt), max_new_tokens)

  def max_new_tokens(self, prompt_length: int) -> int:
    """How many tokens can follow a prompt of this length; 0 or less: none."""
    return min(self.max_seq_len, self._scheduler.room) - prompt_length

  def cancel(self, request: requests.Request) -> None:
    """Ends a request early; does nothing if it is done."""
    self._scheduler.finish(request)

  def warm_up(self, shape: StepShape) -> None:
    """Compiles a step, by a run on rows that have no tokens."""
    step_input, arrays = self._empty(shape.rows, shape.tokens, shape.blocks)
    _key(requests.GREEDY)
    copies = [block_pool.BlockCopy(0, 0)]
    caches = self._runner.copy_blocks(copies, self._caches)
    runs = {
      'prefill': self._runner.prefill,
      'extend': self._runner.extend,
      'score': self._runner.score,
      'decode': self._runner.decode,
    }
    output, self._caches = runs[shape.kind](step_input, caches, arrays)
    jax.block_until_ready(output)

  def step(self) -> list[requests.TokenOutput]:
    """One chunk of prompts, then one decode step.

    The decode step gives each of its requests one token, and one more for each
    speculative token that was right.
    """
    return self.prefill() + self.decode()

  def prefill(self) -> list[requests.TokenOutput]:
    """The first half of `step`."""
    return [
      output
      for schedule in self._scheduler.prefill()
      for output in self._prefill(schedule)
    ]

  def _prefill(
    self, schedule: scheduler.ScheduledStep
  ) -> list[requests.TokenOutput]:
    is_uncached, longest = schedule.is_uncached, max(schedule.counts)
    if self.batch_invariant:
      is_uncached, longest = False, self.chunk
      if schedule.is_scored:
        longest = min(longest, scheduler.SCORED_CHUNK)
    run = self._runner.prefill if is_uncached else self._runner.extend
    if schedule.is_scored:
      run = self._runner.score
    width = BLOCK_SIZE * round_up(-(-longest // BLOCK_SIZE))
    step_output, outputs = self._run(schedule, run, width), []
    for b, (request, count) in enumerate(_pairs(schedule)):
      is_end = request.num_uncomputed == count
      if request.sampling.prompt_logprobs:
        token_outputs.append_prompt_logprobs(request, step_output, b, count)
      self._scheduler.commit(request, count)
      if is_end:
        num_new = token_outputs.append(request, step_output, b)
        outputs += self._outputs(request, num_new)
    return outputs

  def decode(self) -> list[requests.TokenOutput]:
    """The second half of `step`."""
    schedule = self._scheduler.decode()
    if schedule is None:
      return []
    step_output = self._run(schedule, self._runner.decode)
    self._counts['decode_steps'] += 1
    outputs = []
    for b, (request, count) in enumerate(_pairs(schedule)):
      num_new = token_outputs.append(request, step_output, b)
      self._counts['decoded_rows'] += 1
      self._counts['decoded_tokens'] += num_new
      self._counts['speculative_tokens'] += count - 1
      self._counts['accepted_tokens'] += step_output.count_B[b] - 1
      self._scheduler.commit(request, num_new)
      outputs += self._outputs(request, num_new)
    return outputs

  def _run(
    self, schedule: scheduler.ScheduledStep, run: Callable, width: int = 0
  ) -> forward.StepOutput | None:
    """Runs a step; returns lists, one entry for each request.

    Args:
      width: tokens of a row; 0: those of a decode step.
    """
    self._caches = self._runner.copy_blocks(schedule.copies, self._caches)
    rows, step_input, arrays = self._step_input(schedule, width)
    output, self._caches = run(step_input, self._caches, arrays)
    pairs = _pairs(schedule)
    if not schedule.is_scored and all(r.num_uncomputed > n for r, n in pairs):
      return None  # no request gets a token: do not wait for the device
    *tokens, logprobs, scores = jax.device_get(output)
    lists = (x[rows].tolist() for x in tokens)
    if any(arrays.logprobs_B):
      pick = lambda x: x[rows]
      logprobs, scores = jax.tree.map(pick, (logprobs, scores))
    return forward.StepOutput(*lists, logprobs, scores)

  def _outputs(
    self, request: requests.Request, num_new: int
  ) -> list[requests.TokenOutput]:
    """An output for each new token not reported yet; finishes the request."""
    outputs = token_outputs.report(request, num_new)
    if request.finish_reason is not None:
      self._scheduler.finish(request)
    return outputs

  def _step_input(self, schedule: scheduler.ScheduledStep, width: int):
    """Arrays of a compiled step, padded, and the row of each request."""
    chosen = schedule.requests
    longest = max(request.block_table.length for request in chosen)
    if self.batch_invariant:
      longest = self.max_seq_len
    min_rows = 1 if width else self._min_rows
    width = width or self.decode_width
    rows, num_rows = self._rows([r.rank for r in chosen], min_rows)
    shape = (num_rows, width, self.num_table_blocks(longest, width))
    step_input, arrays = self._empty(*shape)
    for b, (request, count) in zip(rows, _pairs(schedule), strict=True):
      table, tokens = request.block_table, request.all_tokens
      start, end = table.length, table.length + count
      new = tokens[start:end] + request.speculative_tokens
      step_input.tokens_BT[b, :count] = new[:count]
      step_input.index_BT[b, :count] = range(start, end)
      step_input.last_B[b] = count - 1
      if end < len(tokens):
        step_input.after_B[b] = tokens[end]
      blocks = table.blocks[: step_input.table_Bb.shape[1]]
      step_input.table_Bb[b, : len(blocks)] = blocks
      row_sampling.fill(arrays, b, request)
    return rows, step_input, arrays

  def _rows(self, ranks: list[int], min_rows: int) -> tuple[list[int], int]:
    """A row for each request, given their ranks, and the number of all rows.

    Each rank has equally many rows, one rank after the other.
    """
    per_rank = round_up(max(min_rows, *map(ranks.count, ranks)))
    free = [itertools.count(rank * per_rank) for rank in range(self.num_ranks)]
    return [next(free[rank]) for rank in ranks], per_rank * self.num_ranks

  def num_table_blocks(self, longest: int, width: int) -> int:
    """Blocks of a step's block tables; padding and speculation included.

    Args:
      longest: most tokens that the cache holds of a row.
      width: tokens of a row that the step computes.
    """
    end = longest + max(width, 2 * self._runner.num_speculative_tokens)
    return round_up(max(-(-end // BLOCK_SIZE), self.min_blocks))

  def _empty(
    self, num_rows: int, width: int, num_blocks: int
  ) -> tuple[forward.StepInput, sampling.SamplingArrays]:
    """Arrays of a compiled step, without tokens."""
    full = lambda value, *shape: np.full(shape, value, np.int32)
    no_block = self._scheduler.num_blocks_per_rank
    step_input = forward.StepInput(
      tokens_BT=full(0, num_rows, width),
      index_BT=full(-1, num_rows, width),
      last_B=full(0, num_rows),
      after_B=full(-1, num_rows),
      # Entries behind a row's blocks are out of range: writes are dropped.
      table_Bb=full(no_block, num_rows, num_blocks),
    )
    return step_input, row_sampling.empty(num_rows, self.vocab_size)


def _pairs(schedule: scheduler.ScheduledStep) -> list[tuple]:
  """Each request and how many of its tokens are computed."""
  return list(zip(schedule.requests, schedule.counts, strict=True))


def _key(params: requests.SamplingParams) -> np.ndarray:
  """Data of a request's PRNG key."""
  low, high = params.seed % 2**32, params.seed // 2**32 % 2**32
  key = jax.random.key(low)
  if high:
    key = jax.random.fold_in(key, high)
  key = jax.random.fold_in(key, params.rng_stream)
  return np.asarray(jax.random.key_data(key))


def round_up(count: int) -> int:
  """The next power of two."""
  return 1 << max(count - 1, 0).bit_length()
