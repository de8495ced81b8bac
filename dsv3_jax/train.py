"""The training loop: one straight line from config to samples (TR 4.2).

`run(cfg, workdir)` trains until `train.total_tokens` have been seen or goes on
where `workdir` stopped. All that it needs for that is in one committed step of
`checkpoints/`: arrays, EMA, loader position, tokens seen. What it writes:

  config.json  tokenizer.json  metrics.jsonl  TensorBoard events  checkpoints/
  and, at the end, loss.png and samples.txt
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, evaluate, metrics, optim, sharding, supervise
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader as loaders
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine
from dsv3_jax.nn import model
from dsv3_jax.planning import flops, hardware

# What may change when a run goes on; the rest is fixed by its first start.
_MAY_CHANGE = (
  'train.total_tokens',
  'train.log_every',
  'train.probe_every',
  'train.watchdog_seconds',
  'train.peak_flops',
  'checkpoint.',
  'eval.',
  'sample.',
  'mesh.',
  'data.cache_dir',
)


class CorruptionError(RuntimeError):
  """One step, run twice, gave different bits."""


@dataclasses.dataclass
class Run:
  """Everything that lives as long as the run does."""

  cfg: config.Config
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  corpus: corpora.Corpus
  tokenizer: tokenizers.Tokenizer
  loader: loaders.Loader
  checkpoints: store.Store
  writer: metrics.MetricWriter
  meter: metrics.Throughput
  ema: optim.HostEma
  state: steps.State
  step: int  # finished steps
  tokens: int  # seen by them


def run(cfg: config.Config, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains; returns the final held-out figures.

  Raises:
    ValueError: bad input, before anything compiles.
    FloatingPointError: `(step, metrics)` of a non-finite loss; the optimizer
      was not touched and the last checkpoint stands.
    CorruptionError: the probe saw two results of one step.
    supervise.Stopped: a signal came; the state was saved.
  """
  r = _open(cfg, pathlib.Path(workdir))
  try:
    with jax.set_mesh(r.mesh):
      with (
        supervise.Watchdog(cfg.train.watchdog_seconds) as watchdog,
        supervise.StopSignal() as stop,
      ):
        _train(r, watchdog, stop)
        if stop.requested:
          raise supervise.Stopped(r.step)
      return _finish(r)
  finally:
    r.loader.close()
    r.ema.close()
    r.writer.close()
    r.checkpoints.close()


def _open(cfg: config.Config, workdir: pathlib.Path) -> Run:
  """Data, mesh and state, fresh or restored."""
  mesh = sharding.make_mesh(cfg.mesh)
  corpus = corpora.open_corpus(cfg.data)
  tokenizer = corpora.load_tokenizer(cfg.data, corpus)
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise ValueError(
      f'model.vocab_size={cfg.model.vocab_size} must be >= '
      f'{tokenizer.vocab_size}, the entries of the tokenizer'
    )
  checkpoints = store.Store(workdir / 'checkpoints', keep=cfg.checkpoint.keep)
  resume = cfg.checkpoint.restore_step
  resume = checkpoints.latest() if resume < 0 else resume
  claim(cfg, workdir)
  tokenizer.save(workdir / 'tokenizer.json')
  index, count = jax.process_index(), jax.process_count()
  loader = loaders.Loader(
    corpus.train,
    tokenizer,
    cfg.data,
    seed=cfg.seed,
    rows=cfg.train.microbatch_size // count,
    process_index=index,
    process_count=count,
  )
  with jax.set_mesh(mesh):
    shardings = steps.state_shardings(cfg, mesh)
    init = jax.jit(
      functools.partial(steps.init_state, cfg), out_shardings=shardings
    )
    state = init(jax.random.key(cfg.seed))
    ema = optim.HostEma(cfg.optim.ema_decay, state['params'])
    progress = {'step': 0, 'tokens': 0}
    if resume is not None:
      like = {'train': state, 'ema': ema.tree()}
      arrays, extras = checkpoints.restore(resume, like)
      state, progress = arrays['train'], extras['progress']
      ema.load(arrays['ema'])
      loader.set_state(extras[f'loader_{index}'])
      print(f'goes on after step {resume}', flush=True)
  return Run(
    cfg=cfg,
    workdir=workdir,
    mesh=mesh,
    corpus=corpus,
    tokenizer=tokenizer,
    loader=loader,
    checkpoints=checkpoints,
    writer=metrics.MetricWriter(workdir, progress['step']),
    meter=metrics.Throughput(
      flops.flops_per_token(cfg.model, cfg.data.seq_len), _peak_flops(cfg, mesh)
    ),
    ema=ema,
    state=state,
    step=progress['step'],
    tokens=progress['tokens'],
  )


