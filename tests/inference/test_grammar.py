"""Which tokens a grammar allows, and which grammars are refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import chat, tokenizer_files
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import grammar

VOCAB = 330  # of the model: more than the tokenizer has
TEXTS = ['{"name": "x", "age": 3}\n\n', 'd\u00e9j\u00e0 vu \u4f60\u597d']


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(TEXTS * 30, 290, tools=True)


@pytest.fixture(scope='module')
def compiler(tokenizer):
  return grammar.Compiler(tokenizer, VOCAB)


def ids_of(bits_v):
  bits_V = np.unpackbits(bits_v.view(np.uint8), bitorder='little')
  return np.flatnonzero(bits_V).tolist()


def accepts(compiled, tokenizer, text):
  """Whether a grammar allows a text, token by token, and its end."""
  matcher, tokens = compiled.matcher(), []
  for token in [*tokenizer.encode(text).tolist(), tokenizer.eos_id]:
    if token not in ids_of(matcher.allowed(tokens)):
      return False
    tokens.append(token)
  return not matcher.failed


SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'maxLength': 3},
    'age': {'type': 'integer', 'minimum': 0, 'maximum': 120},
  },
  'required': ['name', 'age'],
  'additionalProperties': False,
}


@pytest.mark.parametrize(
  ('text', 'is_right'),
  [
    ('{"name": "x", "age": 3}', True),
    ('{"name":"\u4f60","age":120}', True),
    ('{\n  "name": "",\n  "age": 0\n}', True),
    ('{"name": "xxxx", "age": 3}', False),
    ('{"name": "x", "age": 121}', False),
    ('{"name": "x"}', False),
    ('{"name": "x", "age": 3, "b": 1}', False),
    ('{"name": "x", "age": 3', False),
    ('{"name":  "x", "age": 3}', False),  # white space has a bound
    (' {"name": "x", "age": 3}', False),
  ],
)
def test_a_schema_allows_what_it_describes(compiler, tokenizer, text, is_right):
  compiled = compiler.json_schema(SCHEMA, 'schema')
  assert accepts(compiled, tokenizer, text) == is_right


def test_other_kinds(compiler, tokenizer):
  accept = lambda compiled, text: accepts(compiled, tokenizer, text)
  date = compiler.regex('[0-9]{4}-[0-9]{2}', 'regex')
  assert accept(date, '2026-11') and not accept(date, '2026-1')
  choice = compiler.choice(['a "b"', 'a', '\u4f60\u597d'], 'choice')
  assert accept(choice, 'a') and accept(choice, 'a "b"')
  assert accept(choice, '\u4f60\u597d') and not accept(choice, 'b')
  anything = compiler.json_schema({'type': 'object'}, 'schema')
  assert accept(anything, '{"a": [1, {"b": null}]}')
  assert not accept(anything, '[1]')


def test_the_end_comes_only_where_the_grammar_may_end(compiler, tokenizer):
  matcher = compiler.regex('a{2,3}', 'regex').matcher()
  (letter,) = tokenizer.encode('a').tolist()
  ends = []
  for count in range(4):
    ids = ids_of(matcher.allowed([letter] * count))
    ends.append(tokenizer.eos_id in ids)
    assert (letter in ids) == (count < 3)
  assert ends == [False, False, True, True]


def test_no_special_token_and_no_padding_is_text(compiler, tokenizer):
  compiled = compiler.regex('(?s:.*)', 'regex')
  ids = set(ids_of(compiled.matcher().allowed([])))
  assert tokenizer.eos_id in ids and len(ids) > 128
  assert ids & tokenizer.special_ids == {tokenizer.eos_id}
  assert max(ids) < tokenizer.vocab_size < VOCAB


def test_matchers_do_not_share_their_state_and_go_back(compiler, tokenizer):
  compiled = compiler.regex('ab|cd', 'regex')
  a, b, c, d = (tokenizer.encode(x).tolist()[0] for x in 'abcd')
  first, second = compiled.matcher(), compiled.matcher()
  assert ids_of(first.allowed([a])) == [b]
  assert ids_of(second.allowed([c])) == [d]
  assert ids_of(first.allowed([])) == sorted([a, c])  # after a preemption
  assert ids_of(first.allowed([c])) == [d]


def test_what_the_grammar_does_not_allow_ends_the_answer(compiler, tokenizer):
  matcher = compiler.regex('ab', 'regex').matcher()
  tokens = tokenizer.encode('z').tolist()
  assert ids_of(matcher.allowed(tokens)) == [tokenizer.eos_id]
  assert matcher.failed


CALL = (
  chat.CALL_BEGIN + 'function' + chat.SEPARATOR + 'f\n```json\n{"x": 1}\n```'
  + chat.CALL_END
)  # fmt: skip


@pytest.mark.parametrize(
  ('body', 'one', 'several'),
  [
    ([CALL], True, True),
    ([CALL, '\n', CALL], False, True),
    ([CALL.replace('"x": 1', '"x": "a"')], False, False),
    ([CALL.replace('f\n', 'g\n').replace('"x": 1', '')], True, True),
    ([CALL.replace('f\n', 'h\n')], False, False),
    ([], False, False),
  ],
)
def test_calls_of_tools(compiler, tokenizer, body, one, several):
  x = {'type': 'object', 'properties': {'x': {'type': 'integer'}}}
  x['required'] = ['x']
  functions = [{'name': 'f', 'parameters': x}, {'name': 'g'}]
  parts = []
  for text in [chat.CALLS_BEGIN, *body, chat.CALLS_END]:
    for token in chat.TOOLS:
      text = text.replace(token, f'\0{token}\0')
    parts += [part for part in text.split('\0') if part]
  tokens = []
  for part in parts:
    own = tokenizer.tool_ids.get(part)
    tokens += tokenizer.encode(part).tolist() if own is None else [own]
  for parallel, want in ((False, one), (True, several)):
    matcher = compiler.tool_calls(
      functions, parallel=parallel, where='tools'
    ).matcher()
    got = all(
      token in ids_of(matcher.allowed(tokens[:i]))
      for i, token in enumerate([*tokens, tokenizer.eos_id])
    )
    assert got == want


@pytest.mark.parametrize(
  ('schema', 'message'),
  [
    ({'type': 'strin'}, 'strin'),
    ({'type': 'object', 'properties': 3}, 'properties'),
    ({'$ref': 'https://example.com/x.json'}, 'example.com'),
    ({'type': 'string', 'pattern': '(?=a)b'}, 'look'),
    ({'type': 'string', 'pattern': '('}, 'regex'),
    ({'type': 'string', 'format': 'credit-card'}, 'credit-card'),
    ({'type': 'integer', 'minimum': 3, 'maximum': 2}, '3'),
    ({'enum': ['x' * 2**16]}, 'at most 65536'),
    ({'not': {'type': 'string'}}, 'not'),
  ],
  ids=str,
)
def test_wrong_schemas_are_one_line(compiler, schema, message):
  with pytest.raises(errors.InputError) as caught:
    compiler.json_schema(schema, 'field')
  text = str(caught.value)
  assert text.startswith('field') and message in text and '\n' not in text
  assert len(text) < 400


# Each takes a parser long, or much of its stack, if nothing bounds it.
HOSTILE = (
  ('regex', '(((((a{1,999}){1,999}){1,999}){1,999}){1,999})'),
  ('regex', '(' * 10_000 + 'a' + ')' * 10_000),
  ('regex', '(a|aa|aaa)*' * 2000),
  ('regex', '[^a]{0,20000}b[^a]{0,20000}'),
  ('regex', '|'.join(f'(.*{i}.*)' for i in range(3000))),
  ('schema', {'$ref': '#'}),
  ('schema', {'$defs': {'a': {'$ref': '#/$defs/a'}}, '$ref': '#/$defs/a'}),
  ('schema', {'enum': [f'{i}' for i in range(6000)]}),
  ('schema', {'type': 'array', 'items': {}, 'minItems': 10**9}),
  ('schema', {'type': 'string', 'minLength': 10**9}),
  ('schema', {'type': 'number', 'multipleOf': 1e-300}),
  ('schema', {'type': 'integer', 'minimum': 0, 'maximum': 10**300}),
  ('schema', {'properties': {f'{i}': {} for i in range(5000)}}),
  *(
    ('nested', [keyword, depth])
    for keyword in ('anyOf', 'allOf', 'items')
    for depth in (50, 100, 900)
  ),
)
_RUN_HOSTILE = """
import json, sys, time
import numpy as np
from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data import tokenizer_files
from dsv3_jax.inference import grammar

tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
compiler = grammar.Compiler(tokenizer, tokenizer.vocab_size)
compiler.regex('a', 'warm up')
for kind, value in json.load(sys.stdin):
  if kind == 'nested':
    schema, (keyword, depth) = {'type': 'array'}, value
    for i in range(depth):
      schema = {keyword: schema if keyword == 'items' else [schema, {}]}
    kind, value = 'schema', schema
  times = [time.monotonic()]
  try:
    make = compiler.regex if kind == 'regex' else compiler.json_schema
    matcher, tokens = make(value, 'field').matcher(), []
    for _ in range(20):
      times.append(time.monotonic())
      allowed_v = matcher.allowed(tokens)
      times.append(time.monotonic())
      bits = np.unpackbits(allowed_v.view(np.uint8), bitorder='little')
      bit = int(np.flatnonzero(bits)[-1])
      tokens.append(bit)
      if bit == tokenizer.eos_id:
        break
    status = 'failed' if matcher.failed else 'ran'
  except errors.InputError as error:
    status = f'refused: {error}'
  seconds = np.diff([*times, time.monotonic()])[::2]
  print(json.dumps([status, *seconds.round(3).tolist()]), flush=True)
"""


def test_no_grammar_stops_the_process(tokenizer, tmp_path):
  """Hostile ones are refused, or run; nothing overflows a stack."""
  path = tmp_path / 'tokenizer.json'
  tokenizer.save(path)
  done = subprocess.run(
    [sys.executable, '-c', _RUN_HOSTILE, path],
    input=json.dumps(HOSTILE),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == len(HOSTILE)
  statuses = {}
  for (kind, value), (status, *_) in zip(HOSTILE, lines, strict=True):
    # What grows too large only after some tokens ends the answer there.
    assert status in ('ran', 'failed') or status.startswith('refused: field')
    assert '\n' not in status
    statuses[kind, json.dumps(value)[:20]] = status
  endless = statuses['schema', '{"$ref": "#"}']
  assert 'it allows no text' in endless
  many = statuses['schema', json.dumps({'properties': {'0': {}}})[:20]]
  assert 'too big' in many


def test_training_does_not_load_the_library():
  code = 'import sys, dsv3_jax.server.main; print("llguidance" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'False'


@pytest.mark.parametrize(
  ('eos_ids', 'end'), [((7,), 7), ((7, 1), 1), (None, 1)]
)
def test_an_answer_ends_with_a_token_that_ends_answers(tokenizer, eos_ids, end):
  """A folder may name others than the eos of its tokenizer."""
  names = {'eos_token': tokenizer.named_token('eos_token')}  # and no bos
  settings = tokenizer_files.TokenizerSettings(
    special_tokens=names, eos_ids=eos_ids
  )
  other = tokenizers.Tokenizer(tokenizer.text, settings)
  compiler = grammar.Compiler(other, VOCAB)
  compiler.load()
  matcher = compiler.choice(['a'], 'choice').matcher()
  tokens = other.encode('a').tolist()
  matcher.allowed(tokens[:-1])
  assert ids_of(matcher.allowed(tokens)) == [end]


def test_without_a_token_that_ends_answers_constraints_are_refused(tokenizer):
  settings = tokenizer_files.TokenizerSettings(special_tokens={})
  compiler = grammar.Compiler(
    tokenizers.Tokenizer(tokenizer.text, settings), VOCAB
  )
  compiler.load()  # a server starts
  with pytest.raises(errors.InputError, match='no token that ends an answer'):
    compiler.choice(['a'], 'choice')
