"""The training loop: one straight line from config to samples (TR 4.2).

`run(cfg, workdir)` trains until `train.total_tokens` have been seen or goes on
where `workdir` stopped. All that it needs for that is in one committed step of
`checkpoints/`: arrays, EMA, loader position, tokens seen. Of several processes
all run this line; the first alone writes, but for arrays. What it writes:

  config.json  tokenizer.json  metrics.jsonl  TensorBoard events  checkpoints/
  and, at the end, loss.png and samples.txt
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import store
from dsv3_jax.data import batch_ramp
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader as loaders
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes, sharding
from dsv3_jax.nn import model
from dsv3_jax.planning import flops
from dsv3_jax.training import (
  ema,
  evaluate,
  init_from,
  lr_schedule,
  metrics,
  run_dir,
  samples,
  watchdog,
)
from dsv3_jax.training import step as steps


class NonFiniteError(FloatingPointError):
  """`(step, metrics)` of a loss or gradient that is not finite."""


class CorruptionError(RuntimeError):
  """One step, run twice, gave different bits."""


@dataclasses.dataclass
class Run:
  """Everything that lives as long as the run does."""

  cfg: config.Config
  workdir: pathlib.Path
  trainer: steps.Trainer
  corpus: corpora.Corpus
  tokenizer: tokenizers.Tokenizer
  windows: dict  # held-out text, cut
  loader: loaders.Loader
  checkpoints: store.Store
  writer: metrics.MetricWriter | None  # in the first process
  meter: metrics.Throughput
  watchdog: watchdog.Watchdog
  ema: ema.HostEma
  state: steps.State
  step: int  # finished steps
  tokens: int  # seen by them


def run(cfg: config.Config, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains; returns the final held-out figures.

  Raises:
    InputError: bad input, before anything compiles.
    NonFiniteError: `(step, metrics)` of a non-finite loss; the optimizer was
      not touched and the last checkpoint stands.
    CorruptionError: the probe saw two results of one step.
    watchdog.Stopped: a signal came; the state was saved.
  """
  with contextlib.ExitStack() as stack:
    r = _open(cfg, pathlib.Path(workdir), stack)
    with watchdog.StopSignal() as stop:
      stopped = _train(r, stop)
    if stopped:
      raise watchdog.Stopped(r.step)
    told = _evaluate(r)
    r.watchdog.beat()
    if processes.index() == 0:
      metrics.plot_loss(r.workdir)
    if cfg.sample.prompts:
      _sample(r)
    return told


def _open(
  cfg: config.Config, workdir: pathlib.Path, stack: contextlib.ExitStack
) -> Run:
  """Data, mesh and state, fresh or restored; `stack` closes what was opened."""
  assert jax.process_count() == processes.count(), 'see processes.join_job'
  _check_same({'config': json.loads(config.to_json(cfg))})
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  source = init_from.start_directory(cfg, workdir)
  leaves = None if source is None else init_from.read(cfg, source)
  corpus, tokenizer, windows = _data(cfg, source or workdir)
  before = None
  with processes.propagate_errors('workdir'):
    if processes.index() == 0:
      stack.enter_context(run_dir.held(workdir))
      before = run_dir.check(cfg, workdir)
      tokenizer.save(workdir / 'tokenizer.json')
  checkpoints = store.Store(workdir / 'checkpoints', cfg.checkpoint.keep)
  stack.callback(checkpoints.close)
  how = {'seed': cfg.seed, 'rows': cfg.train.microbatch_size}
  loader = loaders.Loader(corpus.train, tokenizer, cfg.data, **how)
  stack.callback(loader.close)
  resume = _step_to_resume(cfg, checkpoints, before)
  state, ema, extras = _state(trainer, checkpoints, resume, leaves)
  stack.callback(ema.close)
  progress = {'step': 0, 'tokens': 0}
  if resume is not None:
    data = run_dir.fingerprint(corpus, tokenizer)
    run_dir.check_fingerprint(data, extras['data'], workdir)
    progress = extras['progress']
    loader.set_state(extras['loader'])
    print(f'goes on after step {resume}', flush=True)
  writer = None
  with processes.propagate_errors('begin'):
    if processes.index() == 0:
      writer = _begin(cfg, workdir, checkpoints, resume, progress)
      stack.callback(writer.close)
  dog = watchdog.Watchdog(cfg.train.watchdog_seconds)
  stack.enter_context(dog)
  flop = flops.flops_per_token(cfg.model, cfg.data.seq_len)
  peak = metrics.peak_flops(cfg.train.peak_flops, trainer.mesh)
  return Run(
    cfg=cfg,
    workdir=workdir,
    trainer=trainer,
    corpus=corpus,
    tokenizer=tokenizer,
    windows=windows,
    loader=loader,
    checkpoints=checkpoints,
    writer=writer,
    meter=metrics.Throughput(flop, peak),
    watchdog=dog,
    ema=ema,
    state=state,
    **progress,
  )


