"""Training, prefill and decode compared with transformers, on the CPU.

Question: how fast is the same DeepSeek-V3, with the same weights, in f32 and on
two threads, here and as transformers' DeepseekV3ForCausalLM in PyTorch?

  python -m benchmarks.train_vs_transformers

Both sides run in one process, in turns; the figures are the best of `--rounds`.
Logits, training loss and greedy tokens are compared first. The ceilings, of the
same run, are the best f32 matmul of either library and the read bandwidth of
two threads. transformers runs all of its expert implementations in a warm-up
turn and continues with the fastest.
"""

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import time
import warnings

os.environ['OMP_NUM_THREADS'] = '2'  # read when PyTorch is imported
if __name__ == '__main__' and not __package__:
  # Run by path, as in release 0.1: imports start at the repository's root.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
  message = 'run python -m benchmarks.train_vs_transformers instead'
  warnings.warn(message, FutureWarning, stacklevel=1)

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.common import hf_tensors, shared_model
from dsv3_jax import config
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.inference import generate, model_runner
from dsv3_jax.nn import model
from dsv3_jax.planning import flops
from dsv3_jax.training import step as steps

LENGTH, BATCH = 512, 4  # of training and prefill
PROMPT, NEW = 256, 128  # of decode
DECODE_BATCHES = (1, 8)
# 'batched_mm' copies the weights of each token's experts: 70 GB a layer in
# training, so it is timed in decoding only.
EXPERTS = {'train': ('eager', 'grouped_mm'), 'prefill': ('eager', 'grouped_mm')}
EXPERTS['decode'] = ('eager', 'grouped_mm', 'batched_mm')


