"""Constrained answers, as OpenAI's and vLLM's clients ask for them."""

import json

import pytest

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine, grammar, model_runner
from dsv3_jax.inference import request as requests
from dsv3_jax.server import protocol
from tests import settings
from tests.nn import models as weights
from tests.server import models, web

SCHEMA = {
  'type': 'object',
  'properties': {
    'city': {'enum': ['Oslo', '\u4e1c\u4eac']},
    'size': {'type': 'integer', 'minimum': -5, 'maximum': 20},
    'open': {'type': 'array', 'items': {'type': 'boolean'}, 'maxItems': 2},
    'note': {'type': ['string', 'null'], 'maxLength': 4},
  },
  'required': ['city', 'size', 'open', 'note'],
  'additionalProperties': False,
}


def validate(text):
  """Fails where a text is none that the schema describes."""
  value = json.loads(text)
  assert list(value) == list(SCHEMA['properties'])
  assert value['city'] in ('Oslo', '\u4e1c\u4eac')
  assert type(value['size']) is int and -5 <= value['size'] <= 20
  assert len(value['open']) <= 2
  assert all(type(item) is bool for item in value['open'])
  assert value['note'] is None or len(value['note']) <= 4


JSON_SCHEMA = {
  'type': 'json_schema',
  'json_schema': {'name': 'place', 'schema': SCHEMA, 'strict': True},
}
MESSAGES = [{'role': 'user', 'content': 'Hello'}]


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(web.TEXTS * 30, 280)


@pytest.fixture(scope='module')
def served(tokenizer):
  runner = models.Choosing(models.VOCAB, room=600)
  with web.serving(tokenizer, runner=runner) as server:
    yield server


def texts_of(answer, stream):
  """Text and why it ends, of each choice of either endpoint."""
  texts, reasons = {}, {}
  for part in answer if stream else [answer]:
    for choice in part.choices:
      if hasattr(choice, 'text'):
        text = choice.text
      else:
        text = (choice.delta if stream else choice.message).content
      texts[choice.index] = texts.get(choice.index, '') + text
      reasons[choice.index] = choice.finish_reason
  return [(texts[i], reasons[i]) for i in sorted(texts)]


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_every_answer_is_what_the_schema_describes(ask, seed, stream):
  fields = {'model': 'tiny', 'max_tokens': 300, 'stream': stream}
  more = {'response_format': JSON_SCHEMA}
  completion = ask.completions.create(
    prompt=[5 + seed, 6], n=3, extra_body=more, **fields
  )
  message = {'role': 'user', 'content': 'x' * seed}
  chat = ask.chat.completions.create(messages=[message], **more, **fields)
  answers = texts_of(completion, stream) + texts_of(chat, stream)
  for text, reason in answers:
    assert reason == 'stop'
    validate(text)


def test_an_object_of_any_kind(ask):
  """It may be cut, as it has no bound."""
  answer = ask.chat.completions.create(
    model='tiny',
    messages=MESSAGES,
    response_format={'type': 'json_object'},
    max_tokens=40,
  ).choices[0]
  text = answer.message.content
  assert text[0] == '{'
  if answer.finish_reason == 'stop':
    assert isinstance(json.loads(text), dict)


def test_an_answer_that_is_cut_says_so(ask):
  answer = ask.completions.create(
    model='tiny',
    prompt=[5],
    max_tokens=3,
    extra_body={'response_format': JSON_SCHEMA},
  ).choices[0]
  assert answer.finish_reason == 'length' and answer.text[0] == '{'


@pytest.mark.parametrize(
  ('fields', 'check'),
  [
    ({'guided_json': SCHEMA}, validate),
    ({'guided_json': json.dumps(SCHEMA)}, validate),
    ({'guided_choice': ['yes', 'no']}, ['yes', 'no'].index),
    ({'guided_regex': '[0-7]{3}'}, lambda text: int(text, 8)),
    ({'structured_outputs': {'json': SCHEMA}}, validate),
    ({'structured_outputs': {'choice': ['yes']}}, ['yes'].index),
    ({'structured_outputs': {'regex': '[ab]{4}'}}, lambda x: int(x, 16)),
  ],
  ids=[
    *('guided_json', 'guided_json as text', 'guided_choice', 'guided_regex'),
    *('json', 'choice', 'regex'),
  ],
)
def test_vllm_s_fields(ask, fields, check):
  answer = ask.completions.create(
    model='tiny', prompt=[5], max_tokens=300, extra_body=fields
  ).choices[0]
  assert answer.finish_reason == 'stop'
  check(answer.text)


