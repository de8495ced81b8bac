"""Text corpora: documents by index, in a train part and a held-out part.

`data.source` is 'stdlib' (the running Python's standard library, about 30 MB of
code and prose, converted to a TFDS dataset at first use), 'tfds:NAME', or a
glob of .jsonl, .txt or .parquet files, all of them checked first (`files`). If
the source has no held-out split, a hash of a document's name decides whether it
is held out.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dsv3_jax import config, errors
from dsv3_jax.data import chat, files, mixture, tokenizer

_SUFFIXES = ('.py', '.txt', '.rst', '.md', '.pyi', '.toml', '.cfg')

# File sizes vary so much that a small held-out part may be far easier or harder
# than the corpus. This is the first number for which zlib and xz compress both
# parts equally well (docs/decisions/0005-held-out-split.md).
_SALT = b'4:'
_SHOWN = 3  # bad records, in the line that refuses them


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Both parts: sequences of `{'name': str, 'text': str}`.

  Records of chat data have 'messages' instead of 'text'. `fingerprint` changes
  with the documents: it depends on the files' names and content, or on the
  version and sizes of a TFDS dataset. `size_fingerprint` is that of release
  0.2, of names and sizes, or ''. `faults` describes records that were skipped,
  `num_skipped` counts them. `tool_turns` is the first place with a turn of a
  tool, or ''.
  """

  train: Sequence[dict[str, Any]]
  valid: Sequence[dict[str, Any]]
  fingerprint: str
  size_fingerprint: str = ''
  faults: Sequence[str] = ()
  num_skipped: int = 0
  tool_turns: str = ''


def open_corpus(cfg: config.DataConfig) -> Corpus:
  """Opens `data.source`, or the sources of `data.mixture`.

  Raises:
    InputError: there are no such files, a part is empty, or records are bad and
      `data.bad_records` is 'refuse'.
  """
  corpus = _open_mixture(cfg) if cfg.mixture else _open_source(cfg)
  _check_parts(cfg, corpus, ('train', 'valid'))
  return corpus


def _open_source(cfg: config.DataConfig) -> Corpus:
  if cfg.source == 'stdlib':
    return _open_stdlib(cfg)
  if cfg.source.startswith('tfds:'):
    return _open_tfds(cfg)
  return _open_files(cfg)


def _check_parts(
  cfg: config.DataConfig, corpus: Corpus, parts: Sequence[str]
) -> None:
  """Checks that parts of a corpus have documents."""
  skipped = corpus.num_skipped
  for part in parts:
    if not len(getattr(corpus, part)):
      what = f'data.source={cfg.source!r}' if cfg.source else 'data.mixture'
      raise errors.InputError(
        f'{what} has no {part} documents at '
        f'data.valid_fraction={cfg.valid_fraction}'
        + (f', {skipped:,} bad records left out' if skipped else '')
      )


def _open_mixture(cfg: config.DataConfig) -> Corpus:
  """All sources, each split into its own parts."""
  if cfg.source:
    raise errors.InputError(
      f"data.source={cfg.source!r} must be '' if data.mixture names the sources"
    )
  sources = mixture.parse(cfg.mixture)
  opened = []
  for source in sources:
    alone = dataclasses.replace(cfg, source=source.documents, mixture=())
    opened.append(_open_source(alone))
    _check_parts(alone, opened[-1], ('train',))
  pairs = list(zip(sources, opened, strict=True))
  join = lambda part: mixture.Mixture(
    [dataclasses.replace(s, documents=getattr(x, part)) for s, x in pairs]
  )
  marks = [(s.name, s.share, x.fingerprint) for s, x in pairs]
  return Corpus(
    train=join('train'),
    valid=join('valid'),
    fingerprint='mixture:' + hashlib.sha256(repr(marks).encode()).hexdigest(),
    faults=[fault for x in opened for fault in x.faults],
    num_skipped=sum(x.num_skipped for x in opened),
    tool_turns=next((x.tool_turns for x in opened if x.tool_turns), ''),
  )


