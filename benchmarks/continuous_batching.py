"""What do requests gain that share steps?

Question: how much sooner are 16 requests answered when they join and leave one
batch than one after the other, and what does a step cost them?

  dsv3 bench continuous_batching [--requests=16] [--rounds=3] [--json]

The model of `train_vs_transformers.py` (103M parameters, f32). Prompts of 32 to
256 tokens and answers of 32 to 128, the same in both ways; a request comes in
after each step. Greedy tokens of both ways are compared: sums of other sizes
round differently, so that `equal` may be a little below 1.
"""

import sys
import time

import jax
import numpy as np

from benchmarks.common import report, shared_model
from dsv3_jax import config
from dsv3_jax.inference import engine, model_runner
from dsv3_jax.nn import model

Case = tuple[list[int], int]


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('continuous_batching', __doc__)
  parser.add_argument('--requests', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--longest', type=int, default=256, help='of a prompt')
  args = parser.parse_args(argv)
  for name in ('requests', 'rounds'):
    if getattr(args, name) < 1:
      parser.error(f'--{name}={getattr(args, name)} must be at least 1')
  if args.longest < 8:
    parser.error(f'--longest={args.longest} must be at least 8')
  rows = report.Rows(args)
  cfg = shared_model.make_config(512, 4)
  for row in measure(cfg, args.requests, args.rounds, args.longest):
    rows.append(row)
  about = (
    f'{args.requests} requests: prompts of {args.longest // 8} to '
    f'{args.longest} tokens, answers of a quarter to a half of that; best of '
    f'{args.rounds} rounds, the ways in turns.'
  )
  report.publish('continuous_batching', about, rows, args)
  return 0


def measure(cfg: config.Config, requests: int, rounds: int, longest: int):
  """A row for either way."""
  net = model.build(cfg)
  params = jax.jit(lambda: model.init_params(net, jax.random.key(0)))()
  runner = model_runner.ModelRunner(
    cfg, params, model.init_router_biases(cfg.model)
  )
  rng = np.random.default_rng(0)
  draw = lambda low, high: int(rng.integers(low, high + 1))
  cases = []
  for _ in range(requests):
    length = draw(longest // 8, longest)
    prompt = rng.integers(1, cfg.model.vocab_size, length).tolist()
    cases.append((prompt, draw(longest // 8, longest // 2)))
  best, tokens = {}, {}
  for turn in range(rounds + 1):  # the first compiles
    for most in (1, requests):
      seconds, turns, tokens[most] = run(runner, cases, most)
      if turn:
        best[most] = min(best.get(most, (seconds, turns)), (seconds, turns))
  total = sum(count for _, count in cases)
  flat = lambda way: np.concatenate(tokens[way])
  for most, (seconds, turns) in best.items():
    yield {
      'at_a_time': most,
      'seconds': seconds,
      'tokens_per_s': total / seconds,
      'steps': turns,
      'ms_per_step': 1e3 * seconds / turns,
      'ratio': best[1][0] / seconds,
      'equal': float(np.mean(flat(most) == flat(1))),
    }


def run(
  runner: model_runner.ModelRunner, cases: list[Case], max_rows: int
) -> tuple[float, int, list[list[int]]]:
  """Seconds and steps of all requests, at most so many at a time; tokens."""
  sizes = [len(prompt) + count for prompt, count in cases]
  num_blocks = sum(-(-size // engine.BLOCK_SIZE) for size in sizes)
  shared = engine.Engine(runner, num_blocks=num_blocks, max_rows=max_rows)
  start, turns, requests = time.perf_counter(), 0, []
  while len(requests) < len(cases) or not shared.is_idle:
    if len(requests) < len(cases):
      requests.append(shared.submit(*cases[len(requests)]))
    shared.step()
    turns += 1
  seconds = time.perf_counter() - start
  return seconds, turns, [request.tokens for request in requests]


if __name__ == '__main__':
  sys.exit(main())
