"""Kills a real training run at random moments and shows that nothing is lost.

  python -m benchmarks.kill_and_resume --kills=200

A tiny experiment trains in a process of its own, saving every second step; this
one kills it with SIGKILL after a random time, again and again. After each kill
every committed step is hashed and the newest may not have gone back. The run
then goes on to its end, and its last checkpoint is compared, file contents and
all, with that of a run without kills.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax

from dsv3_jax import config
from dsv3_jax.checkpoint import store
from dsv3_jax.training import metrics
from dsv3_jax.training import step as steps
from experiments import quickstart

_CHILD = """
import json, sys
from dsv3_jax import config
from dsv3_jax.training import loop
cfg = config.from_config_dict(json.load(open(sys.argv[1])))
loop.run(cfg, sys.argv[2])
"""


def kill_and_resume(
  cfg: config.Config, folder: pathlib.Path, kills: int, seed: int
) -> dict[str, int]:
  """Returns counts; raises AssertionError if anything was lost.

  Args:
    cfg: an experiment that saves often and keeps all steps.
    folder: empty, for both runs.
  """
  rng = random.Random(seed)
  config_path = folder / 'config.json'
  config_path.write_text(config.to_json(cfg), encoding='utf-8')
  env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}
  env |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  def start(workdir):
    log = (folder / 'log.txt').open('a', encoding='utf-8')
    with log:
      args = [sys.executable, '-c', _CHILD, str(config_path), str(workdir)]
      return subprocess.Popen(args, env=env, stdout=log, stderr=log)

  reference, killed = folder / 'reference', folder / 'killed'
  start_time = time.monotonic()
  log = folder / 'log.txt'
  assert start(reference).wait() == 0, log.read_text()[-2000:]
  run_seconds = time.monotonic() - start_time
  counts = {'kills': 0, 'during_a_save': 0, 'finished_early': 0, 'newest': 0}
  newest = 0
  while counts['kills'] < kills:
    unfinished = _unfinished(killed)
    child = start(killed)
    # Most time passes before the first step: wait for a line of this child.
    lines = _progress(killed)
    while child.poll() is None and _progress(killed) == lines:
      time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3 * run_seconds * rng.random()))
    child.send_signal(signal.SIGKILL)
    code = child.wait()
    saving = bool(_unfinished(killed) - unfinished)
    if code == 0:  # it came to its end first: begin a new run
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
  assert start(killed).wait() == 0, log.read_text()[-2000:]
  _compare(cfg, reference, killed)
  return counts


def _progress(workdir: pathlib.Path) -> float:
  """Changes with every metrics line that a run writes."""
  path = workdir / 'metrics.jsonl'
  return path.stat().st_mtime_ns if path.exists() else 0


def _unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
  """Saves that were begun and never committed."""
  hidden = (workdir / 'checkpoints').glob('.tmp-*')
  return {(path.name, path.stat().st_ctime_ns) for path in hidden}


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
