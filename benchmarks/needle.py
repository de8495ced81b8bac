"""Does a model find needles at eight times its training length, with YaRN?

Question: after pre-training on rows of 256 tokens and a short YaRN phase at
2,048 (TR 4.3), is a value found by its key over all of the longer context?

  dsv3 bench needle [--steps=400] [--extension=50] [--context=1] [--json]

Rows are the standard library's text as bytes, with extra symbols inserted. A
needle is one of 256 symbols, for a key and a value out of 16 each. A question
is a key, followed by the value of the needle with that key. A test row has a
needle for every key, one of them at the given depth, and ends with the question
for that one. The answer is right if its value is the likeliest of all tokens.
Guessing among the values gives 1 in 16.

Three models are measured: `before`, plain RoPE as trained; `yarn`, the same
weights with YaRN's frequencies and softmax scale, not trained further; `after`,
trained in the phase. The network is the quickstart's, smaller and without MTP.
The phase starts from its weights and biases with new moments, and may run on
`--context` devices. Writes a table, a heat map, and a row for every cell.
"""

import argparse
import functools
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks.common import report
from dsv3_jax import config
from dsv3_jax.data import corpus as corpora
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.training import step as steps
from experiments import quickstart

matplotlib.use('agg')

SHORT, LONG = 256, 2048  # tokens of a row before and in the extension
LENGTHS = (128, 256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 4096  # of a step
KINDS = 16  # of keys, and of values
# Bytes come first, then needles by key and value, questions, answers.
NEEDLE, QUESTION = 256, 256 + KINDS**2
ANSWER = QUESTION + KINDS
_TEXT_WEIGHT = 0.1  # of a byte's loss beside that of a value
_PEAK, _EXTENSION_LR, _WARMUP = 4e-3, 1e-3, 50
# (share of the steps until which it is used, tokens of a sample)
SAMPLE_LENGTHS = ((0.12, 32), (0.25, 64), (0.45, 128), (1.0, SHORT))
_FACTOR = 10.0  # YaRN's s: as far beyond the length used as the report's 40


class Weights(NamedTuple):
  """The part of a state that the phase starts from."""

  params: dict
  router_biases: model.RouterBiases


def make_config(length: int, *, yarn: bool, context: int = 1) -> config.Config:
  """The model for rows of a length, with YaRN's frequencies or without."""
  source = quickstart.get_config()
  with source.unlocked():
    net = source.model
    net.update(vocab_size=ANSWER + KINDS, d_model=128, d_ff=256, num_layers=3)
    net.update(num_dense_layers=2, init_std=0.08)
    net.update(max_seq_len=length, scan_layers=False)
    net.rope.original_seq_len = SHORT if yarn else length
    net.rope.factor = _FACTOR
    net.moe.update(num_experts=8, top_k=2, d_ff=64, num_groups=2)
    net.moe.update(top_groups=2, block_size=64)
    net.mtp.depth = 0
    rows = TOKENS // length
    source.data.update(seq_len=length, isolate_samples=True)
    source.data.tokenizer = 'none.json'
    source.train.update(batch_size=rows, batch_size_start=rows)
    source.train.microbatch_size = rows
    source.eval.stride = length
    source.sample.max_new_tokens = 1
    source.parallel.context = context
  return config.from_config_dict(source)


def read_text(cfg: config.Config) -> np.ndarray:
  """Bytes of the corpus, some megabytes."""
  train = corpora.open_corpus(cfg.data).train
  texts = (corpora.document_text(train[i]) for i in range(len(train)))
  data = bytearray()
  for text in texts:
    data += text.encode()
    if len(data) > 4_000_000:
      break
  return np.frombuffer(bytes(data), np.uint8).astype(np.int32)


def draw_text(rng, text: np.ndarray, length: int) -> np.ndarray:
  start = rng.integers(len(text) - length)
  return text[start : start + length]


def draw_needles(rng, count: int) -> np.ndarray:
  """[count, 2]: distinct keys with random values."""
  keys = rng.choice(KINDS, count, replace=False)
  return np.stack([keys, rng.integers(KINDS, size=count)], 1)


def spell(needles: np.ndarray) -> np.ndarray:
  return NEEDLE + needles @ [KINDS, 1]


def training_row(rng, text: np.ndarray, length: int):
  """Tokens [length + 1] and the loss weights of all but the first.

  Weights are 1 on answers after their needle, small on text, and 0 on tokens
  that cannot be predicted: needles, questions, answers before their needle.
  """
  needles = draw_needles(rng, int(rng.integers(4, min(KINDS, length // 4) + 1)))
  questions = needles[rng.integers(len(needles), size=length // 8)]
  filler = draw_text(rng, text, length + 1 - len(needles) - 2 * len(questions))
  events = [[n] for n in spell(needles)]
  events += [[QUESTION + key, ANSWER + value] for key, value in questions]
  at = rng.integers(len(filler) + 1, size=len(events))
  order = np.argsort(at)
  sizes = [len(events[i]) for i in order]
  inserted = np.concatenate([events[i] for i in order])
  tokens = np.insert(filler, np.repeat(at[order], sizes), inserted)
  seen = np.zeros(KINDS, bool)
  weights = np.where(tokens < NEEDLE, _TEXT_WEIGHT, 0.0)
  for i in np.flatnonzero(tokens >= NEEDLE):
    if tokens[i] < QUESTION:
      seen[(tokens[i] - NEEDLE) // KINDS] = True
    elif tokens[i] >= ANSWER:
      weights[i] = seen[tokens[i - 1] - QUESTION]
  return tokens, weights[1:]


def sample_length(done: float, cfg: config.Config) -> int:
  """Length of a sample; retrieval heads form sooner on short samples."""
  if cfg.model.yarn:
    return cfg.data.seq_len
  return next(length for until, length in SAMPLE_LENGTHS if done < until)


def training_batch(rng, text, cfg: config.Config, length: int) -> model.Batch:
  """One micro-batch of one step; rows hold samples of `length` tokens."""
  samples = [training_row(rng, text, length) for _ in range(TOKENS // length)]
  tokens, weights = map(np.stack, zip(*samples, strict=True))
  return _batch(tokens[:, :-1], tokens[:, 1:], weights, cfg.data.seq_len)


def _batch(tokens_BT, targets_BT, weights_BT, length: int) -> model.Batch:
  """Packs samples, one in each row of `tokens_BT`, into rows of `length`."""
  shape = count, sample_len = tokens_BT.shape
  pack = lambda x: np.broadcast_to(x, shape).reshape(1, -1, length)
  ints = lambda x: pack(x).astype(np.int32)
  return model.Batch(
    tokens_BT=ints(tokens_BT),
    targets_BT=ints(targets_BT),
    positions_BT=ints(np.arange(sample_len)),
    segments_BT=ints(1 + np.arange(count)[:, None]),
    weights_BT=pack(weights_BT).astype(np.float32),
  )


def test_row(rng, text: np.ndarray, length: int, depth: float):
  """Tokens [length], the last a question, and the answer."""
  needles = draw_needles(rng, KINDS)
  filler = draw_text(rng, text, length - 1 - KINDS)
  at = rng.integers(len(filler) + 1, size=KINDS)
  at[0] = round(depth * len(filler))
  order = np.argsort(at)
  tokens = np.insert(filler, at[order], spell(needles)[order])
  return np.append(tokens, QUESTION + needles[0, 0]), ANSWER + needles[0, 1]


def train(cfg, start: Weights | None, text, num_steps, lr, seed) -> Weights:
  """Trains with warm-up and a cosine from `lr` to a tenth of it."""
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  state = trainer.init(jax.random.key(cfg.seed))
  if start is not None:
    shardings = trainer.shardings()
    weights = {'params': start.params, 'router': start.router_biases}
    shardings = {name: shardings[name] for name in weights}
    state |= jax.device_put(weights, shardings)
  step, rng = (
    jax.jit(trainer.step, donate_argnums=0),
    np.random.default_rng(seed),
  )
  warmup, begun = min(_WARMUP, num_steps // 5 + 1), time.monotonic()
  for number in range(num_steps):
    done = max(0.0, (number - warmup) / max(1, num_steps - warmup))
    rate = lr * (0.55 + 0.45 * np.cos(np.pi * done))
    rate *= min(1.0, (number + 1) / warmup)
    hyper = {'lr': rate, 'mtp_weight': 0.0, 'bias_rate': 1e-3}
    hyper = {name: jnp.float32(value) for name, value in hyper.items()}
    length = sample_length(number / num_steps, cfg)
    batch = training_batch(rng, text, cfg, length)
    rows = jax.device_put(batch, trainer.batch_sharding())
    state, metrics = step(state, rows, trainer.num_microbatches(1), hyper)
    if (number + 1) % 50 == 0:
      seconds = time.monotonic() - begun
      print(
        f'  step {number + 1} of {num_steps}: loss {metrics["loss"]:.3f}, '
        f'{(number + 1) * TOKENS / seconds:,.0f} tokens/s',
        file=sys.stderr,
        flush=True,
      )
  device = jax.devices()[0]
  return jax.device_put(Weights(state['params'], state['router']), device)


@functools.cache
def _answer(cfg: config.Config):
  """The likeliest token after each row, compiled."""
  net = model.build(cfg)

  def answer(weights: Weights, batch: model.Batch):
    logits_BTV, _ = net.apply(
      {'params': weights.params}, batch, weights.router_biases
    )
    return jnp.argmax(logits_BTV[:, -1], axis=-1)

  return jax.jit(answer)


def accuracy(weights, text, length, depth, *, yarn, count, seed) -> float:
  """Share of `count` test rows whose value is found."""
  # One model for all lengths, built for the longest, as in practice.
  cfg, rng = make_config(LONG, yarn=yarn), np.random.default_rng(seed)
  answer, num_right = _answer(cfg), 0
  batch_size = min(count, max(1, 2 * TOKENS // length))
  for start in range(0, count, batch_size):
    rows = [test_row(rng, text, length, depth) for _ in range(batch_size)]
    tokens, values = map(np.stack, zip(*rows, strict=True))
    batch = jax.tree.map(lambda x: x[0], _batch(tokens, tokens, tokens, length))
    predicted = np.asarray(answer(weights, batch))[: count - start]
    num_right += int(np.sum(predicted == values[: len(predicted)]))
  return num_right / count


def measure(stage, weights, text, args, *, yarn) -> list[report.Row]:
  """Measures a model; a row for every length and depth."""
  rows = []
  for length in args.lengths:
    for depth in DEPTHS:
      options = {
        'yarn': yarn,
        'count': args.count,
        'seed': [length, int(4 * depth)],
      }
      share = accuracy(weights, text, length, depth, **options)
      cell = {'model': stage, 'tokens': length, 'depth': depth}
      rows.append(cell | {'share_found': share})
  return rows


def draw(rows: list[report.Row], path) -> None:
  """Plots depth over length, a panel for each model."""
  from matplotlib import pyplot as plt

  names = list(dict.fromkeys(row['model'] for row in rows))
  lengths = sorted({row['tokens'] for row in rows})
  figure, axes = plt.subplots(
    1, len(names), figsize=(3.6 * len(names), 3.4), layout='constrained'
  )
  titles = {
    'before': f'before: trained at {SHORT}, plain RoPE',
    'yarn': 'YaRN, not trained further',
    'after': f'after the phase at {LONG:,}',
  }
  share = {
    (r['model'], r['depth'], r['tokens']): r['share_found'] for r in rows
  }
  for axis, name in zip(axes, names, strict=True):
    grid = [[share[name, depth, n] for n in lengths] for depth in DEPTHS]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
    for (y, x), value in np.ndenumerate(np.array(grid)):
      style = {'ha': 'center', 'va': 'center', 'fontsize': 8}
      style['color'] = 'white' if not 0.1 < value < 0.9 else 'black'
      axis.text(x, y, f'{value:.0%}', **style)
    axis.set_xticks(range(len(lengths)), [f'{n:,}' for n in lengths])
    axis.set_yticks(range(len(DEPTHS)), [f'{d:.0%}' for d in DEPTHS])
    axis.set_title(titles[name], fontsize=9)
    axis.set_xlabel('tokens of the row')
  axes[0].set_ylabel('depth of the needle')
  figure.colorbar(image, ax=axes, label='values found')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def run(args: argparse.Namespace) -> list[report.Row]:
  """Trains, measures, extends, measures."""
  short = make_config(SHORT, yarn=False)
  text, rows = read_text(short), report.Rows(args)
  half = len(text) // 2  # one half for training, the other for tests
  train_text, test_text = text[:half], text[half:]

  def add_rows(stage, weights, *, yarn):
    for row in measure(stage, weights, test_text, args, yarn=yarn):
      rows.append(row)

  weights = train(short, None, train_text, args.steps, _PEAK, 0)
  add_rows('before', weights, yarn=False)
  add_rows('yarn', weights, yarn=True)
  long = make_config(LONG, yarn=True, context=args.context)
  weights = train(long, weights, train_text, args.extension, _EXTENSION_LR, 1)
  add_rows('after', weights, yarn=True)
  return rows


def table(rows: list[report.Row]) -> list[report.Row]:
  """A line for each model and depth, a column for each length."""
  lines = {}
  for row in rows:
    line = {'model': row['model'], 'depth': f'{row["depth"]:.0%}'}
    line = lines.setdefault((row['model'], row['depth']), line)
    line[f'{row["tokens"]} tokens'] = f'{row["share_found"]:.1%}'
  return list(lines.values())


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('needle', __doc__)
  parser.add_argument('--steps', type=int, default=400, help='at 256 tokens')
  parser.add_argument('--extension', type=int, default=50, help='at 2,048')
  parser.add_argument('--context', type=int, default=1, help='of the phase')
  parser.add_argument('--count', type=int, default=64, help='rows of a cell')
  args = parser.parse_args(argv)
  for name in ('steps', 'extension', 'context', 'count'):
    if getattr(args, name) < 1:
      parser.error(f'--{name}={getattr(args, name)} must be at least 1')
  if args.context > jax.config.jax_num_cpu_devices:  # nothing has run so far
    jax.config.update('jax_num_cpu_devices', args.context)
  args.lengths = LENGTHS
  args.output = args.output or report.RESULTS / 'needle.md'
  rows = run(args)
  draw(rows, args.output.with_suffix('.png'))
  setup = (
    f'{args.steps} steps of {TOKENS} tokens at {SHORT}, {args.extension} at '
    f'{LONG} on context={args.context}; {args.count} rows a cell.'
  )
  about = f'{" ".join(__doc__.split(chr(10) + chr(10))[1].split())} {setup}'
  report.publish('needle', about, table(rows), args)
  return 0


if __name__ == '__main__':
  sys.exit(main())