def load_tokenizer(
  cfg: config.DataConfig, corpus: Corpus
) -> tokenizer.Tokenizer:
  """Loads `data.tokenizer`, or trains one on the train part and caches it."""
  if cfg.tokenizer:
    return tokenizer.Tokenizer.from_file(cfg.tokenizer)
  key = (corpus.fingerprint, cfg.text_key, cfg.tokenizer_vocab)
  key += (cfg.valid_fraction, _SALT, tokenizer.SPECIAL, tokenizer.SPLITS)
  tools = bool(corpus.tool_turns)
  key += chat.TOOLS if tools else ()
  path = cache_dir(cfg) / f'tokenizer-{_mark(key)}.json'
  if not path.exists():
    with _alone(path.with_suffix('.lock')):
      if not path.exists():  # another process may have trained it meanwhile
        texts = _Texts(corpus.train)
        trained = tokenizer.train(texts, cfg.tokenizer_vocab, tools)
        try:
          trained.save(path)
        except OSError as error:
          raise _unwritable(path.parent, error) from error
  return tokenizer.Tokenizer.from_file(path)


def check_tokens(
  corpus: Corpus, tokenizer: tokenizer.Tokenizer, vocab_size: int
) -> None:
  """Checks that corpus, tokenizer and the model's vocabulary fit each other.

  Raises:
    InputError: they do not.
  """
  tokenizer.check_training()
  if corpus.tool_turns:
    tokenizer.check_tools(corpus.tool_turns)
  if tokenizer.vocab_size > vocab_size:
    raise errors.InputError(
      f'model.vocab_size={vocab_size} must be >= {tokenizer.vocab_size}, the '
      'entries of the tokenizer'
    )


@dataclasses.dataclass(frozen=True)
class _Texts(Sequence):
  """The texts of documents, which are read on demand."""

  documents: Sequence[dict[str, Any]]

  def __len__(self) -> int:
    return len(self.documents)

  def __getitem__(self, i: int | slice) -> str | list[str]:
    if isinstance(i, slice):
      return [self[at] for at in range(*i.indices(len(self)))]
    return document_text(self.documents[i])


def document_text(record: dict[str, Any]) -> str:
  """A record's text; the turns of a conversation, one after the other."""
  if 'messages' in record:
    return chat.plain_text(record['messages'])
  return record['text']


def cache_dir(cfg: config.DataConfig) -> pathlib.Path:
  """`data.cache_dir`, or dsv3_jax under the user's cache folder."""
  if cfg.cache_dir:
    return pathlib.Path(cfg.cache_dir).expanduser()
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home) / 'dsv3_jax'


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock file, so that one process at a time does the work.

  Raises:
    InputError: the cache cannot be written, or its file system has no locks.
  """
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(path.open('w', encoding='utf-8'))
      fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
      raise _unwritable(path.parent, error) from error
    yield


def _unwritable(folder: pathlib.Path, error: OSError) -> errors.InputError:
  return errors.InputError(
    f'data.cache_dir: {folder} cannot be written ({error.strerror}): name '
    'another'
  )


def _mark(key: Any) -> str:
  return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def is_held_out(name: str, fraction: float) -> bool:
  """Splits by name, independently of other documents and their order."""
  digest = hashlib.sha256(_SALT + name.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


def _split(
  records: Any, names: Iterator[str], fraction: float, mark: str
) -> Corpus:
  held = np.fromiter((is_held_out(name, fraction) for name in names), bool)
  parts = (mixture.Subset(records, np.flatnonzero(x)) for x in (~held, held))
  return Corpus(*parts, mark)


def _open_files(cfg: config.DataConfig) -> Corpus:
  cache = cache_dir(cfg)
  with contextlib.ExitStack() as stack:
    # One process checks, others find the result. Without a cache, each checks.
    with contextlib.suppress(errors.InputError):
      key = _mark((cfg.source, cfg.text_key))
      stack.enter_context(_alone(cache / 'scans' / f'{key}.lock'))
    records = files.open_glob(cfg.source, cfg.text_key, cache)
  faults, num_bad = records.faults(), records.num_bad
  if num_bad and cfg.bad_records == 'refuse':
    more = num_bad - len(faults[:_SHOWN])
    raise errors.InputError(
      f'data.source={cfg.source!r} has {num_bad:,} bad '
      f'record{"s" if num_bad > 1 else ""}: '
      f'{"; ".join(faults[:_SHOWN])}{f"; and {more:,} more" if more else ""}: '
      "correct them, or leave them out by data.bad_records='skip'"
    )
  names = map(records.name, range(len(records)))
  corpus = _split(records, names, cfg.valid_fraction, records.fingerprint())
  return dataclasses.replace(
    corpus,
    size_fingerprint=records.size_fingerprint(),
    faults=faults,
    num_skipped=num_bad,
    tool_turns=records.tool_turns(),
  )


def stdlib_documents(root: pathlib.Path) -> Iterator[tuple[str, str]]:
  """(relative path, text) of every UTF-8 text file, sorted by path."""
  for path in sorted(root.rglob('*')):
    parts = path.relative_to(root).parts
    if path.suffix not in _SUFFIXES or not path.is_file():
      continue
    if {'site-packages', 'dist-packages', '__pycache__'} & set(parts):
      continue
    try:
      text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError:
      continue  # the library tests decoders with files in other encodings
    if text.strip():
      yield '/'.join(parts), text


class StdlibText(tfds.core.GeneratorBasedBuilder):
  """The running Python's standard library as documents."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {
    '1.0.0': 'Source and prose files, split by a salted hash of the path.'
  }

  def __init__(self, *, valid_fraction: float, **kwargs: Any):
    self._valid_fraction = valid_fraction
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'name': text, 'text': text})
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {part: self._generate_examples(part) for part in ('train', 'valid')}

  def _generate_examples(self, part: str) -> Iterator[tuple[str, dict]]:
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    for name, text in stdlib_documents(root):
      held_out = is_held_out(name, self._valid_fraction)
      if held_out == (part == 'valid'):
        yield name, {'name': name, 'text': text}


