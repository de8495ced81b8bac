"""Text generation from a list of prompts (TR 2.1.1).

Prefill fills the latent cache, prompts of up to 1,024 tokens whole and in the
naive form; each decode step attends to it in the absorbed form. Rows may have
prompts of different lengths. Up to `MOST_ROWS` prompts run at a time, on each
rank of a mesh; others join as these end.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax import config, errors
from dsv3_jax.inference import engine, model_runner
from dsv3_jax.nn import model

MOST_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of each prompt, and how fast they came.

  Prefill gives each row its first token and the first decode step its second;
  decoding is timed from there, as that step may have to compile. So may
  prefill, at a new shape; of prompts that join later it counts as decoding.
  `decoded` counts tokens of rows not yet at their end. Who is told of rows is
  timed too.
  counts: of all decode steps, that first one too.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  decode_seconds: float
  decoded: int
  counts: engine.Decoded

  @property
  def tokens_per_second(self) -> float:
    """Decoded tokens of all rows; 0 if there is none to time."""
    return self.decoded / self.decode_seconds if self.decoded else 0.0


class Generator:
  """Generates from parameters and router biases, on one device or a mesh."""

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router: model.Router,
    *args: Any,
    **how: Any,
  ):
    """As `steps.Steps`."""
    self.cfg = cfg
    self.steps = model_runner.ModelRunner(cfg, params, router, *args, **how)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int = -1,
    invariant: bool = False,
    tell: Callable[[int, list[int]], None] = lambda number, tokens: None,
  ) -> Generation:
    """Continues each prompt until `stop_id` or `max_new_tokens`.

    Args:
      invariant: the bits of a prompt's continuation do not depend on the other
        prompts; slow (see `batching.Session`).
      tell: hears of each prompt's continuation as soon as it and all before it
        are at their ends.

    Raises:
      InputError: an empty prompt, a token outside the vocabulary, or a prompt
        that leaves no room for `max_new_tokens`.
    """
    if max_new_tokens < 1:
      raise errors.InputError(f'max_new_tokens={max_new_tokens} must be >= 1')
    check_prompts(self.cfg.model, prompts, max_new_tokens)
    start = time.perf_counter()
    lengths = [len(p) + max_new_tokens for p in prompts]
    session = self._session(lengths, invariant)
    how = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
    draw = functools.partial(engine.Draw, seed=seed, **how)
    requests = [
      session.submit(prompt, max_new_tokens, draw(stream=b), [stop_id])
      for b, prompt in enumerate(prompts)
    ]
    decoded, told = 0, 0
    first = requests[: session.scheduler.max_rows]
    while not all(request.tokens for request in first):
      session.prefill() or session.decode()
      told = _tell_ended(requests, told, tell)
    prefilled = begun = time.perf_counter()
    if not session.is_idle:
      session.step()
      told = _tell_ended(requests, told, tell)
      begun = time.perf_counter()
    while not session.is_idle:
      decoded += len(session.step())
      told = _tell_ended(requests, told, tell)
    return Generation(
      tokens=[request.tokens for request in requests],
      prefill_seconds=prefilled - start,
      decode_seconds=time.perf_counter() - begun,
      decoded=decoded,
      counts=session.decoded,
    )

  def _session(self, lengths: Sequence[int], invariant: bool) -> engine.Engine:
    """With room for rows of these lengths, whichever go to a rank together."""
    each = sorted(-(-length // engine.PAGE) for length in lengths)
    rows = -(-len(lengths) // self.steps.num_ranks)  # of each rank
    rows = min(rows, MOST_ROWS)
    return engine.Engine(
      self.steps,
      # Rounded, as each size is compiled anew.
      num_pages=engine.round_up(sum(each[-rows:])),
      max_rows=engine.INVARIANT_ROWS if invariant else rows,
      least_pages=each[-1],
      least_rows=rows,
      invariant=invariant,
    )


def _tell_ended(
  requests: Sequence[engine.Request],
  told: int,
  tell: Callable[[int, list[int]], None],
) -> int:
  """Tells of those at their ends, in order; how many were told of in all."""
  while told < len(requests) and requests[told].done:
    tell(told, requests[told].tokens)
    told += 1
  return told


def check_prompts(
  cfg: config.ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
) -> None:
  """What `Engine.generate` can take.

  Raises:
    InputError: see there.
  """
  if not prompts:
    raise errors.InputError('prompts=[] must hold at least one prompt')
  for i, prompt in enumerate(prompts):
    engine.check_prompt(cfg, prompt, max_new_tokens, f'prompt {i}')
