"""The special tokens of a tokenizer: DeepSeek-V3's (TR 4.1), or a folder's."""

import functools

import tokenizers

from dsv3_jax import errors
from dsv3_jax.data import chat, tokenizer_files

BOS, PAD = tokenizer_files.BOS, tokenizer_files.PAD
FIM_HOLE = '<\uff5cfim\u2581hole\uff5c>'
FIM_BEGIN = '<\uff5cfim\u2581begin\uff5c>'
FIM_END = '<\uff5cfim\u2581end\uff5c>'
EOT = '<|EOT|>'
# In the order of the published ids.
SPECIAL = (BOS, chat.EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
SPECIAL += (chat.USER, chat.ASSISTANT, EOT)
_THINK_TAGS = ('<think>', '</think>')  # of a reasoning model: text


class SpecialTokens:
  """Ids of special tokens; those that a tokenizer lacks raise when asked for.

  bos_id, eos_id, pad_id: of the tokens that `settings` names.
  fim_hole_id, fim_begin_id, fim_end_id: of fill-in-the-middle.
  user_id, assistant_id: of DeepSeek-V3's chat format.

  Each raises InputError, which names the token.
  """

  def __init__(
    self,
    full: tokenizers.Tokenizer,
    settings: tokenizer_files.TokenizerSettings,
  ):
    """Args:
    full: of the whole `tokenizer.json`.
    """
    self._full, self.settings = full, settings

  def _id(self, token: str) -> int:
    index = self._token_ids.get(token)
    if index is None:
      raise errors.InputError(
        f'the tokenizer lacks the special token {token!a}'
      )
    return index

  @functools.cached_property
  def _token_ids(self) -> dict[str, int]:
    """Of the special tokens that are there."""
    names = {*SPECIAL, *chat.TOKENS, *self.settings.special_tokens.values()}
    ids = {name: self._full.token_to_id(name) for name in names}
    return {name: index for name, index in ids.items() if index is not None}

  def named_token(self, name: str) -> str | None:
    """A special token by its name, 'bos_token'; None: there is none."""
    token = self.settings.special_tokens.get(name)
    return token if token in self._token_ids else None

  def _named_id(self, name: str) -> int:
    token = self.settings.special_tokens.get(name)
    if token is None:
      raise errors.InputError(f'the tokenizer has no special token {name}')
    return self._id(token)

  bos_id = functools.cached_property(lambda self: self._named_id('bos_token'))
  eos_id = functools.cached_property(lambda self: self._named_id('eos_token'))
  pad_id = functools.cached_property(lambda self: self._named_id('pad_token'))
  fim_hole_id = functools.cached_property(lambda self: self._id(FIM_HOLE))
  fim_begin_id = functools.cached_property(lambda self: self._id(FIM_BEGIN))
  fim_end_id = functools.cached_property(lambda self: self._id(FIM_END))
  user_id = functools.cached_property(lambda self: self._id(chat.USER))
  assistant_id = functools.cached_property(
    lambda self: self._id(chat.ASSISTANT)
  )

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    """The tokens that end an answer; there may be none."""
    if self.settings.eos_ids is not None:
      return self.settings.eos_ids
    has_eos = self.named_token('eos_token') is not None
    return (self.eos_id,) if has_eos else ()

  @functools.cached_property
  def end_id(self) -> int:
    """The token that an answer is ended with: eos, if it ends one.

    Raises:
      InputError: no token ends an answer.
    """
    if not self.eos_ids:
      raise errors.InputError('the tokenizer has no token that ends an answer')
    has_eos = self.named_token('eos_token') is not None
    return (
      self.eos_id
      if has_eos and self.eos_id in self.eos_ids
      else self.eos_ids[0]
    )

  @functools.cached_property
  def adds_bos(self) -> bool:
    """True if a text begins with bos.

    The `tokenizer.json` adds it of itself, or the files beside it say so. Where
    none says anything, DeepSeek-V3's bos is added.
    """
    bos, says = self.named_token('bos_token'), self.settings.adds_bos
    if bos is None:
      return False
    return self.file_adds_bos or (bos == BOS if says is None else says)

  @functools.cached_property
  def file_adds_bos(self) -> bool:
    """True if the `tokenizer.json` adds bos of itself."""
    has_bos = self.named_token('bos_token') is not None
    return has_bos and self._full.encode('').ids[:1] == [self.bos_id]

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids of special tokens; a reasoning model's think tags count as text."""
    added = self._full.get_added_tokens_decoder()
    return frozenset(
      i for i, token in added.items() if token.content not in _THINK_TAGS
    )

  @functools.cached_property
  def _special_texts(self) -> list[str]:
    added = self._full.get_added_tokens_decoder()
    return [added[i].content for i in sorted(self.special_ids)]

  @functools.cached_property
  def _added_ids(self) -> frozenset[int]:
    return frozenset(self._full.get_added_tokens_decoder())

  @functools.cached_property
  def has_chat_format(self) -> bool:
    """True if it has the tokens of DeepSeek-V3's chat format."""
    tokens = (BOS, chat.EOS, chat.USER, chat.ASSISTANT)
    return all(token in self._token_ids for token in tokens)

  def check_training(self) -> None:
    """Checks that documents of every kind can be encoded.

    Raises:
      InputError: names a special token that is missing.
    """
    for token in SPECIAL:
      if token != EOT:
        self._id(token)

  def check_tools(self, where: str) -> None:
    """Checks that turns of tools can be encoded; `where` names one.

    Raises:
      InputError: a special token is missing.
    """
    lacking = [t for t in chat.TOOLS if t not in self._token_ids]
    if lacking:
      raise errors.InputError(
        f'{where} has turns of tools, but the tokenizer lacks the special '
        f'token {lacking[0]!a}: name another data.tokenizer'
      )
