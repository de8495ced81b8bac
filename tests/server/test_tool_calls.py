"""Calls of tools: prompts that offer them, answers that make them."""

import json

import pytest

from dsv3_jax import errors
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.server import conversation, protocol, tool_calls
from tests.server import models, web

WEATHER = {
  'type': 'function',
  'function': {
    'name': 'get_weather',
    'description': 'The weather of a city.',
    'parameters': {
      'type': 'object',
      'properties': {'city': {'enum': ['Oslo', 'Rome']}},
      'required': ['city'],
      'additionalProperties': False,
    },
  },
}
CLOCK = {'type': 'function', 'function': {'name': 'clock'}}
TOOLS = [WEATHER, CLOCK]
MESSAGES = [{'role': 'user', 'content': 'Hello'}]
LIMITS = protocol.Limits(
  model='tiny',
  max_choices=20,
  max_tokens=500,
  vocab_size=models.VOCAB,
  seed=7,
)


def call_text(name='clock', arguments='{}', kind='function'):
  inner = f'{name}\n```json\n{arguments}\n```'
  return chat.CALL_BEGIN + kind + chat.SEPARATOR + inner + chat.CALL_END


def short_call(name='clock', arguments='{}'):
  """As DeepSeek-V3.1 writes it."""
  return chat.CALL_BEGIN + name + chat.SEPARATOR + arguments + chat.CALL_END


def calls_text(*calls):
  return chat.CALLS_BEGIN + '\n'.join(calls) + chat.CALLS_END


ROME = '{"city": "Rome"}'


@pytest.mark.parametrize('size', [1, 3, 1000])
@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('Hello <\uff5c tool', ['Hello <\uff5c tool']),
    (calls_text(call_text()), [('clock', '{}')]),
    (
      'Hm.' + calls_text(call_text(), call_text('get_weather', ROME)) + ' x',
      ['Hm.', ('clock', '{}'), ('get_weather', ROME), ' x'],
    ),
    (
      calls_text(short_call(), short_call('get_weather', ROME)),
      [('clock', '{}'), ('get_weather', ROME)],
    ),
    (calls_text(call_text(arguments='{"a": ')), None),
    (calls_text(call_text(arguments='[1]')), None),
    (calls_text(call_text(name=' ')), None),
    (calls_text(chat.CALL_BEGIN + 'clock' + chat.CALL_END), None),
    (calls_text('clock {}'), None),
    (calls_text(), None),
    (chat.CALLS_BEGIN + call_text()[:-1], None),
    (chat.CALLS_BEGIN, None),
    (call_text(), None),
    (
      calls_text(call_text(), call_text(arguments='3')),
      [('clock', '{}'), '\n' + call_text(arguments='3') + chat.CALLS_END],
    ),
    (chat.CALLS_BEGIN + call_text() + '\n', [('clock', '{}')]),
    (calls_text(call_text()) + '\n', [('clock', '{}'), '\n']),
  ],
)
def test_calls_are_parsed_in_any_pieces(text, want, size):
  """None: all of it is text, as it is no call."""
  parser, parts = tool_calls.Parser(), []
  for start in range(0, len(text), size):
    parts += parser.feed(text[start : start + size])
  joined = []
  for part in parts + parser.end():
    if isinstance(part, str) and joined and isinstance(joined[-1], str):
      joined[-1] += part
    else:
      joined.append(part)
  assert joined == ([text] if want is None else want)
  calls = [part for part in joined if not isinstance(part, str)]
  assert parser.num_calls == len(calls)


def test_calls_beyond_the_most_are_dropped():
  parser = tool_calls.Parser(max_calls=1)
  text = calls_text(call_text(), call_text('get_weather', ROME))
  assert parser.feed(text) + parser.end() == [('clock', '{}')]


@pytest.fixture(scope='module')
def tokenizer():
  texts = [*web.TEXTS, 'You may call these functions: get_weather "city"']
  return tokenizers.train(texts * 30, 320, tools=True)


@pytest.fixture(scope='module')
def saying(tokenizer):
  return models.Saying(tokenizer.eos_id)


@pytest.fixture(scope='module')
def served(tokenizer, saying):
  with web.serving(tokenizer, runner=saying) as server:
    yield server


def ids_of(tokenizer, text):
  """Ids of a text whose special tokens are tokens."""
  for token in chat.TOOLS:
    text = text.replace(token, f'\0{token}\0')
  ids = []
  for part in text.split('\0'):
    own = tokenizer.tool_ids.get(part)
    ids += tokenizer.encode(part).tolist() if own is None else [own]
  return ids


def say(saying, tokenizer, text, tools=TOOLS, messages=MESSAGES):
  """What the model answers to such a conversation."""
  saying.ids = ids_of(tokenizer, text)
  prompt = conversation.render(tokenizer, messages, tools)
  saying.prompt_length = len(prompt.ids)


