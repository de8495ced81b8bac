"""The training loop: one straight line from config to samples (TR 4.2).

`run(cfg, workdir)` trains until `train.total_tokens` have been seen, or resumes
where `workdir` stopped. Everything that a resumed run needs is in one committed
checkpoint: arrays, position of the loader, tokens seen. What it writes:

  config.json  tokenizer.json  metrics.jsonl  TensorBoard events
  checkpoints/  and, at the end, loss.png  samples.txt
"""

import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, evaluate, metrics, optim, sharding, supervise
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader as loaders
from dsv3_jax.planning import flops

_log = logging.getLogger(__name__)

# What may change when a run goes on; everything else is fixed by its first start.
_MAY_CHANGE = ('train.total_tokens', 'train.log_every', 'train.probe_every')
_MAY_CHANGE += ('train.watchdog_seconds', 'train.peak_flops', 'checkpoint.')
_MAY_CHANGE += ('eval.', 'sample.', 'mesh.', 'data.cache_dir')


class CorruptionError(RuntimeError):
  """The same step, run twice, gave different bits."""


def run(cfg: config.Config, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains; returns the final held-out figures.

  Raises:
    ValueError: bad input, before anything compiles.
    FloatingPointError: `(step, metrics)` of a non-finite loss; the state before
      that step is untouched and the last checkpoint stands.
    CorruptionError: the probe saw two results of one step.
    supervise.Stopped: a signal came; the state was saved.
  """
  # --- Workdir, data, mesh --------------------------------------------------
  workdir = pathlib.Path(workdir)
  claim_workdir(cfg, workdir)
  mesh = sharding.make_mesh(cfg.mesh)
  corpus = corpora.open_corpus(cfg.data)
  tokenizer = corpora.load_tokenizer(cfg.data, corpus)
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise ValueError(
      f'model.vocab_size={cfg.model.vocab_size} must be >= '
      f'{tokenizer.vocab_size}, the entries of the tokenizer'
    )
  tokenizer.save(workdir / 'tokenizer.json')
  loader = loaders.Loader(
    corpus.train,
    tokenizer,
    cfg.data,
    seed=cfg.seed,
    rows=cfg.train.microbatch_size // jax.process_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  # --- State, fresh or restored ---------------------------------------------
  checkpoints = store.Store(workdir / 'checkpoints', keep=cfg.checkpoint.keep)
  writer = metrics.MetricWriter(workdir)
  with jax.set_mesh(mesh):
    shardings = steps.state_shardings(cfg, mesh)
    init = functools.partial(steps.init_state, cfg)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(cfg.seed))
    ema = optim.HostEma(cfg.optim.ema_decay, state['params'])
    progress = {'step': 0, 'tokens': 0}
    resume_at = cfg.checkpoint.restore_step
    if resume_at < 0:
      resume_at = checkpoints.latest()
    if resume_at is not None:
      like = {'train': state, 'ema': ema.tree()}
      restored, extras = checkpoints.restore(resume_at, like)
      state, progress = restored['train'], extras['progress']
      ema.load(restored['ema'])
      loader.set_state(extras[f'loader_{jax.process_index()}'])
      _log.info('resumed at step %d', progress['step'])
    writer.truncate_after(progress['step'])

    # --- Compiled step ------------------------------------------------------
    step_fn = steps.make_train_step(cfg)
    compiled = jax.jit(step_fn, donate_argnums=0)
    probe = jax.jit(step_fn)
    place = functools.partial(jax.device_put, device=steps.batch_sharding(mesh))
    most_micro = cfg.train.batch_size // cfg.train.microbatch_size
    meter = metrics.Throughput(
      flops_per_token=flops.flops_per_token(cfg.model, cfg.data.seq_len),
      peak_flops=_peak_flops(cfg) * mesh.size,
    )

    def save():
      ema.flush()
      index = jax.process_index()
      extras = {'progress': progress, f'loader_{index}': loader.get_state()}
      arrays = {'train': state, 'ema': ema.tree()}
      checkpoints.save(progress['step'], arrays, extras)

    # --- The loop -----------------------------------------------------------
    pending = None  # metrics of the last step, read after the next is under way
    watchdog = supervise.Watchdog(cfg.train.watchdog_seconds)
    with watchdog, supervise.StopSignal() as stop:
      while progress['tokens'] < cfg.train.total_tokens:
        step, tokens = progress['step'], progress['tokens']
        rows = optim.batch_size_at(cfg.train, tokens)
        num_micro = rows // cfg.train.microbatch_size
        batch = _next_batch(loader, num_micro, most_micro, place)
        hyper = {
          'lr': np.float32(optim.lr_at(cfg.optim.lr, step, tokens)),
          'mtp_weight': np.float32(
            optim.value_at(cfg.optim.mtp_weight, tokens)
          ),
          'bias_rate': np.float32(optim.value_at(cfg.optim.bias_rate, tokens)),
        }
        args = (batch, jnp.int32(num_micro), hyper)
        if cfg.train.probe_every and step % cfg.train.probe_every == 0:
          state, told = _run_twice(probe, state, args, step)
        else:
          state, told = compiled(state, *args)
        ema.update(state['params'])
        progress = {
          'step': step + 1,
          'tokens': tokens + rows * cfg.data.seq_len,
        }
        if pending is not None:
          _report(cfg, *pending, meter, writer)
        pending = (progress, told, hyper)
        watchdog.beat()
        if stop.requested:
          break
        if progress['step'] % cfg.checkpoint.every_steps == 0:
          pending = _report(cfg, *pending, meter, writer)
          save()
        if (
          cfg.eval.every_steps and progress['step'] % cfg.eval.every_steps == 0
        ):
          pending = _report(cfg, *pending, meter, writer) if pending else None
          told = _evaluate(cfg, state, corpus, tokenizer)
          writer.write(progress['step'], progress['tokens'], told, 'eval')
          meter.pause()
          watchdog.beat()
      if pending is not None:
        _report(cfg, *pending, meter, writer)
      if checkpoints.latest() != progress['step']:
        checkpoints.wait()
        if checkpoints.latest() != progress['step']:
          save()
      checkpoints.close()
      if stop.requested:
        writer.close()
        raise supervise.Stopped(progress['step'])

    # --- Held-out loss, samples, picture --------------------------------------
    final = _evaluate(cfg, state, corpus, tokenizer)
    if cfg.eval.baselines:
      final |= evaluate.compare(_evaluation(cfg, state, corpus, tokenizer))
    writer.write(progress['step'], progress['tokens'], final, 'eval')
    writer.close()
    metrics.plot_loss(workdir)
    samples = _sample(cfg, state, tokenizer)
    (workdir / 'samples.txt').write_text(samples, encoding='utf-8')
    print(samples)
    ema.close()
    return final
