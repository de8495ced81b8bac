"""The tokenizer as the metadata of a GGUF file.

llama.cpp has byte-level BPE and DeepSeek-V3's pre-tokenizer itself; the file
brings tokens, merges and special ids.
"""

import json
from typing import Any

import gguf

from dsv3_jax import errors
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizers

_PRE = 'deepseek-v3'
# Options of BPE that llama.cpp's has not, and that no value switches on here.
_PLAIN = (
  *('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix'),
  *('byte_fallback', 'ignore_merges'),
)


def check(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> None:
  """Refuses a tokenizer that llama.cpp would not reproduce.

  Raises:
    InputError: names the field of `tokenizer.json`.
  """
  spec = json.loads(tokenizer.text)
  model, normalizer = spec['model'], spec.get('normalizer')
  rules = {
    f'model type={model.get("type")!r} must be BPE': model.get('type') == 'BPE',
    'normalizer must be null': not normalizer
    or normalizer.get('normalizers') == [],
    'pre_tokenizer must be that of DeepSeek-V3': tokenizer.splits_as_published,
    f'{tokenizer.vocab_size} tokens must be <= model.vocab_size={vocab_size}': (
      tokenizer.vocab_size <= vocab_size
    ),
  }
  ids = tokenizer.eos_ids
  rules['eos_token_id is missing'] = bool(ids)
  rules[f'eos_token_id={list(ids)} must be < model.vocab_size={vocab_size}'] = (
    max(ids, default=0) < vocab_size
  )
  for name in _PLAIN:
    rules[f'model.{name}={model.get(name)!r} must be off'] = not model.get(name)
  for rule, holds in rules.items():
    if not holds:
      raise errors.InputError(f'--format=gguf: tokenizer.json: {rule}')


def write(
  writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer, vocab_size: int
) -> None:
  """Adds tokens, merges, special ids and the chat template.

  Args:
    vocab_size: rows of the embedding; those without a token are unused.
  """
  spec = json.loads(tokenizer.text)
  tokens = [f'[unused {i}]' for i in range(vocab_size)]
  types = [gguf.TokenType.UNUSED] * vocab_size
  for token, i in spec['model']['vocab'].items():
    tokens[i], types[i] = token, gguf.TokenType.NORMAL
  for entry in spec['added_tokens']:
    i = entry['id']
    tokens[i], types[i] = entry['content'], gguf.TokenType.USER_DEFINED
    if i in tokenizer.special_ids:
      types[i] = gguf.TokenType.CONTROL
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(_PRE)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(_merges(spec))
  if tokenizer.named_token('bos_token') is not None:
    writer.add_bos_token_id(tokenizer.bos_id)
  if tokenizer.named_token('pad_token') is not None:
    writer.add_pad_token_id(tokenizer.pad_id)
  _write_ends(writer, tokenizer)
  writer.add_add_bos_token(tokenizer.adds_bos)
  writer.add_add_eos_token(False)
  if templates := tokenizer.settings.templates:
    writer.add_chat_template(
      [{'name': name, 'template': text} for name, text in templates.items()]
    )
  elif tokenizer.has_chat_format:
    writer.add_chat_template(chat.TEMPLATE)


def _write_ends(
  writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer
) -> None:
  """Adds the tokens that end an answer: eos, of a turn, of a message.

  The format has these three names, and ends an answer at each. Whatever ends
  it besides is left out.
  """
  first = tokenizer.end_id
  ids = [first, *(i for i in tokenizer.eos_ids if i != first)]
  add = (writer.add_eos_token_id, writer.add_eot_token_id)
  for write_id, index in zip(
    (*add, writer.add_eom_token_id), ids, strict=False
  ):
    write_id(index)


def _merges(spec: dict[str, Any]) -> list[str]:
  """Pairs of tokens, in their order; two spellings are in use."""
  merges = spec['model']['merges']
  return [m if isinstance(m, str) else ' '.join(m) for m in merges]
