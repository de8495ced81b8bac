"""A run's folder: one process at a time, one experiment, one tokenizer."""

import json
import pathlib
from typing import Any

from dsv3_jax import config, config_files, errors
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import tokenizer as tokenizers

# What may change when a run resumes; the rest is fixed by its first start.
_MAY_CHANGE = (
  'model.moe.buffer_factor',
  'train.total_tokens',
  'train.log_every',
  'train.probe_every',
  'train.watchdog_seconds',
  'train.peak_flops',
  'checkpoint.',
  'eval.',
  'sample.',
  'parallel.',
  # The fingerprint checks their content.
  'data.cache_dir',
  'data.source',
  'data.mixture',
  'data.max_epochs',
  'data.prepared',
  'data.bad_records',
  'data.on_change',
  'data.tokenizer',
)


def check(cfg: config.Config, workdir: pathlib.Path) -> int | None:
  """Checks that the run in `workdir`, if there is one, is this one.

  Returns:
    The `checkpoint.restore_step` of the start before, if there was one.

  Raises:
    InputError: a setting that a run may not change differs from its start's,
      or the file is damaged.
  """
  path, before = workdir / 'config.json', None
  if path.exists():
    old = flatten(config_files.read_json(path))
    before = old.get('checkpoint.restore_step')
    new = flatten(json.loads(config.to_json(cfg)))
    may_change = _MAY_CHANGE
    if cfg.balance.kind != 'batch':  # which is a loss of each micro-batch
      may_change += ('train.microbatch_size',)
    for name, value in new.items():
      if name.startswith(may_change) or old.get(name) == value:
        continue
      raise errors.InputError(
        f'{name}={value!r} differs from {old.get(name)!r} in {path}: name '
        'another --workdir, or keep the value'
      )
  return before


def check_same(mine: dict[str, Any], firsts: dict[str, Any]) -> None:
  """Checks that all processes of a job train the same on the same.

  Args:
    mine, firsts: nested settings of this process and of the first.

  Raises:
    InputError: they differ; names the first setting that does.
  """
  theirs = flatten(firsts)
  for name, value in flatten(mine).items():
    if theirs[name] != value:
      raise errors.InputError(
        f'{name}={value!r} differs from {theirs[name]!r} in process 0: all '
        'processes of a job need the same'
      )


def write_config(cfg: config.Config, workdir: pathlib.Path) -> None:
  """Writes `config.json`, which the next start is checked against."""
  path = workdir / 'config.json'
  scratch = workdir / '.config.json'
  scratch.write_text(config.to_json(cfg), encoding='utf-8')
  scratch.replace(path)


def tokenizer(
  cfg: config.DataConfig, corpus: corpora.Corpus, workdir: pathlib.Path
) -> tokenizers.Tokenizer:
  """The run's own tokenizer if it has one; else `data.tokenizer`.

  Raises:
    InputError: a damaged file, or `data.tokenizer` is not the run's any more.
  """
  path = workdir / 'tokenizer.json'
  if not path.exists():
    return corpora.load_tokenizer(cfg, corpus)
  own = tokenizers.Tokenizer.from_file(path)
  if cfg.tokenizer:
    given = tokenizers.Tokenizer.from_file(cfg.tokenizer)
    if given.text != own.text:
      raise errors.InputError(
        f'data.tokenizer={cfg.tokenizer!r} differs from {path}, with which the '
        'run began: name another --workdir, or restore the file'
      )
  return own


def flatten(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Nested dict -> dotted path: value."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
