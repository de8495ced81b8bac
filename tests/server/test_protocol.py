"""Bodies of requests: what is taken, and what is refused in one line."""

import pytest

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import request as requests
from dsv3_jax.server import protocol, tokenize_protocol

LIMITS = protocol.Limits(
  model='tiny', max_choices=20, max_tokens=500, vocab_size=280, seed=7
)
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
    'add_generation_prompt': True,
    'add_special_tokens': False,
    'audio': None,
    'bad_words': [],
    'chat_template_kwargs': {},
    'continue_final_message': False,
    'early_stopping': False,
    'echo': False,
    'frequency_penalty': 0.0,
    'function_call': 'auto',
    'functions': [],
    'ignore_eos': False,
    'include_stop_str_in_output': False,
    'length_penalty': 1.0,
    'logit_bias': {},
    'logprobs': False,
    'max_tokens': None,
    'metadata': {'run': '3'},
    'min_p': 0,
    'min_tokens': 0,
    'modalities': ['text'],
    'n': 1,
    'parallel_tool_calls': True,
    'priority': 0,
    'return_tokens_as_token_ids': False,
    'presence_penalty': 0,
    'prompt_cache_key': 'k',
    'reasoning_effort': None,
    'repetition_penalty': 1,
    'response_format': {'type': 'text'},
    'safety_identifier': 's',
    'service_tier': 'auto',
    'skip_special_tokens': True,
    'stop_token_ids': [],
    'store': False,
    'stream': True,
    'stream_options': {'include_usage': True, 'include_obfuscation': False},
    'tool_choice': 'none',
    'tools': [],
    'top_k': -1,
    'top_logprobs': 0,
    'use_beam_search': False,
    'user': 'me',
    'verbosity': 'medium',
  }
  plain = {'messages': HELLO, 'stream': True}
  plain |= {'stream_options': {'include_usage': True}}
  asked = {'messages': HELLO} | body
  assert protocol.parse_chat(asked, tokenizer, LIMITS) == protocol.parse_chat(
    plain, tokenizer, LIMITS
  )


def test_a_text_has_one_bos(tokenizer):
  """Clients with a tokenizer of their own spell it."""

  def ids(text, **fields):
    body = {'prompt': text} | fields
    (prompt,) = protocol.parse_completion(body, tokenizer, LIMITS).prompts
    if not fields.get('suffix'):
      assert tokenize_protocol.parse_tokenize(body, tokenizer, LIMITS) == prompt
    return prompt

  bos, text = tokenizers.BOS, tokenizer.encode('Hello').tolist()
  assert ids('Hello') == ids(f'{bos}Hello') == [tokenizer.bos_id, *text]
  assert ids('Hello', add_special_tokens=False) == text
  assert ids(f'{bos}Hello', add_special_tokens=False) == ids('Hello')
  assert ids(f'{bos}{bos}Hello').count(tokenizer.bos_id) == 1
  assert ids(f'Hello{bos}').count(tokenizer.bos_id) == 1
  filled = ids('Hello', suffix='x')
  assert filled[0] == tokenizer.bos_id
  assert ids('Hello', suffix='x', add_special_tokens=False) == filled[1:]


def test_lengths_may_be_given_twice(tokenizer):
  body = {'messages': HELLO, 'max_tokens': 3, 'max_completion_tokens': 3}
  assert protocol.parse_chat(body, tokenizer, LIMITS).max_tokens == 3


def test_a_least_length_that_nothing_can_undercut(tokenizer):
  body = {'messages': HELLO, 'max_tokens': 3, 'ignore_eos': True}
  plain = protocol.parse_chat(body, tokenizer, LIMITS)
  asked = protocol.parse_chat(body | {'min_tokens': 3}, tokenizer, LIMITS)
  assert asked == plain


