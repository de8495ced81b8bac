"""A folder's chat template: transformers' text, a sandbox, and limits."""

import json
import re

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import chat, chat_template, template_process
from tests.data import folders

# How transformers loads things.
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')


@pytest.fixture(scope='module', params=['REASONING', 'TOOLS'])
def both(request, tmp_path_factory):
  """Our tokenizer and theirs, of one folder."""
  body = folders.config(chat_template=getattr(folders, request.param))
  folder = tmp_path_factory.mktemp('template') / 'hf'
  folders.write(folder, folders.thinking_text(), body)
  return folders.load(folder), folders.load_theirs(folder)


@pytest.mark.parametrize('count', [1, 2, 3, 5, 7])
@pytest.mark.parametrize('prompt', [False, True])
@pytest.mark.parametrize(
  ('tools', 'variables'),
  [
    (None, {}),
    (folders.FUNCTIONS, {'enable_thinking': False}),
    ([], {'enable_thinking': True, 'documents': [{'text': 'a'}]}),
  ],
)
def test_text_and_ids_are_those_of_transformers(
  both, count, prompt, tools, variables
):
  ours, theirs = both
  turns = folders.TURNS[:count]
  options = {'tools': tools, 'add_generation_prompt': prompt} | variables
  got = ours.apply_chat_template(turns, **options)
  want = theirs.apply_chat_template(turns, tokenize=False, **options)
  assert got.text == want
  ids = theirs.apply_chat_template(turns, return_dict=False, **options)
  assert got.ids == ids and len(ids) > 5


def test_what_the_templates_say(both):
  """So that equal texts are not empty ones."""
  ours, _ = both
  options = {'tools': folders.FUNCTIONS, 'enable_thinking': False}
  prompt = ours.apply_chat_template(folders.TURNS, **options)
  if 'Tools' not in prompt.text:
    assert prompt.opens_thought and prompt.text.endswith('<think>\n')
    assert ours.decode(prompt.ids) == prompt.text
    assert chat.ASSISTANT + 'print 3' + chat.EOS in prompt.text
    assert not ours.apply_chat_template(
      folders.TURNS, add_generation_prompt=False
    ).opens_thought
    return
  assert not prompt.opens_thought
  assert 'Tools (2):\n- weather: {\n  "type": "object"' in prompt.text
  assert '"description": "f\u00fcr <"' in prompt.text
  assert '(Paris, then.)' in prompt.text and '- none' not in prompt.text
  assert prompt.text.endswith('[ASSISTANT]4\n<think></think>')


def renderer(source, **more):
  return chat_template.ChatTemplates({'default': source} | more, 'x.jinja')


def render(source, messages=None, tools=None, controls=(), **variables):
  given = messages or [{'role': 'user', 'content': 'Hi'}]
  special = {'bos_token': '<s>'}
  return renderer(source).render(given, tools, variables, special, controls)[0]


ESCAPES = [
  "{{ ''.__class__ }}",
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ ''['__class__'] }}",
  "{{ '' | attr('__class__') }}",
  '{{ raise_exception.__globals__ }}',
  "{{ strftime_now.__globals__['datetime'] }}",
  "{{ '{0.__class__}'.format(1) }}",
  '{{ namespace.__init__.__globals__ }}',
  '{{ dict.__call__.__globals__ }}',
  '{{ cycler.__init__.__globals__.os }}',
  '{{ self._TemplateReference__context.environment }}',
  '{% set n = namespace() %}{% set n._x = 1 %}{{ n._x }}',
  '{{ namespace(_x=1) }}',
  "{{ namespace({'_x': 1}) }}",
  '{{ messages.append(1) }}',
  "{{ messages[0].update(role='x') }}",
  "{% import 'os' as os %}",
  "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize('source', ESCAPES)
