"""What do MTP drafts gain on a trained model?

Question: of the tokens that the MTP module drafts on held-out text, how many
does the model then say, and how many more tokens a second is that?

  dsv3 bench speculation --checkpoint=runs/quickstart [--rounds=3] [--json]

Prompts are pieces of held-out documents, continued alone and several at a time,
greedily and at temperature 1, with 0 to `--most` drafts a step. The ways take
turns, a figure is the best of the rounds. Tokens of all ways are compared:
`equal` is 1 but where a sum of another size rounds to another token. What is
gained is tokens a step over how much `longer` a step takes; `full` is that
gain while all rows run, of which the last ones, running alone, take a part.
`read` is a floor of `longer` where memory bounds it: weights that a step needs,
as a multiple of those that it needs without drafts.
"""

import pathlib
import sys
from typing import NamedTuple

import numpy as np

import dsv3_jax
from benchmarks.common import report
from dsv3_jax import config
from dsv3_jax.data import corpus as corpora
from dsv3_jax.inference import generate, llm
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
  """A row for each temperature, rows at a time and number of drafts."""
  prompts = held_out(model, args.prompts, args.prompt_tokens)
  weights = (model.config, model.params, model.router)
  engines = [generate.Generator(*weights, k) for k in range(args.most + 1)]
  for temperature in TEMPERATURES:
    for batch in sorted({min(batch, args.prompts) for batch in BATCHES}):
      groups = [
        prompts[at : at + batch] for at in range(0, args.prompts, batch)
      ]
      cases = (engines, groups, args.new_tokens, temperature, args.rounds)
      best, tokens = run(*cases)
      floor = weights_read(model.config.model, batch, 0)
      for k, found in best.items():
        longer = found.ms_per_step / best[0].ms_per_step
        yield {
          'temperature': temperature,
          'batch': batch,
          'drafts': k,
          'accepted': found.accepted if k else None,
          'tokens_per_step': found.tokens_per_step,
          'ms_per_step': found.ms_per_step,
          'longer': longer,
          'read': weights_read(model.config.model, batch, k) / floor,
          'full': found.tokens_per_step / longer,
          'tokens_per_s': found.speed,
          'speed_ratio': found.speed / best[0].speed,
          'equal': float(np.mean(np.equal(tokens[k], tokens[0]))),
        }


def run(engines, groups, new_tokens: int, temperature: float, rounds: int):
  """Of each engine the best `Total`, and the tokens of all prompts."""
  best, tokens = {}, {}
  for turn in range(rounds + 1):  # the first compiles
    for k, net in enumerate(engines):
      made = [
        net.generate(group, new_tokens, temperature=temperature, seed=b)
        for b, group in enumerate(groups)
      ]
      tokens[k] = np.array([row for one in made for row in one.tokens])
      found = _total(made)
      if turn and (k not in best or found.seconds < best[k].seconds):
        best[k] = found
  return best, tokens


def weights_read(cfg: config.ModelConfig, batch: int, drafts: int) -> float:
  """Parameters that a step must read, if tokens choose experts evenly."""
  moe = cfg.moe

  def read(parts, tokens: int) -> float:
    used = 1.0 - (1.0 - moe.top_k / moe.num_experts) ** tokens
    return sum(
      part.size * (used if part.name.endswith('.experts') else 1.0)
      for part in parts
      if part.name != 'embedding'
    )

  total = read(flops.main_parts(cfg), batch * (1 + drafts))
  for draft in range(drafts):
    # The first is given all tokens, a later one its own.
    tokens = batch * (1 if draft else 1 + drafts)
    total += read(flops.mtp_parts(cfg), tokens) / cfg.mtp.depth
    total += cfg.vocab_size * cfg.d_model  # the head, once more
  return total


class Total(NamedTuple):
  """Of the timed steps; but `accepted` (a share), `tokens`, `rows`: of all."""

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


def _total(made: list[generate.Generation]) -> Total:
  counts = [one.counts for one in made]
  accepted = sum(c.accepted for c in counts)
  return Total(
    seconds=sum(one.decode_seconds for one in made),
    steps=sum(c.steps - 1 for c in counts),  # the first is not timed
    decoded=sum(one.decoded for one in made),
    tokens=sum(c.tokens for c in counts),
    rows=sum(c.rows for c in counts),
    accepted=accepted / max(sum(c.drafted for c in counts), 1),
  )


def held_out(model: llm.LLM, count: int, size: int) -> list[list[int]]:
  """The first tokens of so many held-out documents, each from its middle."""
  corpus = corpora.open_corpus(model.config.data)
  found = []
  for record in corpus.valid:
    text = corpora.document_text(record)
    middle = text[len(text) // 2 :]
    ids = model.tokenizer.encode(middle[: 16 * size]).tolist()
    if len(ids) >= size:
      found.append(ids[:size])
    if len(found) == count:
      return found
  raise SystemExit(
    f'dsv3: --prompts={count}: only {len(found)} held-out documents have '
    f'{size} tokens in their second half'
  )


if __name__ == '__main__':
  sys.exit(main())
