"""What do speculative tokens gain on a trained model?

Question: of the tokens that the MTP module drafts on held-out text, how many
does the model then say, and how many more tokens a second is that?

  dsv3 bench speculation --checkpoint=runs/quickstart [--rounds=3] [--json]

Prompts are pieces of held-out documents, continued alone and several at a time,
greedily and at temperature 1, with 0 to `--most` speculative tokens a step. The
variants take turns; a figure is the best of the rounds. `equal` compares their
tokens: it is below 1 only where a sum of another size rounds to another token.
`longer` is how much longer a step takes. `full` is tokens a step over `longer`:
the gain while all rows run, of which the last rows, running alone, lose a part.
`read` is a lower bound of `longer` where memory bounds it: the weights that a
step reads, as a multiple of those without speculative tokens.
"""

import pathlib
import sys
from typing import NamedTuple

import numpy as np

import dsv3_jax
from benchmarks.common import report
from dsv3_jax import config
from dsv3_jax.data import corpus as corpora
from dsv3_jax.inference import generate, llm, model_runner
from dsv3_jax.planning import flops

TEMPERATURES = (0.0, 1.0)
BATCHES = (1, 4, 16)


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('speculation', __doc__)
  parser.add_argument('--checkpoint', type=pathlib.Path, required=True)
  parser.add_argument('--prompts', type=int, default=16)
  parser.add_argument('--prompt_tokens', type=int, default=64)
  parser.add_argument('--new_tokens', type=int, default=128)
  parser.add_argument('--most', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args(argv)
  for name in ('prompts', 'prompt_tokens', 'most', 'rounds'):
    if getattr(args, name) < 1:
      parser.error(f'--{name}={getattr(args, name)} must be at least 1')
  if args.new_tokens < 3 + args.most:  # the first step is not timed
    parser.error(
      f'--new_tokens={args.new_tokens} must be at least 3 + --most='
      f'{3 + args.most}'
    )
  model = dsv3_jax.load(args.checkpoint)
  rows = report.Rows(args)
  for row in measure(model, args):
    rows.append(row)
  about = (
    f'{args.prompts} prompts of {args.prompt_tokens} held-out tokens, `batch` '
    f'at a time, {args.new_tokens} new tokens each, f32; best of {args.rounds} '
    'rounds.'
  )
  report.publish('speculation', about, rows, args)
  return 0


def measure(model: llm.LLM, args):
  """A row for each temperature, batch and number of speculative tokens."""
  prompts = held_out(model, args.prompts, args.prompt_tokens)
  weights = (model.config, model.params, model.router_biases)
  runners = [
    model_runner.ModelRunner(*weights, k) for k in range(args.most + 1)
  ]
  for temperature in TEMPERATURES:
    for batch in sorted({min(batch, args.prompts) for batch in BATCHES}):
      groups = [
        prompts[at : at + batch] for at in range(0, args.prompts, batch)
      ]
      cases = (runners, groups, args.new_tokens, temperature, args.rounds)
      best, tokens = run(*cases)
      floor = weights_read(model.config.model, batch, 0)
      for k, total in best.items():
        longer = total.ms_per_step / best[0].ms_per_step
        yield {
          'temperature': temperature,
          'batch': batch,
          'speculative_tokens': k,
          'accepted': total.accepted if k else None,
          'tokens_per_step': total.tokens_per_step,
          'ms_per_step': total.ms_per_step,
          'longer': longer,
          'read': weights_read(model.config.model, batch, k) / floor,
          'full': total.tokens_per_step / longer,
          'tokens_per_s': total.speed,
          'speed_ratio': total.speed / best[0].speed,
          'equal': float(np.mean(np.equal(tokens[k], tokens[0]))),
        }


def run(runners, groups, new_tokens: int, temperature: float, rounds: int):
  """Of each runner the best `Total`, and the tokens of all prompts."""
  best, tokens = {}, {}
  for turn in range(rounds + 1):  # the first compiles
    for k, runner in enumerate(runners):
      outputs = [
        generate.generate(
          runner, group, new_tokens, temperature=temperature, seed=b
        )
        for b, group in enumerate(groups)
      ]
      tokens[k] = np.array([row for one in outputs for row in one.tokens])
      total = _total(outputs)
      if turn and (k not in best or total.seconds < best[k].seconds):
        best[k] = total
  return best, tokens


def weights_read(
  cfg: config.ModelConfig, batch: int, num_speculative: int
) -> float:
  """Parameters that a step must read, if tokens choose experts evenly."""
  moe = cfg.moe

  def read(parts, tokens: int) -> float:
    used = 1.0 - (1.0 - moe.top_k / moe.num_experts) ** tokens
    return sum(
      part.size * (used if part.name.endswith('.experts') else 1.0)
      for part in parts
      if part.name != 'embedding'
    )

  total = read(flops.main_parts(cfg), batch * (1 + num_speculative))
  for draft in range(num_speculative):
    # The first pass of the module takes all tokens, a later one one a row.
    tokens = batch * (1 if draft else 1 + num_speculative)
    total += read(flops.mtp_parts(cfg), tokens) / cfg.mtp.depth
    total += cfg.vocab_size * cfg.d_model  # the head, once more
  return total


class Total(NamedTuple):
  """Seconds, steps and decoded tokens of the timed steps; the rest of all.

  accepted: share of speculative tokens.
  """

  seconds: float
  steps: int
  decoded: int
  tokens: int
  rows: int
  accepted: float

  @property
  def tokens_per_step(self) -> float:
    return self.tokens / self.rows

  @property
  def ms_per_step(self) -> float:
    return 1e3 * self.seconds / self.steps

  @property
  def speed(self) -> float:
    return self.decoded / self.seconds


def _total(outputs: list[generate.Generation]) -> Total:
  stats: list[engine_stats.EngineStats] = [one.stats for one in outputs]
  accepted = sum(s.accepted_tokens for s in stats)
  return Total(
    seconds=sum(one.decode_seconds for one in outputs),
    steps=sum(s.decode_steps - 1 for s in stats),  # the first is not timed
    decoded=sum(one.decoded for one in outputs),
    tokens=sum(s.decoded_tokens for s in stats),
    rows=sum(s.decoded_rows for s in stats),
    accepted=accepted / max(sum(s.speculative_tokens for s in stats), 1),
  )


def held_out(model: llm.LLM, count: int, size: int) -> list[list[int]]:
  """`size` tokens from the middle of each of `count` held-out documents."""
  corpus = corpora.open_corpus(model.config.data)
  prompts = []
  for record in corpus.valid:
    text = corpora.document_text(record)
    middle = text[len(text) // 2 :]
    ids = model.tokenizer.encode(middle[: 16 * size]).tolist()
    if len(ids) >= size:
      prompts.append(ids[:size])
    if len(prompts) == count:
      return prompts
  raise SystemExit(
    f'dsv3: --prompts={count}: only {len(prompts)} held-out documents have '
    f'{size} tokens in their second half'
  )


if __name__ == '__main__':
  sys.exit(main())
