"""A real experiment that trains in seconds: text files, BPE, packing, all."""

import dataclasses
import pathlib
import sysconfig

from dsv3_jax import config
from dsv3_jax.checkpoint import store
from dsv3_jax.training import metrics
from dsv3_jax.training import step as steps
from experiments import quickstart

STEP_TOKENS = 4 * 32
_DOCUMENTS = 40


def write_corpus(folder):
  """Files of the standard library, 1 to 6 kB each; returns their glob."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  sized = (p for p in sorted(root.glob('*.py')) if p.stat().st_size > 1000)
  sources = list(sized)[:_DOCUMENTS]
  assert len(sources) == _DOCUMENTS
  for path in sources:
    text = path.read_text(encoding='utf-8')[:6000]
    (folder / f'{path.stem}.txt').write_text(text, encoding='utf-8')
  return f'{folder}/*.txt'


def overrides(folder, steps=40):
  """What differs from the quickstart's `runlocal`, by dotted name."""
  folder = pathlib.Path(folder)
  return {
    'data.source': write_corpus(folder / 'corpus'),
    'data.cache_dir': str(folder / 'cache'),
    'data.valid_fraction': 0.2,
    'data.seq_len': 32,
    'model.num_layers': 2,
    'model.d_model': 32,
    'eval.stride': 16,
    'eval.max_bytes': 2000,
    'train.batch_size': 4,
    'train.batch_size_start': 2,
    'train.batch_ramp_tokens': 10 * STEP_TOKENS,
    'train.batch_size_step': 2,
    'train.microbatch_size': 2,
    'train.total_tokens': tokens_after(steps),
    'train.log_every': 1,
    'checkpoint.every_steps': 0x7FFF,
    'checkpoint.keep': 10,
    'optim.bias_rate.first': 0.01,
    'optim.mtp_weight.first_tokens': 15 * STEP_TOKENS,
    'sample.max_new_tokens': 4,
  }


def tokens_after(steps):
  """Tokens seen by so many steps of the ramp: 2 rows, later 4."""
  seen = 0
  for _ in range(steps):
    seen += (2 if seen < 10 * STEP_TOKENS else 4) * 32
  return seen


def make(folder, **changes):
  """A checked `Config`; changes by dotted name with __ for a dot."""
  source = quickstart.get_config('runlocal')
  named = {name.replace('__', '.'): x for name, x in changes.items()}
  with source.unlocked():
    for name, value in (overrides(folder) | named).items():
      source.update_from_flattened_dict({name: value})
  return config.from_config_dict(source)


def until(cfg, steps, **axes):
  """The same experiment, ended after so many steps, on a mesh of `axes`."""
  tokens = tokens_after(steps)
  return dataclasses.replace(
    cfg,
    train=dataclasses.replace(cfg.train, total_tokens=tokens),
    parallel=dataclasses.replace(cfg.parallel, **axes),
  )


def committed(cfg, workdir, step):
  """Every array and document of a committed step."""
  checkpoints = store.Store(workdir / 'checkpoints', keep=10)
  like = steps.state_shapes(cfg)
  ema = like['params'] if cfg.optim.ema_decay else {}
  try:
    return checkpoints.restore(step, {'train': like, 'ema': ema})
  finally:
    checkpoints.close()


def read_metrics(workdir):
  """Lines of metrics.jsonl without the clock's."""
  clock = ('tokens_per_second', 'mfu')
  return [
    {k: v for k, v in line.items() if k not in clock}
    for line in metrics.read_metrics(workdir)
    if line['kind'] == 'train'
  ]
