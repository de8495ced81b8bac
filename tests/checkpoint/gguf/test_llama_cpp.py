"""A check from outside: llama.cpp's own forward pass and tokenizer."""

from unittest import mock

import gguf
import numpy as np
import pytest

from dsv3_jax.data import tokenizer as tokenizers
from tests import nightly
from tests.checkpoint.gguf import llama
from tests.data import make_published, test_tokenizer

PROMPT = [0, 5, 77, 300, 41, 12, 99, 180, 200, 201, 202, 444]
COUNT = 64
_ONE_GROUP = {'model__moe__num_groups': 1, 'model__moe__top_groups': 1}
_SOFTMAX = _ONE_GROUP | {'model__moe__score_func': 'softmax'}
CASES = {
  'yarn': ('yarn', {}),
  'plain': ('plain', {}),
  'yarn, mscale 0.707, no q_lora': ('yarn, mscale 0.707, no q_lora', {}),
  'one group': ('plain', _ONE_GROUP),
  'every group': ('plain', {'model__moe__top_groups': 4}),
  'softmax': ('plain', _SOFTMAX),
  'softmax, not normalised': (
    'plain',
    _SOFTMAX | {'model__moe__norm_topk': False, 'model__moe__route_scale': 1.0},
  ),
  'sigmoid, not normalised': (
    'plain',
    {'model__moe__norm_topk': False, 'model__moe__route_scale': 0.7},
  ),
  '2 shared': ('16 experts, 2 groups, 2 shared, 2 MTP', {}),
  'unrolled, 2 dense': ('unrolled, 2 dense, no MTP', {}),
  'no dense': ('no q_lora, 1 group, no dense', {}),
  'all dense': ('plain', {'model__num_dense_layers': 3}),
  'eps, theta': (
    'plain',
    {
      'model__norm_eps': 0.1,
      'model__latent_norm_eps': 0.1,
      'model__rope__theta': 500.0,
    },
  ),
  '27 layers': (
    'plain',
    {'model__num_layers': 27, 'model__mla__q_lora_rank': 0},
  ),
}


@pytest.fixture(scope='module')
def yarn():
  cfg = llama.make('yarn')
  return cfg, *llama.weights(cfg)


@pytest.mark.parametrize('case', nightly.daily(CASES, 'yarn'))
def test_greedy_tokens_and_log_probs_agree(case, tokenizer, tmp_path):
  """All of 64 tokens; log-probabilities at their start, middle and end."""
  name, changes = CASES[case]
  cfg = llama.make(name, **changes)
  model = (cfg, *llama.weights(cfg))
  path = tmp_path / 'x.gguf'
  llama.write(*model, path, tokenizer, dtype='float32')
  theirs = llama.Llama(path)
  tokens = theirs.greedy(PROMPT, COUNT)
  row = PROMPT + tokens
  ours_TV = llama.our_log_probs(*model, row)[len(PROMPT) - 1 :]
  assert len(tokens) == COUNT and len(set(tokens)) > 10
  assert ours_TV[:-1].argmax(-1).tolist() == tokens
  for i in (0, COUNT // 2, COUNT):
    got_V = theirs.log_probs(row[: len(PROMPT) + i], cfg.model.vocab_size)
    np.testing.assert_allclose(got_V, ours_TV[i], rtol=0.0, atol=1e-4)


def test_without_the_scoring_function_another_is_taken(
  yarn, tokenizer, tmp_path
):
  """So the test above notices the key."""
  path = tmp_path / 'x.gguf'
  with mock.patch.object(gguf.GGUFWriter, 'add_expert_gating_func'):
    llama.write(*yarn, path, tokenizer, dtype='float32')
  got_V = llama.Llama(path).log_probs(PROMPT, yarn[0].model.vocab_size)
  ours_V = llama.our_log_probs(*yarn, PROMPT)[-1]
  assert np.max(np.abs(got_V - ours_V)) > 0.1


@pytest.mark.parametrize(('dtype', 'most'), [('bfloat16', 0.1), ('q8_0', 0.3)])
def test_smaller_types_load_and_generate(
  dtype, most, yarn, tokenizer, tmp_path
):
  """`most` is the format's rounding of weights and activations, spread."""
  path = tmp_path / 'x.gguf'
  llama.write(*yarn, path, tokenizer, dtype=dtype)
  theirs = llama.Llama(path)
  assert len(theirs.greedy(PROMPT, 8)) == 8
  got_V = theirs.log_probs(PROMPT, yarn[0].model.vocab_size)
  error = np.max(np.abs(got_V - llama.our_log_probs(*yarn, PROMPT)[-1]))
  assert 0.0 < error < most


TEXTS = (
  'def f(x_1, *args):\n    return "a" + x.b[0]  # 3.14\n\n',
  '0 7 12 345 1234567 3.14159 0x7f 2026-11-30',
  '\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6df1\u5ea6\u5b66\u4e60 abc \u30ab',
  ' \t  a   b\n\n  \n c  ',
  "I'll don't caf\u00e9 e\u0301 \U0001f600 \u041f\u0440\u0438",
)


@pytest.fixture(scope='module')
def theirs(yarn, tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'x.gguf'
  return llama.Llama(llama.write(*yarn, path, tokenizer))


def test_the_tokenizer_gives_our_ids(theirs, tokenizer):
  for text in (*TEXTS, *make_published.texts()[:60]):
    want = tokenizer.encode(text).tolist()
    assert theirs.tokenize(text) == want, text
    restored = theirs.post('/detokenize', tokens=want)['content']
    assert restored == text
  want = tokenizer.encode(TEXTS[0], add_bos=True).tolist()
  assert theirs.tokenize(TEXTS[0], add_special=True) == want
  # A document's text is never a special token; a chat's markers are.
  for token in tokenizers.SPECIAL:
    want = tokenizer.encode(token).tolist()
    assert theirs.tokenize(token, parse_special=False) == want
    assert len(theirs.tokenize(token, parse_special=True)) == 1


@pytest.mark.nightly
def test_the_published_tokenizer_gives_the_published_ids(tmp_path):
  """Its vocabulary has holes here, and the model has more rows than tokens."""
  tokenizer = test_tokenizer.published()
  size = {'model__vocab_size': 129_280, 'model__mtp__depth': 0}
  cfg = llama.make('plain', **size)
  path = tmp_path / 'x.gguf'
  llama.write(cfg, *llama.weights(cfg), path, tokenizer)
  theirs = llama.Llama(path)
  for text in make_published.texts():
    assert theirs.tokenize(text) == tokenizer.encode(text).tolist(), text


def test_a_conversation_is_that_of_encode_chat(theirs, tokenizer):
  turns = [
    {'role': 'system', 'content': 'text'},
    {'role': 'user', 'content': 'a line?'},
    {'role': 'assistant', 'content': 'wrap'},
    {'role': 'user', 'content': 'more'},
  ]
  prompt = theirs.post('/apply-template', messages=turns)['prompt']
  got = theirs.tokenize(prompt, add_special=True, parse_special=True)
  want, _ = tokenizer.encode_chat(turns, add_generation_prompt=True)
  assert got == want.tolist()