def _begin(cfg, workdir, checkpoints, resume, progress) -> metrics.MetricWriter:
  """What only the first process does once nothing can be refused any more."""
  if resume is not None:
    for path in checkpoints.roll_back(resume):
      print(f'  moved aside: {path}', flush=True)
  # Not before: a start that ends above must find its request unanswered.
  run_dir.write_config(cfg, workdir)
  ended = progress['tokens'] >= cfg.train.total_tokens
  return metrics.MetricWriter(workdir, progress['step'], again=ended)


def _data(
  cfg: config.Config, workdir: pathlib.Path
) -> tuple[corpora.Corpus, tokenizers.Tokenizer, dict]:
  """Text, how it is cut into tokens, and the held-out windows."""
  with processes.propagate_errors('data'):
    corpus = corpora.open_corpus(cfg.data)
    tokenizer = run_dir.tokenizer(cfg.data, corpus, workdir)
    _check_tokens(cfg, tokenizer)
    windows = evaluate.open_windows(cfg, corpus, tokenizer)
  _check_same({'data': run_dir.fingerprint(corpus, tokenizer)})
  return corpus, tokenizer, windows


def _check_same(mine: dict) -> None:
  firsts = processes.broadcast('same', mine)
  with processes.propagate_errors('same'):
    run_dir.check_same(mine, firsts)


def _step_to_resume(
  cfg: config.Config, checkpoints: store.Store, before: int | None
) -> int | None:
  """The newest step, or the one asked for: once, not at every start."""
  wanted, newest = cfg.checkpoint.restore_step, checkpoints.latest()
  if wanted < 0 or (wanted == before and newest is not None):
    wanted = newest
  return processes.broadcast('resume', wanted)


def _state(
  trainer: steps.Trainer,
  checkpoints: store.Store,
  resume: int | None,
  leaves: init_from.Leaves | None,
) -> tuple[steps.State, ema.HostEma, dict]:
  """Fresh, with given weights or without; or restored, with nothing made."""
  cfg = trainer.cfg
  decay, key = cfg.optim.ema_decay, jax.random.key(cfg.seed)
  if resume is None:
    state = trainer.init(key)
    if leaves is not None:
      state = init_from.start(trainer, state, leaves)
    return state, ema.HostEma(decay, state['params']), {}
  shapes = steps.state_shapes(cfg)
  place = lambda shape, sharding: jax.ShapeDtypeStruct(
    shape.shape, shape.dtype, sharding=sharding
  )
  like = {'train': jax.tree.map(place, shapes, trainer.model_shardings())}
  like['ema'] = like['train']['params'] if decay else {}
  arrays, extras = checkpoints.restore(resume, like)
  state = trainer.from_model(arrays['train'])
  average = trainer.params_from_model(arrays['ema'])
  return state, ema.HostEma(decay, average), extras


def _check_tokens(cfg: config.Config, tokenizer: tokenizers.Tokenizer) -> None:
  """The vocabulary must fit, and so must what is sampled at the end."""
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise errors.InputError(
      f'model.vocab_size={cfg.model.vocab_size} must be >= '
      f'{tokenizer.vocab_size}, the entries of the tokenizer'
    )
  samples.check(cfg, tokenizer)


def _train(r: Run, stop: watchdog.StopSignal) -> bool:
  """Steps until the tokens are seen or, then true, a signal comes; saves."""
  cfg = r.cfg
  compiled, probe = r.trainer.jit(donate_argnums=0), r.trainer.jit()
  pending = None  # metrics of the last step, read once the next is under way
  saved, stopped = r.step, stop.requested and processes.count() == 1
  while r.tokens < cfg.train.total_tokens and not stopped:
    args, rows = _inputs(r)
    asked = processes.any_process(lambda: stop.requested, r.trainer.mesh)
    every = cfg.train.probe_every
    if every and r.step % every == 0:
      r.state, told = _run_twice(probe, r.state, args, r.step)
    else:
      r.state, told = compiled(r.state, *args)
    r.ema.update(r.state['params'])
    r.step, r.tokens = r.step + 1, r.tokens + rows * cfg.data.seq_len
    if pending is not None:
      _report(r, *pending)
    hyper = args[-1]
    pending = (r.step, r.tokens, rows, told | hyper)
    r.watchdog.beat()
    due = lambda every: every and r.step % every == 0
    if due(cfg.checkpoint.every_steps) or due(cfg.eval.every_steps):
      _report(r, *pending)  # a step that is not finite is neither saved
      pending = None
      # Before the save: what is told of a saved step is all written.
      if due(cfg.eval.every_steps) and r.tokens < cfg.train.total_tokens:
        told = evaluate.heldout(_evaluation(r))
        _write(r, 'eval', r.step, r.tokens, told)
        print(f'  held out: {told["bits_per_byte"]:.4f} bits per byte')
      if due(cfg.checkpoint.every_steps):
        _save(r)
        saved = r.step
      r.meter.restart()
      r.watchdog.beat()
    stopped = asked()
  if pending is not None:
    _report(r, *pending)
  if saved != r.step:
    _save(r)
  r.watchdog.beat()
  r.checkpoints.wait()
  r.watchdog.beat()
  return stopped