class Ours:
  """dsv3_jax, through the functions of its training loop and `generate`."""

  def __init__(self, cfg: config.Config):
    self.cfg = cfg
    self.state = jax.jit(lambda: steps.init_state(cfg, jax.random.key(0)))()
    self.hyper = {
      'lr': jnp.float32(1e-4),
      'mtp_weight': jnp.float32(0.0),
      'bias_rate': jnp.float32(0.0),
    }
    self._step = jax.jit(steps.make_train_step(cfg), donate_argnums=0)
    self._logits = jax.jit(lambda *args: model.build(cfg).apply(*args)[0])
    # Copies, as training donates its buffers.
    state = jax.tree.map(jnp.copy, self.state)
    args = (cfg, state['params'], state['router'])
    self.runner = model_runner.ModelRunner(*args)

  def weights(self) -> dict[str, np.ndarray]:
    state = self.state
    return dict(hf_tensors.tensors(self.cfg, state['params'], state['router']))

  def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
    args = ({'params': self.state['params']}, self._batch(tokens_BT))
    return np.asarray(self._logits(*args, self.state['router']))

  def train(self, tokens_BT: np.ndarray) -> float:
    """The loss of one step (forward, backward, clip, AdamW) on T + 1 tokens."""
    batch = self._batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    batch_nBT = jax.tree.map(lambda x: x[None], batch)
    self.state, metrics = self._step(
      self.state, batch_nBT, jnp.int32(1), self.hyper
    )
    jax.block_until_ready(self.state)
    return metrics['loss'].item()

  def prefill(self, tokens_BT: np.ndarray) -> float:
    """Seconds until the first token, latents cached."""
    return generate.generate(self.runner, tokens_BT.tolist(), 1).prefill_seconds

  def decode(self, tokens_BT: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds of NEW cached steps, and the greedy tokens [B, NEW + 1]."""
    # The engine's clock leaves the first step out, as that one may compile.
    generation = generate.generate(self.runner, tokens_BT.tolist(), NEW + 2)
    assert generation.decoded == NEW * len(tokens_BT)
    return generation.decode_seconds, np.array(generation.tokens)[:, : NEW + 1]

  def _batch(self, tokens_BT, targets_BT=None) -> model.Batch:
    shape = tokens_BT.shape
    ones = jnp.ones(shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    targets_BT = tokens_BT if targets_BT is None else targets_BT
    tokens_BT, targets_BT = jnp.int32(tokens_BT), jnp.int32(targets_BT)
    weights = ones.astype(jnp.float32)
    return model.Batch(tokens_BT, targets_BT, positions, ones, weights)


class Theirs:
  """transformers: eager PyTorch, sdpa attention, its dynamic cache."""

  def __init__(self, cfg: config.Config, weights: dict[str, np.ndarray]):
    shape = transformers.DeepseekV3Config(**hf_config.write(cfg))
    shape._attn_implementation = 'sdpa'
    self.net = transformers.DeepseekV3ForCausalLM(shape)
    self._load(weights)
    self.adamw = torch.optim.AdamW(
      self.net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1
    )

  def use(self, experts: str) -> None:
    self.net.set_experts_implementation(experts)

  def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
      return self.net(torch.from_numpy(tokens_BT)).logits.numpy()

  def train(self, tokens_BT: np.ndarray) -> float:
    tokens = torch.from_numpy(tokens_BT)
    logits = self.net(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
    self.adamw.step()
    self.adamw.zero_grad()
    return loss.item()

  def prefill(self, tokens_BT: np.ndarray) -> float:
    start = time.perf_counter()
    with torch.no_grad():
      tokens = torch.from_numpy(tokens_BT)
      out = self.net(tokens, use_cache=True, logits_to_keep=1)
      out.logits.argmax(-1)
    return time.perf_counter() - start

  def decode(self, tokens_BT: np.ndarray) -> tuple[float, np.ndarray]:
    with torch.no_grad():
      tokens = torch.from_numpy(tokens_BT)
      out = self.net(tokens, use_cache=True, logits_to_keep=1)
      outputs = [out.logits[:, -1].argmax(-1, keepdim=True)]
      start = time.perf_counter()
      for _ in range(NEW):
        cache = out.past_key_values
        out = self.net(outputs[-1], past_key_values=cache, use_cache=True)
        outputs.append(out.logits[:, -1].argmax(-1, keepdim=True))
      seconds = time.perf_counter() - start
    return seconds, torch.cat(outputs, 1).numpy()

  def _load(self, weights: dict[str, np.ndarray]) -> None:
    """Loads our weights; transformers fuses the experts in memory."""
    state = {n: torch.from_numpy(np.array(w)) for n, w in weights.items()}
    for i in range(self.net.config.num_hidden_layers):
      at = f'model.layers.{i}.mlp.experts.'
      if not (names := [n for n in state if n.startswith(at)]):
        continue
      one = {n.removeprefix(at): state.pop(n) for n in names}
      every = range(self.net.config.n_routed_experts)
      part = lambda kind, one=one, every=every: torch.stack(
        [one[f'{e}.{kind}.weight'] for e in every]
      )
      pair = [part('gate_proj'), part('up_proj')]
      state[at + 'gate_up_proj'] = torch.cat(pair, dim=1)
      state[at + 'down_proj'] = part('down_proj')
    self.net.load_state_dict(state)


def compare(ours: Ours, theirs: Theirs, tokens_BT: np.ndarray) -> str:
  """Checks that both sides are the same model; returns the differences."""
  gap = np.abs(
    ours.logits(tokens_BT[:, :-1]) - theirs.logits(tokens_BT[:, :-1])
  )
  assert gap.max() < 1e-4, f'logits differ by {gap.max()}'
  prompts = tokens_BT[:, :PROMPT]
  same = np.mean(ours.decode(prompts)[1] == theirs.decode(prompts)[1])
  assert same > 0.95, f'only {same:.1%} of the greedy tokens are equal'
  losses = ours.train(tokens_BT), theirs.train(tokens_BT)
  assert abs(losses[0] - losses[1]) < 1e-4, losses
  return (
    f'largest difference of logits {gap.max():.1e}, of the loss '
    f'{abs(losses[0] - losses[1]):.1e}; greedy tokens equal {same:.1%}'
  )


def ceilings() -> dict[str, float]:
  """The better f32 matmul [FLOP/s], and the read bandwidth [bytes/s]."""
  size = 2048
  x = jnp.ones((size, size), jnp.float32)
  product, y = jax.jit(jnp.matmul), torch.ones(size, size)
  best = min(
    _best(lambda: product(x, x).block_until_ready(), 5),
    _best(lambda: y @ y, 5),
  )
  big = jnp.ones((64, 1 << 20), jnp.float32)  # 256 MiB, beyond the caches
  row = jnp.ones((1 << 20,))
  total = jax.jit(lambda big, row: big @ row)
  other = torch.ones(64, 1 << 20)
  flat = torch.ones(1 << 20)
  read = min(
    _best(lambda: total(big, row).block_until_ready(), 5),
    _best(lambda: other @ flat, 5),
  )
  return {'flops': 2.0 * size**3 / best, 'bytes': big.nbytes / read}


def _best(run, rounds: int) -> float:
  run()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times)


def measure(cfg: config.Config, rounds: int) -> tuple[dict, str, dict]:
  """Best seconds by task and side, the comparison's line, the ceilings."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, cfg.model.vocab_size, (8, LENGTH + 1))
  train = tokens[:BATCH]
  ours = Ours(cfg)
  theirs = Theirs(cfg, ours.weights())
  differences = compare(ours, theirs, train)

  def timed(side):
    start = time.perf_counter()
    side.train(train)
    return time.perf_counter() - start

  tasks = {
    'train': timed,
    'prefill': lambda side: side.prefill(train[:, :LENGTH]),
  }
  for size in DECODE_BATCHES:
    prompts = tokens[:size, :PROMPT]
    tasks[f'decode {size}'] = lambda side, p=prompts: side.decode(p)[0]
  peak, best, names = ceilings(), {}, {t: EXPERTS[t.split()[0]] for t in tasks}
  for turn in range(rounds + 1):  # the first turn compiles and chooses
    for task, run in tasks.items():
      times = {'ours': (run(ours), '')}
      for experts in names[task]:
        theirs.use(experts)
        times[experts] = (run(theirs), experts)
      summary = ', '.join(
        f'{n} {seconds:.3f} s' for n, (seconds, _) in times.items()
      )
      print(f'{turn} {task:9} {summary}', flush=True)
      fastest = min(times[experts] for experts in names[task])
      names[task] = (fastest[1],)
      for side, result in (('ours', times['ours']), ('theirs', fastest)):
        if turn:
          best[task, side] = min(best.get((task, side), result), result)
    again = ceilings()
    peak = {name: max(peak[name], again[name]) for name in peak}
  return best, differences, peak


def render(cfg: config.Config, best: dict, differences: str, peak: dict) -> str:
  """The table, as Markdown."""
  net = cfg.model
  per_token = flops.flops_per_token(net, LENGTH)
  active = flops.inspect_dict(net, LENGTH)['parameters']
  active = active['active_without_embedding']
  lines = [
    '| task | ours, tokens/s | transformers, tokens/s | its experts | ratio |'
    ' ours, of ceiling | transformers, of ceiling |',
    '|---|---|---|---|---|---|---|',
  ]
  for task in dict.fromkeys(task for task, _ in best):
    cells, shares = [], []
    for side in ('ours', 'theirs'):
      seconds = best[task, side][0]
      kind, _, size = task.partition(' ')
      tokens = NEW * int(size) if size else BATCH * LENGTH
      speed = tokens / seconds
      cells.append(speed)
      if task == 'decode 1':  # every active weight is read once a token
        shares.append(f'{speed * active * 4 / peak["bytes"]:.0%} of memory')
      else:
        flop = per_token if kind == 'train' else per_token / 3.0
        if kind == 'prefill':  # the head sees the last token only
          flop -= 2.0 * net.d_model * net.vocab_size * (1.0 - 1.0 / LENGTH)
        shares.append(f'{speed * flop / peak["flops"]:.0%} of matmul')
    lines.append(
      f'| {task} | {cells[0]:,.0f} | {cells[1]:,.0f} | '
      f'{best[task, "theirs"][1]} | {cells[0] / cells[1]:.2f} | '
      f'{shares[0]} | {shares[1]} |'
    )
  about = (
    f'{differences}. Ceilings in the same run: '
    f'{peak["flops"] / 1e9:.0f} GFLOP/s f32 matmul, '
    f'{peak["bytes"] / 1e9:.1f} GB/s read. '
    f'{_where()}'
  )
  return '\n'.join(lines) + '\n\n' + about + '\n'


def _where() -> str:
  """Hardware, versions and commit."""
  cpu = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  name = [x for x in cpu.splitlines() if x.startswith('model name')]
  name = name[0].split(':')[1].strip() if name else platform.processor()
  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    capture_output=True,
    text=True,
    check=False,
  ).stdout.strip()
  return (
    f'{os.cpu_count()} cores of {name}; Python {platform.python_version()}, '
    f'jax {jax.__version__}, torch {torch.__version__}, transformers '
    f'{transformers.__version__}; commit {commit}.'
  )


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--output', type=pathlib.Path)
  args = parser.parse_args(argv)
  if hasattr(os, 'sched_setaffinity'):  # what XLA counts; Linux only
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
  warnings.simplefilter('ignore')
  torch.set_num_threads(2)
  torch.manual_seed(0)
  cfg = shared_model.make_config(LENGTH, BATCH)
  text = render(cfg, *measure(cfg, args.rounds))
  print(text)
  if args.output:
    args.output.write_text(
      '# Training, prefill and decode beside transformers\n\n'
      '`python -m benchmarks.train_vs_transformers`: batch '
      f'{BATCH} x {LENGTH} for training and prefill; prompt {PROMPT}, {NEW} '
      f'new tokens, batch {" and ".join(map(str, DECODE_BATCHES))} for decode; '
      'f32, two threads.\n\n' + text,
      encoding='utf-8',
    )
  return 0


if __name__ == '__main__':
  sys.exit(main())
