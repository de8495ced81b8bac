"""Conversations with tools: ids, targets of the loss, and what is refused."""

import json
import re

import jinja2
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import chat, tokenizer
from tests.data import test_tokenizer


def call(name, arguments, **more):
  return {'function': {'name': name, 'arguments': arguments}} | more


TURNS = [
  {'role': 'system', 'content': 'Use tools.'},
  {'role': 'user', 'content': 'Weather in A and B?'},
  {
    'role': 'assistant',
    'content': None,
    'tool_calls': [
      call('weather', '{"at": "A"}', type='function', id='1'),
      call('weather', {'at': 'B', 'days': 2, 'why': 'f\u00fcr'}),
    ],
  },
  {'role': 'tool', 'content': 'sun', 'tool_call_id': '1'},
  {'role': 'tool', 'content': 'rain', 'name': 'weather'},
  {
    'role': 'assistant',
    'content': 'One more.',
    'tool_calls': [call('clock', '{}', type=None)],
  },
  {'role': 'tool', 'content': '12:00'},
  {'role': 'assistant', 'content': 'Sun, rain.', 'tool_calls': None},
  {'role': 'user', 'content': 'Thanks'},
  {'role': 'assistant', 'content': '', 'tool_calls': []},
]


def spelled(t, *parts):
  """Ids of texts and of special tokens, of which `parts` has the ids."""
  encode = lambda part: [part] if isinstance(part, int) else t.encode(part)
  return np.concatenate([encode(part) for part in parts])


def test_published_ids_of_a_conversation_with_tools():
  """By number: 0 bos, 1 eos, 128803 to 128814 the roles and the tools."""
  t = test_tokenizer.published()
  user, assistant = 128_803, 128_804
  begin, end, one, done, outputs, no_more, out, shut, sep = range(
    128_806, 128_815
  )
  parts = [
    ('Use tools.', user, 'Weather in A and B?', assistant),
    (begin, one, 'function', sep, 'weather\n```json\n{"at": "A"}\n```', done,
     '\n', one, 'function', sep,
     'weather\n```json\n{"at": "B", "days": 2, "why": "f\u00fcr"}\n```', done,
     end, 1),
    (outputs, out, 'sun', shut, '\n', out, 'rain', shut, no_more),
    ('One more.', begin, one, 'function', sep, 'clock\n```json\n{}\n```', done,
     end, 1),
    (outputs, out, '12:00', shut, no_more),
    ('Sun, rain.', 1),
    (user, 'Thanks', assistant),
    (1,),
  ]  # fmt: skip
  pieces = [np.array([0]), *(spelled(t, *part) for part in parts)]
  ids, learned = t.encode_chat(TURNS)
  np.testing.assert_array_equal(ids, np.concatenate(pieces))
  # Answers count, with calls and eos; questions and outputs of tools do not.
  is_answer = [False, False, True, False, True, False, True, False, True]
  want = np.repeat(is_answer, [len(piece) for piece in pieces])
  np.testing.assert_array_equal(learned, want)


@pytest.mark.parametrize('count', range(1, len(TURNS) + 1))
@pytest.mark.parametrize('prompt', [False, True])
def test_the_template_for_transformers_spells_the_same(count, prompt):
  """Every conversation that ends after a turn, with and without a prompt."""
  t, turns = test_tokenizer.published(), TURNS[:count]
  environment = jinja2.Environment()
  dump = lambda value: json.dumps(value, ensure_ascii=False)
  environment.filters['tojson'] = dump
  text = environment.from_string(chat.TEMPLATE).render(
    messages=turns,
    add_generation_prompt=prompt,
    bos_token=tokenizer.BOS,
    eos_token=chat.EOS,
  )
  assert t.decode(t.encode_chat(turns, prompt)[0]) == text


def test_after_outputs_of_tools_the_answer_is_next():
  t = test_tokenizer.published()
  for prompt in (False, True):
    ids, _ = t.encode_chat(TURNS[:4], add_generation_prompt=prompt)
    assert ids[-2:].tolist() == [128_813, 128_811]
  ids, _ = t.encode_chat(TURNS[:2], add_generation_prompt=True)
  assert ids[-1] == 128_804