def answer_of(ask, stream, **fields):
  """Content, thought, calls and why it ends, of one answer."""
  fields = {'model': 'tiny', 'messages': MESSAGES, 'tools': TOOLS} | fields
  answer = ask.chat.completions.create(**fields, stream=stream)
  if not stream:
    choice = answer.choices[0]
    message = choice.message
    calls = [
      (call.function.name, call.function.arguments)
      for call in message.tool_calls or []
    ]
    ids = [call.id for call in message.tool_calls or []]
    thought = getattr(message, 'reasoning_content', '')
    assert len(set(ids)) == len(ids)
    return message.content or '', thought, calls, choice.finish_reason
  content, thought, calls, reason = '', '', [], None
  for part in answer:
    (choice,) = part.choices
    content += choice.delta.content or ''
    thought += getattr(choice.delta, 'reasoning_content', None) or ''
    for call in choice.delta.tool_calls or []:
      assert call.index == len(calls) and call.id and call.type == 'function'
      calls.append((call.function.name, call.function.arguments))
    reason = choice.finish_reason
  return content, thought, calls, reason


@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_with_calls(ask, saying, tokenizer, stream):
  calls = calls_text(call_text(), call_text('get_weather', ROME))
  say(saying, tokenizer, f'<think>Hm</think>Hello {calls}')
  assert answer_of(ask, stream) == (
    'Hello ',
    'Hm',
    [('clock', '{}'), ('get_weather', ROME)],
    'tool_calls',
  )
  assert answer_of(ask, stream, parallel_tool_calls=False)[2] == [
    ('clock', '{}')
  ]


@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_without_calls(ask, saying, tokenizer, stream):
  say(saying, tokenizer, 'Hello')
  assert answer_of(ask, stream) == ('Hello', '', [], 'stop')
  wrong = calls_text(call_text(arguments='{"a": '))
  say(saying, tokenizer, wrong)
  assert answer_of(ask, stream) == (wrong, '', [], 'stop')
  cut = calls_text(call_text())
  say(saying, tokenizer, cut)
  most = len(saying.ids) - 3
  content, _, calls, reason = answer_of(ask, stream, max_tokens=most)
  assert (calls, reason) == ([], 'length') and cut.startswith(content)


def test_a_message_is_what_the_next_turn_takes(ask, saying, tokenizer):
  say(saying, tokenizer, calls_text(call_text('get_weather', ROME)))
  message = ask.chat.completions.create(
    model='tiny', messages=MESSAGES, tools=TOOLS
  ).choices[0].message  # fmt: skip
  assert message.content is None
  call = message.tool_calls[0]
  turn = {'role': 'tool', 'tool_call_id': call.id, 'content': 'rain'}
  messages = [*MESSAGES, message.model_dump(exclude_none=True), turn]
  plain = [
    *MESSAGES,
    {
      'role': 'assistant',
      'content': None,
      'tool_calls': [{'function': {'name': 'get_weather', 'arguments': ROME}}],
    },
    {'role': 'tool', 'content': 'rain'},
  ]
  say(saying, tokenizer, 'It rains.', messages=plain)
  answer = ask.chat.completions.create(
    model='tiny', messages=messages, tools=TOOLS
  ).choices[0]
  assert answer.message.content == 'It rains.'
  assert answer.message.tool_calls is None


def prompt_of(tokenizer, **fields):
  body = {'messages': MESSAGES} | fields
  return protocol.parse_chat(body, tokenizer, LIMITS)


def test_tools_are_described_in_the_system_turn(tokenizer):
  parsed = prompt_of(tokenizer, tools=[WEATHER])
  text = tokenizer.decode(parsed.prompts[0])
  assert json.dumps(WEATHER['function']) in text
  assert text.index('get_weather') < text.index(chat.USER)
  assert parsed.parses_calls and parsed.constraint is None
  system = [{'role': 'system', 'content': 'Be brief.'}, *MESSAGES]
  with_system = prompt_of(tokenizer, tools=[WEATHER], messages=system)
  text = tokenizer.decode(with_system.prompts[0])
  assert text.index('Be brief.') < text.index('get_weather')
  plain = prompt_of(tokenizer)
  for fields in ({'tools': []}, {'tools': TOOLS, 'tool_choice': 'none'}):
    parsed = prompt_of(tokenizer, **fields)
    assert parsed.prompts == plain.prompts and not parsed.parses_calls


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  ('choice', 'names'),
  [
    ('required', {'clock', 'get_weather'}),
    (
      {'type': 'function', 'function': {'name': 'get_weather'}},
      {'get_weather'},
    ),
  ],
  ids=['required', 'named'],
)
def test_an_answer_that_must_call(tokenizer, choice, names, stream):
  """Of a model that writes anything that it is allowed to."""
  runner, seen = models.Choosing(models.VOCAB, room=900), set()
  tools = [
    WEATHER,
    {
      'type': 'function',
      'function': {
        'name': 'clock',
        'parameters': {'properties': {}, 'additionalProperties': False},
      },
    },
  ]
  with (
    web.serving(tokenizer, runner=runner) as (address, _),
    web.client(address) as ask,
  ):
    for i in range(4):
      message = {'role': 'user', 'content': 'x' * i}
      content, _, calls, reason = answer_of(
        ask,
        stream,
        messages=[message],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=400,
      )
      ((name, arguments),) = calls
      assert (content, reason) == ('', 'tool_calls')
      seen.add(name)
      if name == 'get_weather':
        assert json.loads(arguments)['city'] in ('Oslo', 'Rome')
      else:
        assert json.loads(arguments) == {}
  assert seen == names