def test_log_probabilities_are_the_model_s(ask):
  answer = ask.completions.create(
    model='tiny',
    prompt=[5],
    max_tokens=300,
    logprobs=1,
    extra_body={'guided_choice': ['yes']},
  ).choices[0]
  assert answer.text == 'yes'
  logprobs = answer.logprobs.token_logprobs
  assert len(logprobs) >= 2 and all(x < 0 for x in logprobs)


def wrong_schema(schema):
  body = {'name': 'x', 'schema': schema}
  return {'response_format': {'type': 'json_schema', 'json_schema': body}}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'response_format': {'type': 'xml'}}, "response_format.type='xml' must"),
    ({'response_format': {}}, 'response_format.type=None must be text'),
    ({'response_format': 'json'}, "response_format='json' has the wrong type"),
    (
      {'response_format': {'type': 'json_schema'}},
      'response_format.json_schema must be an object',
    ),
    (
      {'response_format': {'type': 'json_schema', 'json_schema': {}}},
      'response_format.json_schema.schema must be an object',
    ),
    (
      {'response_format': {'type': 'json_object', 'json_schema': {}}},
      "response_format.'json_schema' is no field",
    ),
    (wrong_schema(3), 'response_format.json_schema.schema=3 has the wrong'),
    (
      wrong_schema({'type': 'strin'}),
      'response_format.json_schema.schema: .*strin',
    ),
    ({'guided_json': '{'}, 'guided_json must be JSON'),
    ({'guided_json': '3'}, 'guided_json=3 has the wrong type'),
    ({'guided_choice': []}, 'guided_choice must be a list of texts'),
    ({'guided_choice': ['']}, 'guided_choice must be a list of texts'),
    ({'guided_regex': '('}, 'guided_regex: '),
    ({'guided_grammar': 'x'}, "guided_grammar='x' is not supported here"),
    (
      {'structured_outputs': {'grammar': 'x'}},
      "structured_outputs.grammar='x' is not supported",
    ),
    ({'structured_outputs': {}}, 'structured_outputs must have one of'),
    (
      {'structured_outputs': {'json': {}, 'regex': 'a'}},
      'structured_outputs must have one of',
    ),
    (
      {'guided_regex': 'a', 'guided_choice': ['a']},
      'give one of: guided_regex, guided_choice',
    ),
    (
      {'guided_regex': 'a', 'ignore_eos': True},
      'ignore_eos=true has no meaning with a constrained answer',
    ),
  ],
)
@pytest.mark.parametrize('is_chat', [False, True])
def test_wrong_constraints_are_one_line(tokenizer, fields, message, is_chat):
  limits = protocol.Limits(
    model='tiny',
    max_choices=20,
    max_tokens=500,
    vocab_size=models.VOCAB,
    seed=7,
  )
  body = {'messages': MESSAGES} if is_chat else {'prompt': 'a'}
  parse = protocol.parse_chat if is_chat else protocol.parse_completion
  with pytest.raises(errors.InputError, match=message) as caught:
    parse(body | fields, tokenizer, limits)
  assert '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def runner():
  cfg = settings.small(
    precision='f32',
    model__vocab_size=models.VOCAB,
    model__num_layers=2,
    model__max_seq_len=600,
    model__rope__original_seq_len=600,
  )
  params, router_biases = map(weights.f32, weights.random_params(cfg))
  return model_runner.ModelRunner(cfg, params, router_biases)


def answers(runner, *submitted):
  """Requests after all of their tokens, in steps of one size."""
  model_engine = engine.Engine(
    runner, num_blocks=40, max_rows=4, min_rows=4, min_blocks=8, chunk=64
  )
  for request in submitted:
    model_engine.add(request)
  while not model_engine.is_idle:
    model_engine.step()
  return submitted


def test_a_random_model_follows_a_schema_and_disturbs_nobody(runner, tokenizer):
  """Rows beside a constrained one keep their tokens and all bits of these."""
  compiled = grammar.Compiler(tokenizer, models.VOCAB).json_schema(SCHEMA, 'x')
  stops = frozenset([tokenizer.eos_id])
  make = lambda i, **options: requests.Request(
    [5 + i, 6],
    450 if options else 60,
    requests.SamplingParams(
      temperature=1.0 if i % 2 else 0.0, top_p=0.9, seed=i, logprobs=3
    ),
    stops if options else frozenset(),
    **options,
  )
  plain = answers(runner, make(0), make(1))
  beside = answers(
    runner,
    make(0),
    make(1),
    make(1, matcher=compiled.matcher()),
    make(3, matcher=compiled.matcher()),
  )
  for mine, theirs in zip(beside, plain, strict=False):
    assert mine.tokens == theirs.tokens
    assert mine.logprobs == theirs.logprobs
  for request in beside[2:]:
    assert request.finish_reason == 'stop'
    validate(tokenizer.decode(request.tokens, skip_special=True))
  assert beside[2].tokens != beside[3].tokens
