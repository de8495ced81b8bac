"""Grammars that an answer follows, by llguidance (decision 22).

A `Compiler` makes a `Grammar` of a JSON schema, a regular expression or a list
of choices. Each request has a `Matcher` of it, which knows the tokens that may
come next. The end of the sequence is one of them where the grammar may end.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import matcher as matchers

MAX_CHARS = 2**16  # of a schema, an expression or a list, as JSON
_MAX_GRAMMAR_SIZE = 20_000  # symbols: compiles within a second
# Between two parts of a JSON text: nothing, a space, or a line end and an
# indent. Without a bound, a model could write spaces until its last token.
_WHITE_SPACE = r' |\n[ \t]{0,24}'


@dataclasses.dataclass(frozen=True)
class Grammar:
  """A compiled grammar."""

  state: Any
  eos_id: int
  vocab_size: int

  def matcher(self) -> matchers.Matcher:
    """A matcher before the first token."""
    return matchers.Matcher(
      self.state.deep_copy(), self.eos_id, self.vocab_size
    )


class Compiler:
  """Compiles grammars for the ids of one tokenizer; from any thread."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int):
    """Args: vocab_size: of the model."""
    self._tokenizer, self._vocab_size = tokenizer, vocab_size

  def load(self) -> None:
    """Reads the vocabulary, which takes seconds, before a request needs it.

    Unless no token ends an answer: then each request is refused.
    """
    if self._tokenizer.eos_ids:
      self._vocabulary  # noqa: B018 - kept from now on

  def json_schema(self, schema: dict[str, Any] | bool, where: str) -> Grammar:
    """A JSON text that a schema describes.

    Args:
      where: the field that has it, for messages.

    Raises:
      InputError: the schema is wrong, not supported, or too large.
    """
    _check_size(schema, where)
    options = {'overrides': {'whitespace_pattern': _WHITE_SPACE}}
    make = _library().LLMatcher.grammar_from_json_schema
    try:
      text = make(json.dumps(schema), **options)
    except ValueError as error:  # it is nested too deeply
      raise errors.InputError(f'{where}: {error}') from error
    return self._compile(text, where)

  def regex(self, pattern: str, where: str) -> Grammar:
    """A text that a regular expression matches; raises as `json_schema`."""
    _check_size(pattern, where)
    text = _library().LLMatcher.grammar_from_regex(pattern)
    return self._compile(text, where)

  def choice(self, texts: Sequence[str], where: str) -> Grammar:
    """One of several texts; raises as `json_schema`."""
    _check_size(texts, where)
    rule = ' | '.join(map(json.dumps, texts))
    return self._compile_lark(f'start: {rule}', where)

  def tool_calls(
    self, functions: Sequence[dict[str, Any]], *, parallel: bool, where: str
  ) -> Grammar:
    """Calls of functions, in the format of `chat`; raises as `json_schema`.

    Args:
      functions: 'name' and 'parameters', a JSON schema of an object.
      parallel: there may be more than one call.
    """
    _check_size(functions, where)
    token = lambda text: f'<[{self._tokenizer.tool_ids[text]}]>'
    more = ' ("\\n" call)*' if parallel else ''
    names = [f'f{i}' for i in range(len(functions))]
    rules = [
      f'start: {token(chat.CALLS_BEGIN)} call{more} {token(chat.CALLS_END)}',
      f'call: {token(chat.CALL_BEGIN)} "function" {token(chat.SEPARATOR)} '
      f'({" | ".join(names)}) {token(chat.CALL_END)}',
    ]
    for name, function in zip(names, functions, strict=True):
      schema = {'type': 'object'} | function.get('parameters', {})
      schema['x-guidance'] = {'whitespace_pattern': _WHITE_SPACE}
      head = json.dumps(function['name'] + chat.ARGUMENTS_BEGIN)
      end = json.dumps(chat.ARGUMENTS_END)
      rules.append(f'{name}: {head} {name}-args {end}')
      rules.append(f'{name}-args: %json {json.dumps(schema)}')
    return self._compile_lark('\n'.join(rules), where)

  def _compile_lark(self, text: str, where: str) -> Grammar:
    return self._compile(_library().LLMatcher.grammar_from_lark(text), where)

  def _compile(self, text: str, where: str) -> Grammar:
    library = _library()
    limits = library.LLParserLimits(
      max_grammar_size=_MAX_GRAMMAR_SIZE, verbose_errors=False
    )
    state = library.LLMatcher(
      self._vocabulary, text, log_level=0, limits=limits
    )
    if state.is_error():
      message = ' '.join(state.get_error().split())
      raise errors.InputError(f'{where}: {message[:300]}')
    compiled = Grammar(state, self._tokenizer.end_id, self._vocab_size)
    matcher = compiled.matcher()
    matcher.allowed([])
    if matcher.failed:
      raise errors.InputError(f'{where}: it allows no text, or is too complex')
    return compiled

  @functools.cached_property
  def _vocabulary(self):
    """The bytes of all tokens, as llguidance reads them."""
    library = _library()
    return library.LLTokenizer(
      library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
      n_vocab=self._vocab_size,
      eos_token=self._tokenizer.end_id,
    )


class _Vocabulary:
  """A tokenizer as llguidance asks for it."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int):
    self._tokenizer = tokenizer
    self.eos_token_id = tokenizer.end_id
    has_bos = tokenizer.named_token('bos_token') is not None
    self.bos_token_id = tokenizer.bos_id if has_bos else None
    self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
    # No grammar has them in a text, even if it allows what they spell.
    self.special_token_ids = sorted(tokenizer.special_ids)

  def __call__(self, text: bytes) -> list[int]:
    return self._tokenizer.encode(text.decode(errors='replace')).tolist()


def _check_size(value: Any, where: str) -> None:
  try:
    text = json.dumps(value, ensure_ascii=False)
  except RecursionError as error:
    raise errors.InputError(f'{where} is nested too deeply') from error
  chat.check_unicode(text, where)
  if len(text) > MAX_CHARS:
    raise errors.InputError(
      f'{where} has {len(text)} characters as JSON; at most {MAX_CHARS} are '
      'taken'
    )


def _library():
  """llguidance, which only those who constrain answers load."""
  import llguidance

  return llguidance
