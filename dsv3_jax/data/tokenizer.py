"""Byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens (TR 4.1).

The algorithm is that of Hugging Face `tokenizers`. This module adds the three
pre-tokenizer rules, the special tokens, and a guarantee: the text of a document
is never encoded as a special token, even if it spells one.
"""

import functools
import gzip
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax import errors
from dsv3_jax.data import (
  chat,
  chat_template,
  special_tokens,
  tokenizer_files,
)

BOS, SPECIAL = special_tokens.BOS, special_tokens.SPECIAL

# Up to three digits; runs of Chinese and Japanese; words, punctuation with the
# line ends that follow it, and white space.
SPLITS = (
  r'\p{N}{1,3}',
  '[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+',
  r'[!"#$%&' + r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
  '|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+'
  '| ?[\\p{P}\\p{S}]+[\r\n]*'
  r'|\s*[' + '\r\n' + r']+|\s+(?!\S)|\s+',
)
# Text that any other rules would split in another way.
_PROBE = (
  "def f(x_1=12345, *y):\n\n    return 'a'+x.b;  # 3.14 don't \t\r\n  \n"
  '\u4f60\u597d\u4e16\u754c2026\u5e74 \u3053\u3093abc \u30ab\u30bf!? '
  'Stra\u00dfe cafe\u0301 \u00bd\u20ac10 \u0663\u0664 \U0001f600  '
)
# A vocabulary is trained on at most so many characters: on every n-th document,
# with the smallest n that suffices.
_TRAIN_CHARS = 12_000_000
_BYTE_LEVEL = decoders.ByteLevel()
_LINE_ENDS = '\u010a\u010d'  # how byte-level BPE spells the bytes 10 and 13


