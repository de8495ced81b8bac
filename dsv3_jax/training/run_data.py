"""A run's data: corpus, tokenizer, held-out windows, and the training stream.

A checkpoint has the stream's position, its seed, and digests of corpus and
tokenizer. A run goes on from the position if these are the same. On another
corpus, if `data.on_change` is 'continue', it starts a new stream at that step.
The stream is read and packed by every process, or comes from `data.prepared`.
"""

import pathlib
from typing import Any

import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.data import batch_ramp, output_folder, prepare, shards
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader as loaders
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes
from dsv3_jax.training import evaluate, feeds, run_dir, samples


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
    corpora.check_tokens(corpus, tokenizer, cfg.model.vocab_size)
    samples.check(cfg, tokenizer)
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
  return {'corpus': corpus.fingerprint, 'tokenizer': tokenizer.digest}


def open_feed(
  cfg: config.Config,
  corpus: corpora.Corpus,
  tokenizer: tokenizers.Tokenizer,
  extras: dict[str, Any],
  workdir: pathlib.Path,
) -> feeds.Feed:
  """The rows of training, from the position of a checkpoint on.

  Args:
    extras: of the checkpoint; empty in a new run.

  Raises:
    InputError: the data is not that of the checkpoint; or `data.prepared` is
      damaged, has other rows, or too few.
  """
  seed, same = cfg.seed, True
  if extras:
    now = fingerprint(corpus, tokenizer)
    same = is_same(cfg, now, extras, corpus.size_fingerprint, workdir)
    step = extras['progress']['step']
    # Release 0.2 had no seed of its own.
    seed = extras.get('loader_seed', cfg.seed) if same else _seed(cfg, step)
  tokens = extras['progress']['tokens'] if extras else 0
  extras = extras if same else {}
  row = 0
  if extras:  # release 0.2 had one stream, and did not count its rows
    row = extras.get('rows', tokens // cfg.data.seq_len)
  if cfg.data.prepared:
    now = prepare.settings(cfg.data, seed, corpus, tokenizer)
    feed = _open_prepared(cfg, now, row, tokens)
  elif cfg.data.selects or cfg.data.max_epochs:
    raise errors.InputError(
      'data.filters, data.dedup and data.max_epochs take effect in dsv3 '
      'prepare only: name its folder in data.prepared'
    )
  else:
    rows = cfg.train.microbatch_size
    stream = loaders.Loader(
      corpus.train, tokenizer, cfg.data, seed=seed, rows=rows
    )
    feed = feeds.StreamFeed(stream, row)
    if extras:
      _check_position(extras, workdir)
      feed.set_state(extras['loader'])
  then = extras.get('data', {}).get('kept', '')
  if extras and then != feed.kept:
    raise errors.InputError(
      f'data.prepared={cfg.data.prepared!r} keeps other documents than those '
      f'of {workdir}: restore the folder, or name another --workdir'
    )
  if not same:
    print(
      f'the corpus changed: from step {step + 1} on, the run reads the new one '
      f'from its beginning, shuffled with seed {seed}',
      flush=True,
    )
  return feed


def _check_position(extras: dict[str, Any], workdir: pathlib.Path) -> None:
  if not extras['loader']:
    raise errors.InputError(
      f'data.prepared is empty, but {workdir} has read prepared rows, whose '
      'place in the corpus is not known: name the folder again'
    )


def _open_prepared(
  cfg: config.Config, settings: dict[str, Any], row: int, tokens: int
) -> feeds.PreparedFeed:
  """The feed of `data.prepared`, the same in all processes.

  Args:
    settings: that its rows must have.
    row: the first to read.
    tokens: that the run has seen.
  """
  needed = row + batch_ramp.rows_of_run(cfg.train, cfg.data.seq_len, tokens)
  with processes.propagate_errors('prepared'):
    folder = shards.Folder(pathlib.Path(cfg.data.prepared).expanduser())
    output_folder.check_settings(folder.path, folder.settings, settings)
    if len(folder) < needed:
      raise errors.InputError(
        f'data.prepared={cfg.data.prepared!r} has {len(folder):,} rows, but '
        f'the run needs {needed:,}: add the others by dsv3 prepare '
        f'--output={cfg.data.prepared} --rows={needed}'
      )
    folder.check_sizes(row, needed)
  check_same({'data.prepared': folder.digest})
  seed = settings['seed']
  return feeds.PreparedFeed(folder, cfg.data.isolate_samples, seed, row)


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