def test_only_a_vocabulary_with_tools_encodes_their_turns():
  texts = [chat.plain_text(TURNS)]
  plain = tokenizer.train(texts, 280)
  plain.encode_chat([TURNS[1], TURNS[-1]])
  with pytest.raises(errors.InputError, match='lacks the special token'):
    plain.encode_chat(TURNS)
  expected = r'^a\.jsonl:3 has turns of tools, .* lacks .*name another data\.'
  with pytest.raises(errors.InputError, match=expected):
    plain.check_tools('a.jsonl:3')
  able = tokenizer.train(texts, 290, tools=True)
  able.check_tools('a.jsonl:3')
  ids, _ = able.encode_chat(TURNS)
  # bos; user, assistant and eos; calls, outputs: as often as they are there.
  counts = {t: ids.tolist().count(able._id(t)) for t in chat.TOKENS}
  assert [counts[t] for t in (chat.USER, chat.ASSISTANT, chat.EOS)] == [2, 2, 4]
  assert [counts[t] for t in chat.TOOLS] == [2, 2, 3, 3, 2, 2, 3, 3, 3]


def test_the_text_of_a_conversation():
  assert chat.plain_text(TURNS[1:6]).split('\n') == [
    'Weather in A and B?', '',
    'weather', '{"at": "A"}',
    'weather', '{"at": "B", "days": 2, "why": "f\u00fcr"}',
    'sun', 'rain', 'One more.', 'clock', '{}',
  ]  # fmt: skip
  assert chat.has_tools(TURNS[:3]) and chat.has_tools(TURNS[3:4])
  assert not chat.has_tools(TURNS[:2] + TURNS[7:])


def answer(**fields):
  return [{'role': 'assistant'} | fields]


@pytest.mark.parametrize(
  ('messages', 'expected'),
  [
    ([], 'messages=[] must hold at least one message'),
    ('text', 'messages must be a list of turns'),
    (None, 'messages must be a list of turns'),
    (['text'], 'messages[0] must be an object'),
    (TURNS[:1] + [{'role': 'cat', 'content': ''}],
     "messages[1].role='cat' must be one of: system, user, assistant, tool"),
    ([{'role': ['\n'] * 99, 'content': ''}], "messages[0].role=['\\n', '\\n'"),
    ([{'role': 'user'}], 'messages[0].content must be a string'),
    ([{'role': 'tool', 'content': None}], 'messages[0].content must be a str'),
    (answer(content=None), 'must be a string, or null beside tool_calls'),
    (answer(content=None, tool_calls=[]), 'or null beside tool_calls'),
    (answer(content=3, tool_calls=[call('a', '')]), 'content must be a string'),
    (answer(content='ab\ud800'), 'content has a lone surrogate at character 2'),
    (answer(tool_calls=3), 'messages[0].tool_calls must be a list'),
    (answer(tool_calls=[3]), "tool_calls[0] must have an object in 'function'"),
    (answer(tool_calls=[{'function': 3}]), "must have an object in 'function'"),
    (answer(tool_calls=[call(3, '')]), 'tool_calls[0].function.name must be a'),
    (answer(tool_calls=[call('', '', type=3)]), 'tool_calls[0].type must be a'),
    (answer(tool_calls=[call('a', 3)]), 'function.arguments must be JSON text'),
    (answer(tool_calls=[call('\ud800', '')]), 'name has a lone surrogate'),
    (answer(tool_calls=[call('a', {'\ud800': 1})]), 'arguments has a lone sur'),
    ([{'role': 'user', 'content': '', 'tool_calls': [call('a', '')]}],
     'messages[0].tool_calls must be those of an assistant'),
  ],
)  # fmt: skip
def test_a_bad_conversation_is_one_line(messages, expected):
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    chat.check(messages)
  message = str(caught.value)
  assert len(message) < 200 and message.isprintable()
  if isinstance(messages, list) and all(isinstance(t, dict) for t in messages):
    with pytest.raises(errors.InputError, match=re.escape(expected)):
      test_tokenizer.trained().encode_chat(messages)
