"""A run's data: corpus, tokenizer, held-out windows, and the training stream.

A checkpoint has the stream's position, its seed, and digests of corpus and
tokenizer. A run goes on from the position if these are the same. On another
corpus, if `data.on_change` is 'continue', it starts a new stream at that step.
"""

import hashlib
import pathlib
from typing import Any

import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader as loaders
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes
from dsv3_jax.training import evaluate, run_dir, samples


def open_data(
  cfg: config.Config, workdir: pathlib.Path
) -> tuple[corpora.Corpus, tokenizers.Tokenizer, dict]:
  """Corpus, tokenizer, and the held-out windows, the same in all processes.

  Raises:
    InputError: bad data, or it does not fit the model.
  """
  with processes.propagate_errors('data'):
    corpus = corpora.open_corpus(cfg.data)
    tokenizer = run_dir.tokenizer(cfg.data, corpus, workdir)
    _check_tokens(cfg, corpus, tokenizer)
    windows = evaluate.open_windows(cfg, corpus, tokenizer)
  check_same({'data': fingerprint(corpus, tokenizer)})
  return corpus, tokenizer, windows


def check_same(mine: dict) -> None:
  """Checks that all processes of a job have the same settings.

  Raises:
    InputError: they do not.
  """
  firsts = processes.broadcast('same', mine)
  with processes.propagate_errors('same'):
    run_dir.check_same(mine, firsts)


def fingerprint(
  corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer
) -> dict[str, str]:
  """What the order of the training data depends on, for the checkpoint."""
  digest = hashlib.sha256(tokenizer.text.encode()).hexdigest()
  return {'corpus': corpus.fingerprint, 'tokenizer': digest}


def open_loader(
  cfg: config.Config,
  corpus: corpora.Corpus,
  tokenizer: tokenizers.Tokenizer,
  extras: dict[str, Any],
  workdir: pathlib.Path,
) -> loaders.Loader:
  """The stream of training data, at the position of a checkpoint.

  Args:
    extras: of the checkpoint; empty in a new run.

  Raises:
    InputError: the data is not that of the checkpoint.
  """
  seed, same = cfg.seed, True
  if extras:
    now = fingerprint(corpus, tokenizer)
    same = is_same(cfg, now, extras, corpus.size_fingerprint, workdir)
    step = extras['progress']['step']
    # Release 0.2 had no seed of its own.
    seed = extras.get('loader_seed', cfg.seed) if same else _seed(cfg, step)
  rows = cfg.train.microbatch_size
  loader = loaders.Loader(
    corpus.train, tokenizer, cfg.data, seed=seed, rows=rows
  )
  if extras and same:
    loader.set_state(extras['loader'])
  elif not same:
    print(
      f'the corpus changed: from step {step + 1} on, the run reads the new one '
      f'from its beginning, shuffled with seed {seed}',
      flush=True,
    )
  return loader


def is_same(
  cfg: config.Config,
  now: dict[str, str],
  extras: dict[str, Any],
  size_fingerprint: str,
  workdir: pathlib.Path,
) -> bool:
  """True if the corpus is that of a checkpoint, false if it may be another.

  Args:
    now: `fingerprint`.
    extras: of the checkpoint.
    size_fingerprint: the corpus' digest as release 0.2 made it, or ''.

  Raises:
    InputError: the tokenizer is another; or the corpus is, and `data.on_change`
      is 'refuse'.
  """
  then, step = extras['data'], extras['progress']['step']
  if now['tokenizer'] != then['tokenizer']:
    raise errors.InputError(
      f'the tokenizer is {now["tokenizer"]!r}, but {workdir} was trained with '
      f'{then["tokenizer"]!r}: restore it, or name another --workdir'
    )
  if then['corpus'] in (now['corpus'], size_fingerprint or None):
    return True
  if cfg.data.on_change == 'continue':
    return False
  raise errors.InputError(
    f'the corpus is {now["corpus"]!r}, but {workdir} was trained with '
    f'{then["corpus"]!r}: restore it, go on with the new one after step {step} '
    "by data.on_change='continue', or name another --workdir"
  )


def write_skipped(corpus: corpora.Corpus, workdir: pathlib.Path) -> None:
  """Lists the records that were left out in `skipped_records.txt`."""
  path = workdir / 'skipped_records.txt'
  path.unlink(missing_ok=True)
  if not corpus.num_skipped:
    return
  lines = [f'{fault}\n' for fault in corpus.faults]
  path.write_text(''.join(lines), encoding='utf-8')
  plural = 's' if corpus.num_skipped > 1 else ''
  print(
    f'left out {corpus.num_skipped:,} bad record{plural} of data.source, '
    f'listed in {path}; the first: {corpus.faults[0]}',
    flush=True,
  )


def _seed(cfg: config.Config, step: int) -> int:
  """The seed of a stream that starts after so many steps."""
  sequence = np.random.SeedSequence([cfg.seed, step])
  return int(sequence.generate_state(1)[0])


def _check_tokens(
  cfg: config.Config, corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer
) -> None:
  """Checks that corpus, tokenizer, prompts and model fit each other."""
  tokenizer.check_training()
  if corpus.tool_turns:
    tokenizer.check_tools(corpus.tool_turns)
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise errors.InputError(
      f'model.vocab_size={cfg.model.vocab_size} must be >= '
      f'{tokenizer.vocab_size}, the entries of the tokenizer'
    )
  samples.check(cfg, tokenizer)
