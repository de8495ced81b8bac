"""Kills a real training run at random moments and shows that nothing is lost.

  python -m benchmarks.kill_and_resume --kills=200

A tiny experiment trains in a process of its own, saving every second step; this
one kills it with SIGKILL, again and again: a random time after a step, when a
save begins, or a random time after a commit, in turn. After each kill every
committed step is hashed and the newest may not have gone back. The run then
goes on to its end, and its last checkpoint is compared, file contents and all,
with that of a run without kills.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax import config
from dsv3_jax.checkpoint import store
from dsv3_jax.training import loop, metrics
from dsv3_jax.training import step as steps
from experiments import quickstart

# Children are forks of a process that has imported JAX and not used it: that
# takes three seconds of the ten that one lives.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['dsv3_jax.training.loop', 'tensorboardX'])


def _train(folder: pathlib.Path, workdir: pathlib.Path) -> None:
  """What a child does."""
  with (folder / 'log.txt').open('a', encoding='utf-8') as log:
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
  jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  text = (folder / 'config.json').read_text(encoding='utf-8')
  loop.run(config.from_config_dict(json.loads(text)), workdir)


def kill_and_resume(
  cfg: config.Config, folder: pathlib.Path, kills: int, seed: int
) -> dict[str, int]:
  """Returns counts; raises AssertionError if anything was lost.

  Args:
    cfg: an experiment that saves often and keeps all steps.
    folder: empty, for both runs.
  """
  rng = random.Random(seed)
  (folder / 'config.json').write_text(config.to_json(cfg), encoding='utf-8')

  def start(workdir):
    child = FORKS.Process(target=_train, args=(folder, workdir))
    child.start()
    return child

  def finish(workdir):
    child = start(workdir)
    child.join()
    assert child.exitcode == 0, (folder / 'log.txt').read_text()[-2000:]

  reference, killed = folder / 'reference', folder / 'killed'
  start_time = time.monotonic()
  finish(reference)
  run_seconds = time.monotonic() - start_time
  counts = {'kills': 0, 'during_a_save': 0, 'finished_early': 0, 'newest': 0}
  newest = 0
  for signal_of in itertools.cycle((_progress, _unfinished, _committed)):
    if counts['kills'] == kills:
      break
    unfinished = _unfinished(killed)
    child = start(killed)
    _wait_for_change(child, signal_of, killed)
    if signal_of is not _unfinished:
      time.sleep(rng.uniform(0.0, 0.3 * run_seconds * rng.random()))
    child.kill()
    child.join()
    saving = bool(_unfinished(killed) - unfinished)
    if child.exitcode == 0:  # it came to its end first: begin a new run
      _compare(cfg, reference, killed)
      counts['finished_early'] += 1
      killed, newest = folder / f'killed{counts["finished_early"]}', 0
      continue
    counts['kills'] += 1
    counts['during_a_save'] += saving
    checkpoints = store.Store(killed / 'checkpoints', keep=10**6)
    assert (checkpoints.latest() or 0) >= newest, 'a committed step is gone'
    newest = checkpoints.latest() or 0
    for step in checkpoints.steps():
      checkpoints.verify(step)
    checkpoints.close()
    counts['newest'] = max(counts['newest'], newest)
    print(json.dumps(counts), flush=True)
  finish(killed)
  _compare(cfg, reference, killed)
  return counts


def _wait_for_change(
  child: Any, signal_of: Callable, workdir: pathlib.Path
) -> None:
  """Waits until the child changes what `signal_of` reads, or has ended."""
  before = signal_of(workdir)
  while child.is_alive() and signal_of(workdir) == before:
    time.sleep(0.005)


def _progress(workdir: pathlib.Path) -> float:
  """Changes with every metrics line that a run writes."""
  path = workdir / 'metrics.jsonl'
  return path.stat().st_mtime_ns if path.exists() else 0


def _unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
  """Saves that were begun and never committed."""
  hidden = (workdir / 'checkpoints').glob('.tmp-*')
  return {(path.name, path.stat().st_ctime_ns) for path in hidden}


def _committed(workdir: pathlib.Path) -> list[str]:
  """Names of the committed steps."""
  return sorted(path.name for path in (workdir / 'checkpoints').glob('[0-9]*'))


def _compare(
  cfg: config.Config, reference: pathlib.Path, killed: pathlib.Path
) -> None:
  """Checks that both runs ended in the same bits and logged the same losses."""
  state = steps.state_shapes(cfg)
  ema = state['params'] if cfg.optim.ema_decay else {}
  ends = []
  for workdir in (reference, killed):
    checkpoints = store.Store(workdir / 'checkpoints', keep=10**6)
    last = checkpoints.latest()
    arrays, extras = checkpoints.restore(last, {'train': state, 'ema': ema})
    checkpoints.close()
    bits = [x.tobytes() for x in jax.tree.leaves(arrays)]
    ends.append((last, bits, extras))
  assert ends[0] == ends[1], 'the killed run ended in other bits'
  losses = [
    [
      (line['step'], line['loss'])
      for line in metrics.read_metrics(w)
      if line['kind'] == 'train'
    ]
    for w in (reference, killed)
  ]
  assert losses[0] == losses[1], 'the killed run logged other losses'


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  source = quickstart.get_config('runlocal')
  with source.unlocked():
    source.train.update(log_every=1, total_tokens=8 * 64 * 40)
    source.checkpoint.update(every_steps=2, keep=1000)
  cfg = config.from_config_dict(source)
  with tempfile.TemporaryDirectory() as folder:
    counts = kill_and_resume(cfg, pathlib.Path(folder), args.kills, args.seed)
  print(json.dumps({'result': 'nothing lost'} | counts))
  return 0


if __name__ == '__main__':
  sys.exit(main())
