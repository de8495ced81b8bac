"""Text generation from a list of prompts (TR 2.1.1).

Prefill fills the latent cache; the first 1,024 tokens of a prompt are computed
in the naive form. Each decode step attends to the cache in the absorbed form.
Prompts may have different lengths. Up to `MAX_ROWS` of them run at a time on
each rank of a mesh; others join as these end.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from dsv3_jax import config, errors
from dsv3_jax.inference import engine, engine_stats, model_runner
from dsv3_jax.inference import request as requests

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of each prompt, and how fast they came.

  prefill_seconds: until the first prompts, as many as run at a time, have their
  first tokens.
  decode_seconds: after the first decode step, which may have to compile. The
  prefills of prompts that join later are part of it, and so is the time that
  `on_finished` takes.
  decoded: tokens that came in this time.
  stats: of all steps, the first decode step too.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  decode_seconds: float
  decoded: int
  stats: engine_stats.EngineStats

  @property
  def tokens_per_second(self) -> float:
    """Decoded tokens of all rows; 0 if there is none to time."""
    return self.decoded / self.decode_seconds if self.decoded else 0.0


def generate(
  runner: model_runner.ModelRunner,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  seed: int = 0,
  stop_id: int | Sequence[int] = -1,
  batch_invariant: bool = False,
  on_finished: Callable[[int, list[int]], None] = lambda number, tokens: None,
) -> Generation:
  """Continues each prompt until `stop_id` or `max_new_tokens`.

  Args:
    stop_id: the token that ends a continuation, or several that do.
    batch_invariant: the bits of a prompt's continuation do not depend on the
      other prompts; slow (see `engine.Engine`).
    on_finished: called with the number and the new tokens of each prompt, in
      order, as soon as it and all before it have ended.

  Raises:
    InputError: an empty prompt, a token outside the vocabulary, or a prompt
      that leaves no room for `max_new_tokens`.
  """
  if max_new_tokens < 1:
    raise errors.InputError(f'max_new_tokens={max_new_tokens} must be >= 1')
  check_prompts(runner.cfg.model, prompts, max_new_tokens)
  start = time.perf_counter()
  lengths = [len(prompt) + max_new_tokens for prompt in prompts]
  model_engine = _make_engine(runner, lengths, batch_invariant)
  params = requests.SamplingParams(
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
    seed=seed,
  )
  stop_ids = [stop_id] if isinstance(stop_id, int) else stop_id
  submitted = []
  for i, prompt in enumerate(prompts):
    row_params = dataclasses.replace(params, rng_stream=i)
    submitted.append(
      model_engine.submit(prompt, max_new_tokens, row_params, stop_ids)
    )
  return _run(model_engine, submitted, start, on_finished)


def _run(
  model_engine: engine.Engine,
  submitted: Sequence[requests.Request],
  start: float,
  on_finished: Callable[[int, list[int]], None],
) -> Generation:
  """Steps until all requests have ended; `start` is when the first began."""
  decoded, reported = 0, 0
  first = submitted[: model_engine.max_running]
  while not all(request.tokens for request in first):
    model_engine.prefill() or model_engine.decode()
    reported = _report(submitted, reported, on_finished)
  prefilled = decode_start = time.perf_counter()
  if not model_engine.is_idle:
    model_engine.step()
    reported = _report(submitted, reported, on_finished)
    decode_start = time.perf_counter()
  while not model_engine.is_idle:
    decoded += len(model_engine.step())
    reported = _report(submitted, reported, on_finished)
  return Generation(
    tokens=[request.tokens for request in submitted],
    prefill_seconds=prefilled - start,
    decode_seconds=time.perf_counter() - decode_start,
    decoded=decoded,
    stats=model_engine.stats(),
  )


def _make_engine(
  runner: model_runner.ModelRunner,
  lengths: Sequence[int],
  batch_invariant: bool,
) -> engine.Engine:
  """With room for rows of these lengths, whichever of them share a rank."""
  blocks = sorted(-(-length // engine.BLOCK_SIZE) for length in lengths)
  rows = min(-(-len(lengths) // runner.num_ranks), MAX_ROWS)
  return engine.Engine(
    runner,
    # Rounded up, as each size is compiled once.
    num_blocks=engine.round_up(sum(blocks[-rows:])),
    max_rows=engine.BATCH_INVARIANT_ROWS if batch_invariant else rows,
    min_blocks=blocks[-1],
    min_rows=rows,
    batch_invariant=batch_invariant,
  )


def _report(
  submitted: Sequence[requests.Request],
  reported: int,
  on_finished: Callable[[int, list[int]], None],
) -> int:
  """Calls `on_finished` for requests that ended, in order; returns how many."""
  while reported < len(submitted) and submitted[reported].done:
    on_finished(reported, submitted[reported].tokens)
    reported += 1
  return reported


def check_prompts(
  cfg: config.ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
) -> None:
  """Checks that `generate` can continue these prompts.

  Raises:
    InputError: see there.
  """
  if not prompts:
    raise errors.InputError('prompts=[] must hold at least one prompt')
  for i, prompt in enumerate(prompts):
    requests.check_prompt(cfg, prompt, max_new_tokens, f'prompt {i}')