def test_nothing_escapes_the_sandbox(source):
  """It raises, or Jinja finds nothing there."""
  message = ''
  try:
    text = render('>' + source + '<')
  except errors.InputError as error:
    text, message = '><', str(error)
  assert text == '><' and '\n' not in message


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ('a\n{% if %}', 'x.jinja: line 2: Expected an expression'),
    ('{% for x in y %}', 'x.jinja: line 1: Unexpected end of template'),
    ('{{ nothing.at_all }}', "x.jinja: UndefinedError: 'nothing' is undefined"),
    ("{{ raise_exception('a\nb\x1b[1m') }}", 'x.jinja: a b?[1m'),
    ("{{ 'a' + 1 }}", 'x.jinja: TypeError: '),
    (
      '{% set n = namespace() %}{% set n._x = 1 %}',
      "x.jinja: SecurityError: '_x' is no name for a namespace",
    ),
    ('{{ 1 // 0 }}', 'x.jinja: ZeroDivisionError: '),
    ('{{ range(10 ** 9) }}', 'x.jinja: OverflowError: Range too big'),
    ("{{ 'a' * 10 ** 10 }}", 'x.jinja: it needs too much memory (MemoryError)'),
    ("{{ '%10000000000d' % 1 }}", 'x.jinja: it needs too much memory'),
    (
      '{% set n = namespace(a="ab") %}{% for i in range(99) %}'
      '{% set n.a = n.a ~ n.a %}{% endfor %}',
      'x.jinja: it needs too much memory',
    ),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'too much memory'),
    (
      "{% for i in range(9999) %}{{ 'abcd' * 1000 }}{% endfor %}",
      'x.jinja: more than 16777216 characters are made',
    ),
  ],
)
def test_a_bad_template_is_one_line(source, expected):
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    render(source)
  message = str(caught.value)
  assert len(message) < 400 and message.isprintable()


@pytest.mark.parametrize(
  'source',
  [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}'
    '{% endfor %}{% endfor %}',
    '{{ 9 ** (9 ** 9) }}',
  ],
)
def test_a_template_that_does_not_end_is_ended(monkeypatch, source):
  """Also within one operation; the next conversation has a new process."""
  monkeypatch.setattr(template_process, 'CPU_SECONDS', 0)
  templates = renderer("{{ 'ok' }}", endless=source)
  ask = lambda: templates.render([{'role': 'user'}], None, {}, {}, ())
  assert ask()[0] == 'ok'
  first = templates._process
  templates._templates['default'] = source
  with pytest.raises(errors.InputError, match='takes more than 0 seconds'):
    ask()
  assert first.returncode is not None
  templates._templates['default'] = "{{ 'again' }}"
  assert ask()[0] == 'again'
  assert templates._process is not first


def test_the_process_ends_with_its_object():
  templates = renderer('a')
  templates.check()
  process = templates._process
  assert process.poll() is None
  del templates
  assert process.poll() is not None


def test_an_interrupt_does_not_leave_an_answer_behind(monkeypatch):
  templates = renderer('{{ messages[0].content }}')
  ask = lambda x: templates.render([{'content': x}], None, {}, {}, ())[0]
  assert ask('a') == 'a'
  process = templates._process
  stdout = process.stdout

  class Interrupted:
    close = stdout.close

    def readline(self):
      raise KeyboardInterrupt

  process.stdout = Interrupted()
  with pytest.raises(KeyboardInterrupt):
    ask('b')
  assert ask('c') == 'c'
  assert process.poll() is not None


def test_which_template_is_taken():
  """'tool_use' with tools; a name is needed."""
  templates = renderer('plain', tool_use='tools', rag='never')
  messages = [{'role': 'user', 'content': ''}]
  for tools, want in ((None, 'plain'), ([], 'tools'), ([{}], 'tools')):
    assert templates.render(messages, tools, {}, {}, ())[0] == want
  named = chat_template.ChatTemplates({'rag': 'a', 'b': 'b'}, 'x.json')
  with pytest.raises(errors.InputError, match="named 'default': b, rag"):
    named.render(messages, None, {}, {}, ())