def _train(
  r: Run, watchdog: supervise.Watchdog, stop: supervise.StopSignal
) -> None:
  """Steps until the tokens are seen or a signal comes; saves at the end."""
  cfg = r.cfg
  step_fn = steps.make_train_step(cfg)
  compiled = jax.jit(step_fn, donate_argnums=0)
  probe = jax.jit(step_fn)
  pending = None  # metrics of the last step, read once the next is under way
  saved = r.step
  while r.tokens < cfg.train.total_tokens and not stop.requested:
    args, rows = _inputs(r)
    every = cfg.train.probe_every
    if every and r.step % every == 0:
      r.state, told = _run_twice(probe, r.state, args, r.step)
    else:
      r.state, told = compiled(r.state, *args)
    r.ema.update(r.state['params'])
    r.step, r.tokens = r.step + 1, r.tokens + rows * cfg.data.seq_len
    if pending is not None:
      _report(r, *pending)
    pending = (r.step, r.tokens, rows, told)
    watchdog.beat()
    due = lambda every: every and r.step % every == 0
    if due(cfg.checkpoint.every_steps) or due(cfg.eval.every_steps):
      _report(r, *pending)  # a step that is not finite is neither saved
      pending = None
      if due(cfg.checkpoint.every_steps):
        _save(r)
        saved = r.step
      if due(cfg.eval.every_steps) and r.tokens < cfg.train.total_tokens:
        told = evaluate.heldout(_evaluation(r))
        r.writer.write('eval', r.step, r.tokens, told)
        print(f'  held out: {told["bits_per_byte"]:.4f} bits per byte')
      r.meter.restart()
      watchdog.beat()
  if pending is not None:
    _report(r, *pending)
  if saved != r.step:
    _save(r)
  r.checkpoints.wait()


