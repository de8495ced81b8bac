"""What do MTP drafts gain on a trained model?

Question: of the tokens that the MTP module drafts on held-out text, how many
does the model then say, and how many more tokens a second is that?

  dsv3 bench speculation --checkpoint=runs/quickstart [--rounds=3] [--json]

Prompts are pieces of held-out documents; each is continued alone, greedily and
at temperature 1, with 0 to `--most` drafts a step. The ways take turns, a
figure is the best of the rounds. Tokens of all ways are compared: `equal` is 1
but where a sum of another size rounds to another token. What is gained is
tokens a step beside what longer a step takes.
"""

import pathlib
import sys
from typing import NamedTuple

import numpy as np

import dsv3_jax
from benchmarks.common import report
from dsv3_jax.data import corpus as corpora
from dsv3_jax.inference import engine, loaded

TEMPERATURES = (0.0, 1.0)


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
  if args.new_tokens < 3:
    parser.error(f'--new_tokens={args.new_tokens} must be at least 3')
  model = dsv3_jax.load(args.checkpoint)
  rows = report.Rows(args)
  for row in measure(model, args):
    rows.append(row)
  about = (
    f'{args.prompts} prompts of {args.prompt_tokens} held-out tokens, each '
    f'alone, {args.new_tokens} new tokens, f32; best of {args.rounds} rounds.'
  )
  report.publish('speculation', about, rows, args)
  return 0


def measure(model: loaded.LoadedModel, args):
  """A row for each temperature and number of drafts."""
  prompts = held_out(model, args.prompts, args.prompt_tokens)
  weights = (model.config, model.params, model.router)
  engines = [engine.Engine(*weights, k) for k in range(args.most + 1)]
  for temperature in TEMPERATURES:
    best, tokens = {}, {}
    for turn in range(args.rounds + 1):  # the first compiles
      for k, net in enumerate(engines):
        made = [
          net.generate([p], args.new_tokens, temperature=temperature, seed=b)
          for b, p in enumerate(prompts)
        ]
        tokens[k] = np.array([one.tokens[0] for one in made])
        found = _total(made)
        if turn and (k not in best or found.seconds < best[k].seconds):
          best[k] = found
    for k, found in best.items():
      yield {
        'temperature': temperature,
        'drafts': k,
        'accepted': found.accepted if k else None,
        'tokens_per_step': found.tokens / found.steps,
        'tokens_per_s': found.tokens / found.seconds,
        'speed_ratio': found.speed / best[0].speed,
        'ms_per_step': 1e3 * found.seconds / found.steps,
        'equal': float(np.mean(np.equal(tokens[k], tokens[0]))),
      }


class Total(NamedTuple):
  """Of the timed steps of all prompts, but `accepted`: of all, a share."""

  seconds: float
  steps: int
  tokens: int
  accepted: float

  @property
  def speed(self) -> float:
    return self.tokens / self.seconds


def _total(made: list[engine.Generation]) -> Total:
  counts = [one.counts for one in made]
  accepted = sum(c.accepted for c in counts)
  return Total(
    seconds=sum(one.decode_seconds for one in made),
    steps=sum(c.rows - 1 for c in counts),  # the first is not timed
    tokens=sum(one.decoded for one in made),
    accepted=accepted / max(sum(c.drafted for c in counts), 1),
  )


def held_out(
  model: loaded.LoadedModel, count: int, size: int
) -> list[list[int]]:
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
