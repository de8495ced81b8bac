"""Bodies of requests: what is taken, and what is refused in one line."""

import pytest

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.server import protocol

LIMITS = protocol.Limits(model='tiny', max_choices=20, max_tokens=500, seed=7)
HELLO = [{'role': 'user', 'content': 'Hello'}]


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(['Hello, world!\n\nx = 1'] * 30, 275)


def test_what_is_not_given(tokenizer):
  parsed = protocol.parse_completion({'prompt': 'Hello'}, tokenizer, LIMITS)
  assert parsed.prompts == [tokenizer.encode('Hello', add_bos=True).tolist()]
  assert (parsed.n, parsed.max_tokens, parsed.stream) == (1, 16, False)
  assert (parsed.sampling.temperature, parsed.sampling.seed) == (1.0, 7)
  assert (
    protocol.parse_chat({'messages': HELLO}, tokenizer, LIMITS).max_tokens
    is None
  )


def test_what_says_nothing_is_taken(tokenizer):
  """What clients send along, at the values that ask for nothing."""
  body = {
    'audio': None,
    'frequency_penalty': 0.0,
    'function_call': 'auto',
    'functions': [],
    'logprobs': False,
    'max_tokens': None,
    'metadata': {'run': '3'},
    'modalities': ['text'],
    'n': 1,
    'parallel_tool_calls': True,
    'presence_penalty': 0,
    'prompt_cache_key': 'k',
    'reasoning_effort': None,
    'response_format': {'type': 'text'},
    'safety_identifier': 's',
    'service_tier': 'auto',
    'store': False,
    'stream': True,
    'stream_options': {'include_usage': True, 'include_obfuscation': False},
    'tool_choice': 'none',
    'tools': [],
    'top_logprobs': 0,
    'user': 'me',
  }
  plain = {'messages': HELLO, 'stream': True}
  plain |= {'stream_options': {'include_usage': True}}
  asked = {'messages': HELLO} | body
  assert protocol.parse_chat(asked, tokenizer, LIMITS) == protocol.parse_chat(
    plain, tokenizer, LIMITS
  )


def test_best_of_is_n_or_nothing(tokenizer):
  body = {'prompt': 'a', 'n': 3, 'best_of': 3}
  assert protocol.parse_completion(body, tokenizer, LIMITS).n == 3
  for wrong in ({'best_of': 2}, {'best_of': 1, 'n': 2}):
    with pytest.raises(errors.InputError, match=r'best_of=. is not supported'):
      protocol.parse_completion({'prompt': 'a'} | wrong, tokenizer, LIMITS)


def test_texts_in_parts_and_developers(tokenizer):
  parts = [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]
  messages = [
    {'role': 'developer', 'content': 'x = 1'},
    {'role': 'user', 'content': parts},
    {
      'role': 'assistant',
      'content': 'world',
      'reasoning_content': 'unread',
      'refusal': None,
      'tool_calls': None,
      'annotations': [],
    },
    {'role': 'user', 'content': []},
  ]
  same = [
    {'role': 'system', 'content': 'x = 1'},
    {'role': 'user', 'content': 'Hello'},
    {'role': 'assistant', 'content': 'world'},
    {'role': 'user', 'content': ''},
  ]
  parsed = protocol.parse_chat({'messages': messages}, tokenizer, LIMITS)
  assert parsed.prompts == [tokenizer.encode_chat(same, True)[0].tolist()]


def test_another_model_is_not_there(tokenizer):
  with pytest.raises(protocol.NoModelError, match="model='gpt' is not served"):
    protocol.parse_chat({'model': 'gpt', 'messages': HELLO}, tokenizer, LIMITS)
  protocol.parse_chat({'model': 'tiny', 'messages': HELLO}, tokenizer, LIMITS)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'best_of': True}, 'best_of'),
    ({'frequency_penalty': False}, 'frequency_penalty=False is not supported'),
    ({'logprobs': True}, 'logprobs=True is not supported here'),
    ({'max_tokens': 3, 'max_completion_tokens': 3}, 'give one of them'),
    ({'max_completion_tokens': 501}, r'max_completion_tokens=501 must be in'),
    ({'n': True}, 'n=True has the wrong type'),
    ({'n': 1.0}, 'n=1.0 has the wrong type'),
    ({'seed': True}, 'seed=True has the wrong type'),
    ({'store': True}, 'store=True is not supported here'),
    ({'stream': 1}, 'stream=1 has the wrong type'),
    ({'stream_options': {'include_usage': True}}, 'for stream=true only'),
    (
      {'stream': True, 'stream_options': {'include_usage': 1}},
      'include_usage must be a bool',
    ),
    (
      {'stream': True, 'stream_options': {'a': 1}},
      "stream_options.'a' is no field",
    ),
    ({'temperature': True}, 'temperature=True has the wrong type'),
    ({'tool_choice': 'required'}, "tool_choice='required' is not supported"),
    ({'tools': [{'type': 'function'}]}, 'tools=.* is not supported here'),
    ({'top_logprobs': False}, 'top_logprobs=False is not supported'),
    ({'verbosity': 'low'}, "'verbosity' is no field"),
    ({'messages': [{'role': 'user'}]}, r'messages\[0\].content must be a str'),
    (
      {'messages': [{'role': 'user', 'content': 'a', 'name': 'b'}]},
      r"messages\[0\].'name' is no field",
    ),
    (
      {'messages': [{'role': 'user', 'content': ['a']}]},
      r'messages\[0\].content\[0\] must be an object',
    ),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
      r"content\[0\].type='image_url' must be 'text'",
    ),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]},
      r'content\[0\] must have one string, its text',
    ),
    (
      {'messages': [{'role': 'assistant', 'tool_calls': [1]}]},
      r'messages\[0\].tool_calls=\[1\] is not supported',
    ),
  ],
)
def test_wrong_chats_are_one_line(tokenizer, wrong, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    protocol.parse_chat({'messages': HELLO} | wrong, tokenizer, LIMITS)
  assert '\n' not in str(caught.value)