def _inputs(r: Run) -> tuple[tuple, int]:
  """Arguments of the next step, and how many sequences it trains on."""
  cfg = r.cfg
  rows = optim.batch_size_at(cfg.train, r.tokens)
  micro, most = cfg.train.microbatch_size, cfg.train.batch_size
  batches = [next(r.loader) for _ in range(rows // micro)]
  empty = jax.tree.map(np.zeros_like, batches[0])
  batches += [empty] * ((most - rows) // micro)
  stacked = {name: np.stack([b[name] for b in batches]) for name in empty}
  place = functools.partial(
    jax.make_array_from_process_local_data, steps.batch_sharding(r.mesh)
  )
  batch_nBT = model.Batch(**{name: place(x) for name, x in stacked.items()})
  hyper = {
    'lr': optim.lr_at(cfg.optim.lr, r.step, r.tokens),
    'mtp_weight': optim.value_at(cfg.optim.mtp_weight, r.tokens),
    'bias_rate': optim.value_at(cfg.optim.bias_rate, r.tokens),
  }
  hyper = {name: jnp.float32(value) for name, value in hyper.items()}
  return (batch_nBT, jnp.int32(rows // micro), hyper), rows


def _run_twice(probe: Any, state: steps.State, args: tuple, step: int):
  """Silent-corruption probe: the same step twice must agree in every bit."""
  first, second = probe(state, *args), probe(state, *args)
  if not jax.jit(steps.same_bits)(first, second):
    raise CorruptionError(
      f'step {step} gave different bits when run twice: suspect the hardware; '
      'the last checkpoint stands'
    )
  return first


def _report(r: Run, step: int, tokens: int, rows: int, told: dict) -> None:
  """Checks a finished step; every `log_every` steps, writes and prints it."""
  cfg = r.cfg
  told = {name: value.item() for name, value in told.items()}
  halted, skipped = told.pop('halted'), told.pop('skipped')
  if halted:
    raise FloatingPointError(step, told)
  if skipped:
    print(f'step {step}: loss {told["loss"]:.4f} is a spike, skipped')
  r.meter.add(rows * cfg.data.seq_len)
  if step % cfg.train.log_every and step != 1:
    return
  speed = r.meter.read()
  r.meter.restart()
  told |= {'lr': optim.lr_at(cfg.optim.lr, step - 1, tokens)}
  r.writer.write('train', step, tokens, told | speed)
  line = (
    f'step {step}  loss {told["loss"]:.4f}  mtp {told["mtp_loss"]:.4f}  '
    f'maxvio {told["max_violation"]:.2f}'
  )
  if speed:
    left = (cfg.train.total_tokens - tokens) / speed['tokens_per_second']
    line += (
      f'  {speed["tokens_per_second"]:,.0f} tokens/s  mfu {speed["mfu"]:.1%}'
      f'  eta {_duration(left)}'
    )
  print(line, flush=True)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def _save(r: Run) -> None:
  """Starts an asynchronous checkpoint of this very step."""
  extras = {
    'progress': {'step': r.step, 'tokens': r.tokens},
    f'loader_{jax.process_index()}': r.loader.get_state(),
  }
  arrays = {'train': r.state, 'ema': r.ema.tree()}
  r.checkpoints.save(r.step, arrays, extras)


def _evaluation(r: Run) -> evaluate.Evaluation:
  return evaluate.Evaluation(
    cfg=r.cfg,
    params=r.state['params'],
    router=r.state['router'],
    corpus=r.corpus,
    tokenizer=r.tokenizer,
  )


def _finish(r: Run) -> dict[str, float]:
  """Held-out figures, baselines if asked, the picture, and samples."""
  cfg = r.cfg
  told = evaluate.heldout(_evaluation(r))
  if cfg.eval.baselines:
    told |= evaluate.compare(_evaluation(r))
  r.writer.write('eval', r.step, r.tokens, told)
  for name, value in told.items():
    print(f'{name:28} {value:12,.4f}')
  metrics.plot_loss(r.workdir)
  router, params = r.state['router'], r.state['params']
  generator = engine.Engine(cfg, params, router)
  encode = functools.partial(r.tokenizer.encode, add_bos=True)
  made = generator.generate(
    [encode(prompt).tolist() for prompt in cfg.sample.prompts],
    cfg.sample.max_new_tokens,
    temperature=cfg.sample.temperature,
    top_p=cfg.sample.top_p,
    seed=cfg.seed,
    stop_id=r.tokenizer.eos_id,
  )
  texts = [
    prompt + r.tokenizer.decode(row, skip_special=True)
    for prompt, row in zip(cfg.sample.prompts, made.tokens, strict=True)
  ]
  rule = '\n' + '-' * 72 + '\n'
  (r.workdir / 'samples.txt').write_text(rule.join(texts), encoding='utf-8')
  print(rule + rule.join(texts) + rule)
  return told


def claim(cfg: config.Config, workdir: pathlib.Path) -> None:
  """Writes `config.json`, or checks that the run in `workdir` is this one.

  Raises:
    ValueError: a setting that a run may not change differs from its start's.
  """
  path = workdir / 'config.json'
  if path.exists():
    old = flatten(json.loads(path.read_text(encoding='utf-8')))
    new = flatten(json.loads(config.to_json(cfg)))
    for name, value in new.items():
      if name.startswith(_MAY_CHANGE) or old.get(name) == value:
        continue
      raise ValueError(
        f'{name}={value!r} differs from {old.get(name)!r} in {path}: name '
        'another --workdir, or keep the value'
      )
  workdir.mkdir(parents=True, exist_ok=True)
  scratch = workdir / '.config.json'
  scratch.write_text(config.to_json(cfg), encoding='utf-8')
  scratch.replace(path)


def flatten(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Nested dict -> dotted path: value."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def _peak_flops(cfg: config.Config, mesh: jax.sharding.Mesh) -> float:
  """Of all devices: given, published, or (on CPU) measured with matmuls."""
  if cfg.train.peak_flops:
    return cfg.train.peak_flops * mesh.size
  kind = jax.devices()[0].device_kind
  if kind in hardware.CHIPS:
    return hardware.CHIPS[kind].bf16_flops * mesh.size
  size = 2048
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2.0 * size**3 / min(times)
