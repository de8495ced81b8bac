"""The training loop: one straight line from config to samples (TR 4.2).

`run(cfg, workdir)` trains until `train.total_tokens` have been seen. If
`workdir` has a checkpoint, it resumes. A committed step of `checkpoints/` has
all that a resume needs: arrays, EMA, loader position, tokens seen. All
processes run this code. Only the first writes files, except for arrays:

  config.json  tokenizer.json  metrics.jsonl  TensorBoard events  checkpoints/
  and, at the end, loss.png and samples.txt
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.checkpoint import store
from dsv3_jax.data import batch_ramp, output_folder
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes, sharding
from dsv3_jax.nn import model
from dsv3_jax.planning import flops
from dsv3_jax.training import (
  ema,
  evaluate,
  feeds,
  goodput,
  init_from,
  lr_schedule,
  metrics,
  run_data,
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
class TrainingRun:
  """What lives as long as the run: data, state, writers, progress."""

  cfg: config.Config
  workdir: pathlib.Path
  trainer: steps.Trainer
  corpus: corpora.Corpus
  tokenizer: tokenizers.Tokenizer
  windows: dict  # held-out text, cut
  feed: feeds.Feed
  checkpoints: store.Store
  writer: metrics.MetricWriter | None  # in the first process
  meter: metrics.Throughput
  watchdog: watchdog.Watchdog
  goodput: goodput.Goodput
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
    run = _open(cfg, pathlib.Path(workdir), stack, goodput.Goodput())
    with watchdog.StopSignal() as stop:
      stopped = _train(run, stop)
    if stopped:
      raise watchdog.Stopped(run.step)
    scores = _evaluate(run)
    run.watchdog.beat()
    if processes.index() == 0:
      metrics.plot_loss(run.workdir)
    if cfg.sample.prompts:
      _sample(run)
    run.goodput.write()
    return scores


def _open(
  cfg: config.Config,
  workdir: pathlib.Path,
  stack: contextlib.ExitStack,
  times: goodput.Goodput,
) -> TrainingRun:
  """Opens data, mesh and state, fresh or restored; `stack` closes them."""
  assert jax.process_count() == processes.count(), 'see processes.join_job'
  run_data.check_same({'config': json.loads(config.to_json(cfg))})
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  source = init_from.start_directory(cfg, workdir)
  leaves = None if source is None else init_from.read(cfg, source)
  corpus, tokenizer, windows = run_data.open_data(cfg, source or workdir)
  before = None
  with processes.propagate_errors('workdir'):
    if processes.index() == 0:
      stack.enter_context(output_folder.held(workdir, 'workdir'))
      before = run_dir.check(cfg, workdir)
      tokenizer.save(workdir / 'tokenizer.json')
  checkpoints = store.Store(workdir / 'checkpoints', cfg.checkpoint.keep)
  stack.callback(checkpoints.close)
  resume = _step_to_resume(cfg, checkpoints, before)
  with processes.propagate_errors('goodput'):
    if processes.index() == 0:
      times.resume(workdir, resume)
  extras = {} if resume is None else checkpoints.extras(resume)
  feed = run_data.open_feed(cfg, corpus, tokenizer, extras, workdir)
  stack.callback(feed.close)
  state, ema = _state(trainer, checkpoints, resume, leaves)
  stack.callback(ema.close)
  progress = extras.get('progress', {'step': 0, 'tokens': 0})
  if resume is not None:
    print(f'goes on after step {resume}', flush=True)
  writer = None
  with processes.propagate_errors('begin'):
    if processes.index() == 0:
      writer = _begin(cfg, workdir, checkpoints, resume, progress)
      stack.callback(writer.close)
      run_data.write_skipped(corpus, workdir)
  dog = watchdog.Watchdog(cfg.train.watchdog_seconds)
  stack.enter_context(dog)
  flop = flops.flops_per_token(cfg.model, cfg.data.seq_len)
  peak = metrics.peak_flops(cfg.train.peak_flops, trainer.mesh)
  return TrainingRun(
    cfg=cfg,
    workdir=workdir,
    trainer=trainer,
    corpus=corpus,
    tokenizer=tokenizer,
    windows=windows,
    feed=feed,
    checkpoints=checkpoints,
    writer=writer,
    meter=metrics.Throughput(flop, peak),
    watchdog=dog,
    goodput=times,
    ema=ema,
    state=state,
    **progress,
  )


def _begin(cfg, workdir, checkpoints, resume, progress) -> metrics.MetricWriter:
  """Starts to write, in the first process, once all checks have passed."""
  if resume is not None:
    for path in checkpoints.roll_back(resume):
      print(f'  moved aside: {path}', flush=True)
  # Not before: a start that failed above must be able to ask again.
  run_dir.write_config(cfg, workdir)
  ended = progress['tokens'] >= cfg.train.total_tokens
  return metrics.MetricWriter(workdir, progress['step'], again=ended)


def _step_to_resume(
  cfg: config.Config, checkpoints: store.Store, before: int | None
) -> int | None:
  """The newest step, or `checkpoint.restore_step` when it is new."""
  wanted, newest = cfg.checkpoint.restore_step, checkpoints.latest()
  if wanted < 0 or (wanted == before and newest is not None):
    wanted = newest
  return processes.broadcast('resume', wanted)


def _state(
  trainer: steps.Trainer,
  checkpoints: store.Store,
  resume: int | None,
  leaves: init_from.Leaves | None,
) -> tuple[steps.State, ema.HostEma]:
  """A fresh state, with given weights if any; or a restored one."""
  cfg = trainer.cfg
  decay, key = cfg.optim.ema_decay, jax.random.key(cfg.seed)
  if resume is None:
    state = trainer.init(key)
    if leaves is not None:
      state = init_from.start(trainer, state, leaves)
    return state, ema.HostEma(decay, state['params'])
  shapes = steps.state_shapes(cfg)
  place = lambda shape, sharding: jax.ShapeDtypeStruct(
    shape.shape, shape.dtype, sharding=sharding
  )
  like = {'train': jax.tree.map(place, shapes, trainer.model_shardings())}
  like['ema'] = like['train']['params'] if decay else {}
  arrays, _ = checkpoints.restore(resume, like)
  state = trainer.from_model(arrays['train'])
  average = trainer.params_from_model(arrays['ema'])
  return state, ema.HostEma(decay, average)


def _train(run: TrainingRun, stop: watchdog.StopSignal) -> bool:
  """Trains to the end or to a signal, then true is returned; saves."""
  cfg = run.cfg
  compiled, probe = run.trainer.jit(donate_argnums=0), run.trainer.jit()
  pending = None  # metrics of the last step, read once the next is dispatched
  first = True
  saved, stopped = run.step, stop.requested and processes.count() == 1
  while run.tokens < cfg.train.total_tokens and not stopped:
    run.goodput.enter('input')
    args, rows = _inputs(run)
    busy = pending is not None and not pending[-1]['loss'].is_ready()
    run.goodput.enter('compile' if first else 'step', hidden=busy)
    first = False
    asked = processes.any_process(lambda: stop.requested, run.trainer.mesh)
    every = cfg.train.probe_every
    if every and run.step % every == 0:
      run.state, step_metrics = _run_twice(probe, run.state, args, run.step)
    else:
      run.state, step_metrics = compiled(run.state, *args)
    run.goodput.enter('step')
    run.ema.update(run.state['params'])
    run.step, run.tokens = run.step + 1, run.tokens + rows * cfg.data.seq_len
    if pending is not None:
      _report(run, *pending)
    hyper = args[-1]
    pending = (run.step, run.tokens, rows, step_metrics | hyper)
    run.watchdog.beat()
    due = lambda every: every and run.step % every == 0
    if due(cfg.checkpoint.every_steps) or due(cfg.eval.every_steps):
      _report(run, *pending)  # raises first: a non-finite step is not saved
      pending = None
      # Before the save: all metrics of a saved step are written.
      if due(cfg.eval.every_steps) and run.tokens < cfg.train.total_tokens:
        run.goodput.enter('evaluation')
        scores = evaluate.heldout(_evaluation(run))
        _write(run, 'eval', run.step, run.tokens, scores)
        print(f'  held out: {scores["bits_per_byte"]:.4f} bits per byte')
      if due(cfg.checkpoint.every_steps):
        _save(run)
        saved = run.step
      run.meter.restart()
      run.watchdog.beat()
    stopped = asked()
  if pending is not None:
    _report(run, *pending)
  if saved != run.step:
    _save(run)
  run.watchdog.beat()
  run.goodput.enter('save')
  run.checkpoints.wait()
  _write(run, 'goodput', run.step, run.tokens, run.goodput.write())
  run.watchdog.beat()
  return stopped


def _inputs(run: TrainingRun) -> tuple[tuple, int]:
  """Arguments of the next step, and how many sequences it trains on."""
  cfg = run.cfg
  rows = batch_ramp.batch_size_at(cfg.train, run.tokens)
  micro, most = cfg.train.microbatch_size, cfg.train.batch_size
  shape = (most // micro, micro, cfg.data.seq_len)
  arrays = run.feed.take(rows // micro, shape, run.trainer.batch_sharding())
  batch_nBT = model.Batch(**arrays)
  hyper = {
    'lr': lr_schedule.lr_at(cfg.optim.lr, run.step, run.tokens),
    'mtp_weight': lr_schedule.value_at(cfg.optim.mtp_weight, run.tokens),
    'bias_rate': lr_schedule.value_at(cfg.optim.bias_rate, run.tokens),
  }
  hyper = {name: jnp.float32(value) for name, value in hyper.items()}
  num_microbatches = run.trainer.num_microbatches(rows // micro)
  return (batch_nBT, num_microbatches, hyper), rows


def _run_twice(probe: Any, state: steps.State, args: tuple, step: int):
  """Silent-corruption probe: both results must agree in every bit."""
  first, second = probe(state, *args), probe(state, *args)
  if not processes.compile_then_barrier(jax.jit(steps.same_bits))(
    first, second
  ):
    raise CorruptionError(
      f'step {step} gave different bits when run twice: suspect the hardware; '
      'the last checkpoint stands'
    )
  return first


def _report(
  run: TrainingRun, step: int, tokens: int, rows: int, values: dict
) -> None:
  """Checks a finished step; every `log_every` steps, writes and prints it."""
  cfg = run.cfg
  values = {name: x.item() for name, x in values.items()}
  if values.pop('halted'):
    raise NonFiniteError(step, values)
  if values['skipped']:
    print(f'step {step}: loss {values["loss"]:.4f} is a spike, skipped')
  run.meter.add(rows * cfg.data.seq_len)
  if step % cfg.train.log_every and step != 1 and not values['skipped']:
    return
  speed = run.meter.read()
  run.meter.restart()
  _write(run, 'train', step, tokens, values | speed)
  _write(run, 'goodput', step, tokens, run.goodput.write())
  line = (
    f'step {step}  loss {values["loss"]:.4f}  mtp {values["mtp_loss"]:.4f}  '
    f'maxvio {values["max_violation"]:.2f}'
  )
  if speed:
    left = (cfg.train.total_tokens - tokens) / speed['tokens_per_second']
    line += (
      f'  {speed["tokens_per_second"]:,.0f} tokens/s  mfu {speed["mfu"]:.1%}'
      f'  eta {metrics.duration(left)}'
    )
  print(line, flush=True)


def _write(
  run: TrainingRun, kind: str, step: int, tokens: int, numbers: dict
) -> None:
  if run.writer is not None:
    run.writer.write(kind, step, tokens, numbers)


def _save(run: TrainingRun) -> None:
  """Starts an asynchronous checkpoint of this step."""
  run.goodput.enter('save')
  run.goodput.saved(run.step)
  run.goodput.write()  # before the commit: a kill may follow at once
  extras = {
    'progress': {'step': run.step, 'tokens': run.tokens},
    'loader': run.feed.get_state(),
    'loader_seed': run.feed.seed,
    'rows': run.feed.row,
    'data': run_data.fingerprint(run.corpus, run.tokenizer)
    | {'kept': run.feed.kept},
  }
  average = run.trainer.params_to_model(run.ema.tree())
  arrays = {'train': run.trainer.to_model(run.state), 'ema': average}
  run.checkpoints.save(run.step, arrays, extras)


def _evaluation(run: TrainingRun) -> evaluate.Evaluation:
  state = run.trainer.to_model(run.state)
  return evaluate.Evaluation(
    cfg=run.cfg,
    params=state['params'],
    router_biases=state['router'],
    corpus=run.corpus,
    tokenizer=run.tokenizer,
    windows=run.windows,
    mesh=run.trainer.model_mesh,
    beat=run.watchdog.beat,
  )


def _evaluate(run: TrainingRun) -> dict[str, float]:
  """Held-out scores, and baselines if `eval.baselines` asks for them."""
  run.goodput.enter('evaluation')
  scores = evaluate.heldout(_evaluation(run))
  if run.cfg.eval.baselines:  # in every process: they stay in step
    scores |= evaluate.compare(_evaluation(run))
  _write(run, 'eval', run.step, run.tokens, scores)
  for name, value in scores.items():
    print(f'{name:28} {value:12,.4f}')
  return scores


def _sample(run: TrainingRun) -> None:
  """Writes and prints continuations of `sample.prompts`."""
  processes.barrier('sample')  # the first process had more to do
  state = run.trainer.to_model(run.state)
  text = samples.make(run.cfg, state, run.tokenizer)
  if processes.index() == 0:
    (run.workdir / 'samples.txt').write_text(text, encoding='utf-8')
    print(samples.RULE + text + samples.RULE)