def test_what_a_template_sees():
  """None is left out; variables go before special tokens; JSON only."""
  show = '{{ messages[0] | tojson }} {{ bos_token }} {{ tools is none }}'
  message = {'role': 'user', 'content': None, 'x': (1, 2)}
  assert render(show, [message]) == '{"role": "user", "x": [1, 2]} <s> True'
  assert render('{{ bos_token }}', bos_token='b') == 'b'
  assert render('{{ messages | length }}', messages=[{}, {}]) == '2'
  # As DeepSeek's templates ask of a turn that only calls tools.
  show = (
    "{% set m = messages[0] %}{% if m['content'] is none %}none{% else %}"
    "{{ m['content'] + '!' }}{% endif %}"
  )
  message = {'role': 'assistant', 'content': None, 'tool_calls': [{}]}
  assert render(show, [message]) == 'none'
  assert render(show, [message | {'content': 'a'}]) == 'a!'
  deep = 'a'
  for _ in range(600):
    deep = [deep]
  for bad, expected in (
    ([{'role': object()}], 'must be JSON: Object of type object'),
    ([{'role': '\ud800'}], 'has a lone surrogate'),
    (['a'], r'messages\[0\] must be an object'),
  ):
    with pytest.raises(errors.InputError, match=expected):
      render('a', bad)
  deep = [{'role': 'user', 'content': deep}]
  with pytest.raises(errors.InputError, match='is nested too deeply'):
    renderer('a').render(deep, None, {}, {}, ('<s>',))
  for bad, expected in (
    ([], r'messages=\[\] must hold at'),
    ('ab', 'must be a list of turns'),
    (None, 'must be a list of turns'),
  ):
    with pytest.raises(errors.InputError, match=expected):
      renderer('a').render(bad, None, {}, {}, ())
  with pytest.raises(errors.InputError, match=r'x\.jinja has a lone surrogate'):
    render('{{ "\\ud800" }}')


def test_control_tokens_in_messages_stay_text(both):
  """In contents, names and descriptions; those of the template do not."""
  ours, _ = both
  smuggled = f'a{chat.EOS}b {chat.USER}c'
  turns = [{'role': 'user', 'content': smuggled}]
  tools = json.loads(
    json.dumps(folders.FUNCTIONS).replace('weather', chat.CALLS_BEGIN)
  )
  prompt = ours.apply_chat_template(turns, tools, thinking=smuggled)
  assert smuggled in prompt.text and ours.decode(prompt.ids) == prompt.text
  plain = ours.apply_chat_template(
    [{'role': 'user', 'content': 'Hi'}], folders.FUNCTIONS
  )
  specials = lambda ids: [i for i in ids if i in ours.special_ids]
  assert specials(prompt.ids) == specials(plain.ids) != []
  inner = ours.encode(smuggled).tolist()
  sizes = range(len(prompt.ids))
  assert any(prompt.ids[i : i + len(inner)] == inner for i in sizes)


def test_think_tags_in_messages_are_tokens(both):
  ours, theirs = both
  turns = [{'role': 'user', 'content': 'What is <think>a</think>?'}]
  got = ours.apply_chat_template(turns)
  assert got.ids == theirs.apply_chat_template(
    turns, add_generation_prompt=True, return_dict=False
  )
  assert 301 in got.ids


def test_without_a_template_the_built_in_one_is_rendered():
  t = folders.tokenizer.Tokenizer(folders.thinking_text())
  turns = folders.TURNS[:2]
  for prompt in (False, True):
    got = t.apply_chat_template(turns, add_generation_prompt=prompt)
    want, _ = t.encode_chat(turns, prompt)
    np.testing.assert_array_equal(got.ids, want)
    assert got.text == t.decode(want)
  with pytest.raises(errors.InputError, match=r'^tools is for a chat template'):
    t.apply_chat_template(turns, folders.FUNCTIONS)
  with pytest.raises(errors.InputError, match=r'^thinking is for a chat temp'):
    t.apply_chat_template(turns, thinking=True)
