"""What a folder says of its answers, in a GGUF file."""

import pytest

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data import tokenizer_files
from tests.checkpoint.gguf import llama
from tests.checkpoint.gguf.test_export import fields


def test_a_folder_s_templates_and_ends_of_answers(model, tokenizer, tmp_path):
  """eos first; three ends have a place, the fourth has none."""
  eos = tokenizer.eos_id
  settings = tokenizer_files.TokenizerSettings(
    templates={'default': 'a', 'tool_use': 'b'},
    eos_ids=(50, eos, 60, 70),
    adds_bos=False,
  )
  own = tokenizers.Tokenizer(tokenizer.text, settings)
  got = fields(llama.write(*model, tmp_path / 'x', own))
  ids = [got[f'tokenizer.ggml.{x}_token_id'] for x in ('eos', 'eot', 'eom')]
  assert ids == [eos, 50, 60]
  assert got['tokenizer.ggml.add_bos_token'] is False
  assert got['tokenizer.chat_template'] == 'a'
  assert got['tokenizer.chat_template.tool_use'] == 'b'


def test_ends_of_answers_that_llama_cpp_would_guess(model, tokenizer, tmp_path):
  for settings, expected in (
    ({'special_tokens': {}}, 'eos_token_id is missing'),
    ({'eos_ids': (1, 544)}, r'eos_token_id=\[1, 544\] must be < model\.vocab'),
  ):
    settings = tokenizer_files.TokenizerSettings(**settings)
    other = tokenizers.Tokenizer(tokenizer.text, settings)
    with pytest.raises(errors.InputError, match=expected):
      llama.write(*model, tmp_path / 'x', other)
    assert not list(tmp_path.iterdir())