def nested(depth):
  value = {}
  for _ in range(depth):
    value = {'items': [value]}
  return value


def wrong_function(**function):
  return {'tools': [{'type': 'function', 'function': function}]}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'tools': [3]}, r'tools\[0\] must be an object of type'),
    ({'tools': [{'type': 'retrieval'}]}, r'tools\[0\] must be an object of'),
    ({'tools': [{'type': 'function'}]}, r'tools\[0\].function must be an ob'),
    (wrong_function(name='a b'), r"tools\[0\].function.name='a b' must be 1"),
    (wrong_function(), r"tools\[0\].function.name='' must be 1 to 64"),
    (
      wrong_function(name='f', parameters=3),
      r'tools\[0\].function.parameters=3 has the wrong type',
    ),
    (wrong_function(name='f', x=3), r"tools\[0\].function.'x' is no field"),
    (
      wrong_function(name='f', parameters=nested(950)),
      r'tools\[0\] is nested too deeply',
    ),
    ({'tools': [CLOCK, CLOCK]}, 'two functions have one name'),
    ({'tools': [CLOCK] * 129}, 'tools has 129 entries; at most 128'),
    ({'tool_choice': 'any'}, "tool_choice='any' must be none, auto, requ"),
    (
      {'tools': [], 'tool_choice': 'required'},
      "tool_choice='required' needs tools",
    ),
    ({'tool_choice': {'type': 'function'}}, 'tool_choice must have the type'),
    (
      {'tool_choice': {'type': 'function', 'function': {'name': 'g'}}},
      "tool_choice.function.name='g' is none of tools",
    ),
    ({'guided_regex': 'a'}, 'tools: a constrained answer cannot call them'),
    (
      {'tool_choice': 'required', 'ignore_eos': True},
      'ignore_eos=true has no meaning',
    ),
    (
      wrong_function(name='f', parameters={'type': 'strin'})
      | {'tool_choice': 'required'},
      'tools: parameters: .*strin',
    ),
    ({'chat_template_kwargs': {'documents': []}}, "'documents'=.* is not sup"),
    ({'chat_template_kwargs': {'thinking': True}}, "'thinking'=True is not"),
    ({'chat_template_kwargs': {'tools': []}}, "kwargs cannot have 'tools'"),
    (
      {'messages': [{'role': 'tool', 'content': 'a', 'tool_call_id': 3}]},
      r'messages\[0\].tool_call_id must be a string',
    ),
    (
      {'messages': [{'role': 'assistant', 'tool_calls': [{}]}]},
      r"messages\[0\].tool_calls\[0\] must have an object in 'function'",
    ),
  ],
)
def test_wrong_tools_are_one_line(tokenizer, fields, message):
  body = {'messages': MESSAGES, 'tools': TOOLS} | fields
  with pytest.raises(errors.InputError, match=message) as caught:
    protocol.parse_chat(body, tokenizer, LIMITS)
  assert '\n' not in str(caught.value)


def test_arguments_of_other_templates_that_ask_for_nothing(tokenizer):
  same = {'chat_template_kwargs': {'thinking': False, 'documents': None}}
  assert prompt_of(tokenizer, **same) == prompt_of(tokenizer)


def test_a_tokenizer_without_their_tokens_is_said():
  plain = tokenizers.train(web.TEXTS * 30, 280)
  body = {'messages': MESSAGES, 'tools': TOOLS}
  with pytest.raises(errors.InputError, match=r'tools: .* lacks the special'):
    protocol.parse_chat(body, plain, LIMITS)
  body = {'messages': [{'role': 'tool', 'content': 'a'}]}
  with pytest.raises(errors.InputError, match='lacks the special token'):
    protocol.parse_chat(body, plain, LIMITS)


def test_prompts_with_tools_can_be_counted(served, tokenizer):
  body = {'messages': MESSAGES, 'tools': TOOLS}
  status, text, _ = web.fetch(
    f'{served[0]}/tokenize', json.dumps(body).encode()
  )
  want = conversation.render(tokenizer, MESSAGES, TOOLS).ids
  assert status == 200 and json.loads(text)['tokens'] == want