def test_what_sampling_fields_say(tokenizer):
  body = {
    'messages': HELLO,
    'seed': -(2**63),
    'min_p': 0.1,
    'top_k': 5,
    'presence_penalty': -2,
    'frequency_penalty': 2.0,
    'repetition_penalty': 1.5,
    'logit_bias': {'3': -100, '279': 1.5},
    'logprobs': True,
    'top_logprobs': 20,
    'ignore_eos': True,
  }
  parsed = protocol.parse_chat(body, tokenizer, LIMITS)
  assert parsed.ignore_eos
  assert parsed.sampling == requests.SamplingParams(
    temperature=1.0,
    top_k=5,
    min_p=0.1,
    seed=-(2**63),
    logit_bias=((3, -100.0), (279, 1.5)),
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    repetition_penalty=1.5,
    logprobs=20,
  )


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'best_of': 1, 'n': 2}, r'best_of=1 must be in \[2, 16\]'),
    ({'best_of': 3, 'stream': True}, r'best_of=3 above n=1 cannot be streamed'),
    ({'best_of': 11, 'prompt': ['a', 'b']}, r'best_of \* prompts=22 must be'),
    ({'echo': 1}, 'echo=1 has the wrong type'),
    ({'echo': True, 'suffix': 'b'}, 'echo=true is not supported here with a'),
    ({'logprobs': True}, 'logprobs=True has the wrong type'),
    ({'logprobs': 21}, r'logprobs=21 must be in \[0, 20\]'),
    ({'max_tokens': -1}, r'max_tokens=-1 must be in \[0, 500\]'),
    ({'min_p': 1.1}, r'min_p=1.1 must be in \[0, 1\]'),
    ({'presence_penalty': 2.1}, r'presence_penalty=2.1 must be in \[-2, 2\]'),
    (
      {'repetition_penalty': 0},
      r'repetition_penalty=0 must be in \[0.01, 100\]',
    ),
    ({'seed': 2**64}, 'seed=18446744073709551616 must be in'),
    ({'prompt_logprobs': -1}, r'prompt_logprobs=-1 must be in \[0, 20\]'),
    ({'prompt_logprobs': 1, 'stream': True}, 'prompt_logprobs is not for str'),
    ({'suffix': 'b', 'prompt': [5]}, 'a suffix needs a prompt that is a str'),
    ({'top_k': -2}, r'top_k=-2 must be in \[-1, '),
    ({'logit_bias': {'x': 1}}, r"logit_bias\['x'\] must have a token id"),
    ({'logit_bias': {'280': 1}}, r"logit_bias\['280'\]: ids are below 280"),
    ({'logit_bias': {'3': True}}, r"logit_bias\['3'\]=True must be a number"),
    ({'logit_bias': {'3': 101}}, r"logit_bias\['3'\]=101 must be in \[-100"),
    ({'logit_bias': {'3': float('nan')}}, r"logit_bias\['3'\]=nan must be in"),
    (
      {'logit_bias': {str(i): 1 for i in range(1025)}},
      'logit_bias has 1025 entries; at most 1024',
    ),
  ],
)
def test_wrong_completions_are_one_line(tokenizer, wrong, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    protocol.parse_completion({'prompt': 'a'} | wrong, tokenizer, LIMITS)
  assert '\n' not in str(caught.value)


def test_texts_in_parts_and_developers(tokenizer):
  parts = [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]
  messages = [
    {'role': 'developer', 'content': 'x = 1'},
    {'role': 'user', 'content': parts, 'name': 'Ada'},
    {
      'role': 'assistant',
      'content': 'world',
      'reasoning_content': 'unread',
      'refusal': None,
      'tool_calls': None,
      'annotations': [],
      'type': 'text',
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


def test_a_wrong_value_is_not_repeated_at_length(tokenizer):
  wide = 1
  for _ in range(6):
    wide = [wide] * 6
  for value in (wide, 'x' * 9999, 10**4000, {'k': wide}):
    with pytest.raises(errors.InputError) as caught:
      protocol.parse_chat({'n': value}, tokenizer, LIMITS)
    assert len(str(caught.value)) < 300


def test_another_model_is_not_there(tokenizer):
  with pytest.raises(protocol.NoModelError, match="model='gpt' is not served"):
    protocol.parse_chat({'model': 'gpt', 'messages': HELLO}, tokenizer, LIMITS)
  protocol.parse_chat({'model': 'tiny', 'messages': HELLO}, tokenizer, LIMITS)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'best_of': 2}, "'best_of' is no field"),
    ({'frequency_penalty': False}, 'frequency_penalty=False has the wrong ty'),
    ({'logprobs': 1}, 'logprobs=1 has the wrong type'),
    ({'top_logprobs': 2}, 'top_logprobs=2 needs logprobs=true'),
    ({'logprobs': True, 'top_logprobs': 21}, r'top_logprobs=21 must be in'),
    ({'max_tokens': 3, 'max_completion_tokens': 4}, 'give one of them'),
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
      {'stream': True, 'stream_options': {'continuous_usage_stats': 1}},
      'continuous_usage_stats must be a bool',
    ),
    (
      {'stream': True, 'stream_options': {'a': 1}},
      "stream_options.'a' is no field",
    ),
    ({'temperature': True}, 'temperature=True has the wrong type'),
    ({'top_logprobs': False}, 'top_logprobs=False has the wrong type'),
    ({'min_tokens': 3}, 'min_tokens=3 is not supported here, except with ig'),
    (
      {'min_tokens': 3, 'ignore_eos': True, 'stop': 'x'},
      'min_tokens=3 is not supported here, except with ignore_eos=true and w',
    ),
    (
      {'min_tokens': 3, 'ignore_eos': True, 'max_tokens': 2},
      r'min_tokens=3 must be in \[0, 2\]',
    ),
    ({'n': 10**50}, r'n=10000+\.\.\.0+ must be in \[1, 16\]'),
    ({'verbosity': 'low'}, "verbosity='low' is not supported here"),
    ({'messages': [{'role': 'user'}]}, r'messages\[0\].content must be a str'),
    (
      {'messages': [{'role': 'user', 'content': 'a', 'name': 3}]},
      r'messages\[0\].name must be a string',
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
      r"messages\[0\].tool_calls\[0\] must have an object in 'function'",
    ),
  ],
)
def test_wrong_chats_are_one_line(tokenizer, wrong, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    protocol.parse_chat({'messages': HELLO} | wrong, tokenizer, LIMITS)
  assert '\n' not in str(caught.value)