class Tokenizer(special_tokens.SpecialTokens):
  """Encodes text as ids and back; has ids of special tokens as attributes."""

  def __init__(
    self,
    text: str,
    settings: tokenizer_files.TokenizerSettings | None = None,
  ):
    """Args:
    text: JSON text of a `tokenizer.json`.
    settings: of the files beside it; None: there are none.
    """
    spec = json.loads(text)
    self.text = text
    settings = settings or tokenizer_files.TokenizerSettings()
    super().__init__(tokenizers.Tokenizer.from_str(text), settings)
    self._full.no_truncation()
    self._full.no_padding()
    # Without added tokens, no text can match one. `add_bos` adds bos itself.
    none = dict.fromkeys(('post_processor', 'truncation', 'padding'))
    plain = spec | {'added_tokens': []} | none
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
    self.vocab_size = 1 + max(self._full.get_vocab().values())
    self.templates = chat_template.ChatTemplates(
      settings.templates, settings.origin
    )

  @classmethod
  def from_file(
    cls,
    path: str | pathlib.Path,
    settings: tokenizer_files.TokenizerSettings | None = None,
  ) -> 'Tokenizer':
    """Loads a `tokenizer.json`, plain or gzipped.

    Raises:
      InputError: the file, which the message names, cannot be read or is no
        tokenizer.
    """
    path = pathlib.Path(path)
    try:
      data = path.read_bytes()
      if path.suffix == '.gz':
        data = gzip.decompress(data)
      return cls(data.decode(), settings)
    except OSError as error:
      why = error.strerror or error
      raise errors.InputError(
        f'tokenizer {path} cannot be read: {why}'
      ) from error
    except (EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
      raise errors.InputError(
        f'tokenizer {path} is damaged: {error}'
      ) from error
    except (ValueError, TypeError, KeyError) as error:
      raise errors.InputError(f'tokenizer {path}: {error}') from error
    except Exception as error:  # `tokenizers` raises nothing narrower
      if type(error) is not Exception:
        raise
      raise errors.InputError(
        f'tokenizer {path} is no tokenizer: {error}'
      ) from error

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of its `tokenizer.json`."""
    return hashlib.sha256(self.text.encode()).hexdigest()

  def save(self, path: str | pathlib.Path) -> None:
    """Writes `tokenizer.json` atomically."""
    path = pathlib.Path(path)
    scratch = path.with_name(f'.{path.name}.{os.getpid()}')
    scratch.write_text(self.text, encoding='utf-8')
    scratch.replace(path)

  def encode(self, text: str, add_bos: bool = False) -> np.ndarray:
    """Encodes plain text as int32 ids, none of them of a special token.

    Args:
      add_bos: before it, if the tokenizer `adds_bos`.

    Raises:
      InputError: the text has a lone surrogate, which UTF-8 cannot encode.
    """
    chat.check_unicode(text, 'text')
    # A batch of one, as this call releases the GIL, unlike `encode`.
    batch = self._plain.encode_batch_fast([text], add_special_tokens=False)
    bos = [self.bos_id] if add_bos and self.adds_bos else []
    return np.array(bos + batch[0].ids, np.int32)

  def pieces(self, text: str) -> list[str]:
    """What BPE encodes one by one, in byte-level letters (`SPLITS`)."""
    rules = self._plain.pre_tokenizer
    pairs = [(text, ())] if rules is None else rules.pre_tokenize_str(text)
    return [piece for piece, _ in pairs]

  def decode(
    self, ids: Iterable[int] | np.ndarray, skip_special: bool = False
  ) -> str:
    """Decodes ids; bytes that are not UTF-8 become U+FFFD."""
    ids = [int(i) for i in ids]
    if skip_special:
      ids = [i for i in ids if i not in self.special_ids]
    return self._full.decode(ids, skip_special_tokens=False)

  def decode_answer(self, ids: Sequence[int]) -> str:
    """Decodes generated ids without special tokens and the eos at the end."""
    ends = bool(ids) and ids[-1] in self.eos_ids
    return self.decode(ids[:-1] if ends else ids, skip_special=True)

  def token_bytes(self, index: int) -> bytes:
    """The bytes that a token stands for; perhaps a part of a character."""
    token = self._full.id_to_token(index) or ''
    if index in self._added_ids or not _BYTE_OF.keys() >= set(token):
      return token.encode()
    return bytes(_BYTE_OF[letter] for letter in token)

  def encode_fim(self, prefix: str, suffix: str) -> np.ndarray:
    """The prompt for the text between two others (TR 4.1, PSM order)."""
    ids = [self.fim_begin_id, *self.encode(prefix)]
    ids += [self.fim_hole_id, *self.encode(suffix), self.fim_end_id]
    return np.array([self.bos_id] * self.adds_bos + ids, np.int32)

  def encode_chat(
    self,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, and which of them are targets of the loss.

    `chat` has the template. The answers, their calls of tools and the eos after
    each are targets.

    Raises:
      InputError: `chat.check` fails; or a tool's turn, and the tokenizer has no
        tokens for it.
    """
    chat.check(messages)
    ids, learned = [self.bos_id], [False]
    for text, special, target in chat.pieces(messages, add_generation_prompt):
      part = [self._id(text)] if special else self.encode(text).tolist()
      ids += part
      learned += [target] * len(part)
    return np.array(ids, np.int32), np.array(learned)

  def apply_chat_template(
    self,
    messages: Any,
    tools: Any = None,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> chat_template.ChatPrompt:
    """A conversation in the folder's chat template, else in that of `chat`.

    Special tokens of the template become their ids. Those that messages, tools
    or variables spell stay text, but for think tags.

    Args:
      messages: a list of objects with 'role' and what the template reads.
      tools: descriptions of functions, as OpenAI's clients send them.
      variables: of the template, such as `thinking` or `enable_thinking`.

    Raises:
      InputError: see `ChatTemplates.render` and `encode_chat`; or the built-in
        template would not read an argument.
    """
    if not self.templates:
      if unread := ['tools'] * bool(tools) + sorted(variables):
        raise errors.InputError(
          f'{unread[0]} is for a chat template that reads it: this model has '
          'the built-in one, which has neither tools nor variables'
        )
      ids = self.encode_chat(messages, add_generation_prompt)[0].tolist()
      return chat_template.ChatPrompt(ids, self.decode(ids))
    text, mark = self.templates.render(
      messages,
      tools,
      variables | {'add_generation_prompt': add_generation_prompt},
      self.settings.special_tokens,
      self._special_texts,
    )
    ids = self._encode_marked(text, mark)
    return chat_template.ChatPrompt(ids, text.replace(mark, ''))

  def _encode_marked(self, text: str, mark: str) -> list[int]:
    """Ids of a text whose special tokens are tokens, unless they are marked."""
    whole = self._full.encode_batch([text], add_special_tokens=False)[0]
    if mark not in text:
      return whole.ids
    ids, start = [], 0
    for index, (first, end) in zip(whole.ids, whole.offsets, strict=True):
      if index in self._added_ids:
        ids += self.encode(text[start:first].replace(mark, '')).tolist()
        ids.append(index)
        start = end
    return ids + self.encode(text[start:].replace(mark, '')).tolist()

  @functools.cached_property
  def splits_as_published(self) -> bool:
    """True if `pieces` splits text as the rules of DeepSeek-V3 do."""
    rules = _pre_tokenizer()
    want = [piece for piece, _ in rules.pre_tokenize_str(_PROBE)]
    return self.pieces(_PROBE) == want

  @functools.cached_property
  def punctuation_newlines(self) -> dict[int, np.ndarray]:
    """Tokens of punctuation and line ends -> the ids of their two parts.

    Training splits some of these tokens at random. Otherwise a prompt that ends
    before the line end would be out of distribution (TR 4.1).
    """
    pieces_of = {}
    for token, index in self._plain.get_vocab().items():
      head = token.rstrip(_LINE_ENDS)
      if head == token or not _is_punctuation(_BYTE_LEVEL.decode([head])):
        continue
      pieces = [self._pieces(part) for part in (head, token[len(head) :])]
      pieces_of[index] = np.array(sum(pieces, []), np.int32)
    return pieces_of

  @functools.cached_property
  def splittable_ids(self) -> np.ndarray:
    """Keys of `punctuation_newlines`, sorted."""
    return np.array(sorted(self.punctuation_newlines), np.int32)

  @functools.cached_property
  def tool_ids(self) -> dict[str, int]:
    """Ids of `chat.TOOLS`, as far as there are any."""
    ids = {token: self._full.token_to_id(token) for token in chat.TOOLS}
    return {token: i for token, i in ids.items() if i is not None}

  def _pieces(self, token: str) -> list[int]:
    """Ids of byte-level letters: one if the string is a token, or one each."""
    whole = self._plain.token_to_id(token)
    if whole is not None:
      return [whole]
    return [self._plain.token_to_id(letter) for letter in token]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  """`SPLITS`, then bytes as letters."""
  rules = [
    pre_tokenizers.Split(tokenizers.Regex(rule), 'isolated') for rule in SPLITS
  ]
  rules.append(
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  )
  return pre_tokenizers.Sequence(rules)


def _is_punctuation(text: str) -> bool:
  """True for punctuation and symbols only, after at most one space."""
  bare = text.removeprefix(' ')
  return bool(bare) and all(unicodedata.category(c)[0] in 'PS' for c in bare)


def train(
  texts: Sequence[str], vocab_size: int, tools: bool = False
) -> Tokenizer:
  """Trains a vocabulary of `vocab_size` entries, special tokens first.

  Reads every n-th text, with the smallest n for at most 12M characters.

  Args:
    tools: also with the special tokens of calls and outputs of tools.

  Raises:
    InputError: the texts do not have enough pairs for `vocab_size`.
  """
  total = sum(len(text) for text in texts)
  every = max(1, -(-total // _TRAIN_CHARS))
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = _pre_tokenizer()
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[*SPECIAL, *(chat.TOOLS if tools else ())],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(texts[::every], trainer)
  num_entries = bpe.get_vocab_size()
  if num_entries != vocab_size:
    raise errors.InputError(
      f'data.tokenizer_vocab={vocab_size} must be <= {num_entries}: the corpus '
      'has no more pairs to merge'
    )
  return Tokenizer(bpe.to_str())


def _byte_of() -> dict[str, int]:
  """Byte-level letters: a printable byte is its own, others follow U+0100."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [byte for byte in range(256) if byte not in printable]
  letters = {chr(byte): byte for byte in printable}
  return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()