def _inputs(r: Run) -> tuple[tuple, int]:
  """Arguments of the next step, and how many sequences it trains on."""
  cfg = r.cfg
  rows = batch_ramp.batch_size_at(cfg.train, r.tokens)
  micro, most = cfg.train.microbatch_size, cfg.train.batch_size
  batches = [next(r.loader) for _ in range(rows // micro)]
  empty = jax.tree.map(np.zeros_like, batches[0])
  batches += [empty] * ((most - rows) // micro)
  stacked = {name: np.stack([b[name] for b in batches]) for name in empty}
  # Every process has all rows, and gives its devices theirs.
  place = functools.partial(_place, r.trainer.batch_sharding())
  batch_nBT = model.Batch(**{name: place(x) for name, x in stacked.items()})
  hyper = {
    'lr': lr_schedule.lr_at(cfg.optim.lr, r.step, r.tokens),
    'mtp_weight': lr_schedule.value_at(cfg.optim.mtp_weight, r.tokens),
    'bias_rate': lr_schedule.value_at(cfg.optim.bias_rate, r.tokens),
  }
  hyper = {name: jnp.float32(value) for name, value in hyper.items()}
  amount = r.trainer.plan.amount(rows // micro)
  return (batch_nBT, amount, hyper), rows


def _place(sharding: jax.sharding.Sharding, x: np.ndarray) -> jax.Array:
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def _run_twice(probe: Any, state: steps.State, args: tuple, step: int):
  """Silent-corruption probe: the same step twice must agree in every bit."""
  first, second = probe(state, *args), probe(state, *args)
  if not processes.compile_then_barrier(jax.jit(steps.same_bits))(
    first, second
  ):
    raise CorruptionError(
      f'step {step} gave different bits when run twice: suspect the hardware; '
      'the last checkpoint stands'
    )
  return first


def _report(r: Run, step: int, tokens: int, rows: int, told: dict) -> None:
  """Checks a finished step; every `log_every` steps, writes and prints it."""
  cfg = r.cfg
  told = {name: value.item() for name, value in told.items()}
  if told.pop('halted'):
    raise NonFiniteError(step, told)
  if told['skipped']:
    print(f'step {step}: loss {told["loss"]:.4f} is a spike, skipped')
  r.meter.add(rows * cfg.data.seq_len)
  if step % cfg.train.log_every and step != 1 and not told['skipped']:
    return
  speed = r.meter.read()
  r.meter.restart()
  _write(r, 'train', step, tokens, told | speed)
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


def _write(r: Run, kind: str, step: int, tokens: int, told: dict) -> None:
  if r.writer is not None:
    r.writer.write(kind, step, tokens, told)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def _save(r: Run) -> None:
  """Starts an asynchronous checkpoint of this very step."""
  extras = {
    'progress': {'step': r.step, 'tokens': r.tokens},
    'loader': r.loader.get_state(),
    'data': run_dir.fingerprint(r.corpus, r.tokenizer),
  }
  average = r.trainer.params_to_model(r.ema.tree())
  arrays = {'train': r.trainer.to_model(r.state), 'ema': average}
  r.checkpoints.save(r.step, arrays, extras)


def _evaluation(r: Run) -> evaluate.Evaluation:
  state = r.trainer.to_model(r.state)
  return evaluate.Evaluation(
    cfg=r.cfg,
    params=state['params'],
    router=state['router'],
    corpus=r.corpus,
    tokenizer=r.tokenizer,
    windows=r.windows,
    mesh=r.trainer.model_mesh,
    beat=r.watchdog.beat,
  )


def _evaluate(r: Run) -> dict[str, float]:
  """Held-out figures, baselines if asked."""
  told = evaluate.heldout(_evaluation(r))
  if r.cfg.eval.baselines:  # in every process, so that none waits for it
    told |= evaluate.compare(_evaluation(r))
  _write(r, 'eval', r.step, r.tokens, told)
  for name, value in told.items():
    print(f'{name:28} {value:12,.4f}')
  return told


def _sample(r: Run) -> None:
  """Writes and prints what `sample.prompts` go on with."""
  processes.barrier('sample')  # the first had more to do
  state = r.trainer.to_model(r.state)
  text = samples.make(r.cfg, state, r.tokenizer)
  if processes.index() == 0:
    (r.workdir / 'samples.txt').write_text(text, encoding='utf-8')
    print(samples.RULE + text + samples.RULE)