@dataclasses.dataclass(frozen=True)
class _TfdsRecords(Sequence):
  """A TFDS data source with text as str."""

  source: Any
  text_key: str
  title: str

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    if not 0 <= i < len(self):
      raise IndexError(i)
    record, place = self.source[i], self.place(i)
    try:
      name = _text(record.get('name', place))
      return {'name': name, 'text': _text(record[self.text_key])}
    except UnicodeDecodeError as error:
      raise errors.InputError(f'{place}: not UTF-8') from error

  def place(self, i: int) -> str:
    """Where a record is, for messages."""
    return f'{self.title}#{i}'


def _text(value: bytes | str) -> str:
  return value if isinstance(value, str) else value.decode()


def _open_stdlib(cfg: config.DataConfig) -> Corpus:
  """Prepares the dataset once for each library, fraction and set of rules."""
  version = '.'.join(map(str, sys.version_info[:3]))
  key = (sysconfig.get_paths()['stdlib'], cfg.valid_fraction, _SALT, _SUFFIXES)
  folder = cache_dir(cfg) / f'stdlib-{version}-{_mark(key)}'
  with _alone(folder / '.lock'):
    builder = StdlibText(
      valid_fraction=cfg.valid_fraction,
      data_dir=folder,
      file_format='array_record',
    )
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=settings)
  records = lambda part: _TfdsRecords(
    builder.as_data_source(split=part), 'text', 'stdlib'
  )
  mark = _tfds_mark(builder) + version
  return Corpus(records('train'), records('valid'), mark)


def _open_tfds(cfg: config.DataConfig) -> Corpus:
  """Any dataset that TFDS can read without TensorFlow (array_record files)."""
  title = cfg.source.removeprefix('tfds:')
  home = cache_dir(cfg) / 'tfds'
  try:
    builder = tfds.builder(title, data_dir=home, file_format='array_record')
    with _alone(home / '.lock'):
      builder.download_and_prepare()
  except errors.InputError:
    raise
  except Exception as error:  # a dataset's code may raise anything
    why = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise errors.InputError(
      f'data.source={cfg.source!r} cannot be prepared: {why}'
    ) from error
  fields, splits = builder.info.features.items(), builder.info.splits
  known = [name for name, x in fields if isinstance(x, tfds.features.Text)]
  if cfg.text_key not in known:
    raise errors.InputError(
      f'data.text_key={cfg.text_key!r} is no field of text in {title}; it has: '
      f'{", ".join(known)}'
    )
  if 'train' not in splits:
    raise errors.InputError(
      f"data.source={cfg.source!r} has no split 'train'; it has: "
      f'{", ".join(splits)}'
    )
  records = lambda part: _TfdsRecords(
    builder.as_data_source(split=part), cfg.text_key, title
  )
  for held in ('validation', 'valid', 'test'):
    if held in splits:
      return Corpus(records('train'), records(held), _tfds_mark(builder))
  train = records('train')
  names = (f'{title}#{i}' for i in range(len(train)))
  return _split(train, names, cfg.valid_fraction, _tfds_mark(builder))


def _tfds_mark(builder: Any) -> str:
  """Version and sizes of the prepared dataset."""
  sizes = [
    f'{name}:{split.num_examples}:{split.num_bytes}'
    for name, split in sorted(builder.info.splits.items())
  ]
  return ' '.join([builder.info.full_name, *sizes, ''])
