"""A model with its own chat template, ends of answers and defaults."""

import json

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data import tokenizer_files
from dsv3_jax.server import protocol, tokenize_protocol
from tests.data import folders
from tests.inference import counting
from tests.server import web

THINK = 300  # the tag's id, the last of a prompt but for a line end
END = 41  # a token of text that ends answers
THOUGHT, ANSWER = 'add(1, 2)', 'print 3'


class Runner(counting.Runner):
  """Thinks, answers, and ends with a token of text."""

  def __init__(self, tokenizer):
    super().__init__(302, room=2000)
    thought, answer = map(tokenizer.encode, (THOUGHT, ANSWER))
    self._script = [*thought, THINK + 1, *answer, END]
    self.temperatures = set()

  def extend(self, rows, caches, arrays):
    self.temperatures.add(round(float(max(arrays.temperature_B)), 3))
    return super().extend(rows, caches, arrays)

  prefill = extend

  def following(self, row):
    at = len(row) - row.tolist().index(THINK) - 2
    return self._script[at] if at < len(self._script) else 42


@pytest.fixture(scope='module')
def tokenizer():
  settings = tokenizer_files.TokenizerSettings(
    templates={'default': folders.REASONING}, origin='x', eos_ids=(1, END)
  )
  return tokenizers.Tokenizer(folders.thinking_text(), settings)


@pytest.fixture(scope='module')
def served(tokenizer):
  with web.serving(tokenizer, runner=Runner(tokenizer)) as server:
    yield server


MESSAGES = [{'role': 'user', 'content': 'What is 1 + 2?'}]


@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_that_begins_within_a_thought(served, openai, stream):
  """Its end is a token of text that is none of the answer."""
  with web.client(served[0]) as ask:
    fields = {'model': 'tiny', 'messages': MESSAGES, 'stream': stream}
    response = ask.chat.completions.create(**fields)
    if not stream:
      (choice,) = response.choices
      parts, reason = [choice.message], choice.finish_reason
    else:
      chunks = list(response)
      parts = [chunk.choices[0].delta for chunk in chunks]
      reason = chunks[-1].choices[0].finish_reason
  thoughts = [getattr(part, 'reasoning_content', None) for part in parts]
  assert ''.join(filter(None, thoughts)) == THOUGHT
  assert ''.join(part.content or '' for part in parts) == ANSWER
  assert reason == 'stop'


def test_a_template_that_refuses_is_400(served):
  body = {'model': 'tiny', 'messages': [{'role': 'tool', 'content': ''}]}
  body['messages'] = [*MESSAGES, {'role': 'cat', 'content': ''}]
  data = json.dumps(body).encode()
  status, text, _ = web.fetch(f'{served[0]}/v1/chat/completions', data)
  assert status == 400
  assert json.loads(text)['error']['message'] == 'x: No role cat here.'


LIMITS = {'model': 'tiny', 'max_choices': 20, 'max_tokens': 500}
LIMITS |= {'vocab_size': 302, 'seed': 7}


def test_prompts_are_rendered(tokenizer):
  limits = protocol.Limits(**LIMITS)
  prompt = tokenizer.apply_chat_template(MESSAGES)
  parsed = protocol.parse_chat({'messages': MESSAGES}, tokenizer, limits)
  assert parsed.prompts == [prompt.ids] and parsed.opens_thought
  body = {'messages': MESSAGES, 'add_generation_prompt': False}
  ids = tokenize_protocol.parse_tokenize(body, tokenizer, limits)
  assert prompt.ids[: len(ids)] == ids and THINK not in ids


def test_defaults_of_the_model_go_behind_fields(tokenizer):
  sampling = {'temperature': 0.6, 'top_k': 20, 'repetition_penalty': 1.1}
  limits = protocol.Limits(**LIMITS, sampling=sampling)
  body = {'messages': MESSAGES, 'temperature': 0, 'top_k': None}
  for parse, more in (
    (protocol.parse_chat, {}),
    (protocol.parse_completion, {'prompt': 'a'}),
  ):
    given = {k: v for k, v in body.items() if not more or k != 'messages'}
    got = parse(given | more, tokenizer, limits).sampling
    assert (got.temperature, got.top_k, got.top_p) == (0.0, 20, 1.0)
    assert got.repetition_penalty == 1.1
  plain = protocol.parse_chat(body, tokenizer, protocol.Limits(**LIMITS))
  assert (plain.sampling.top_k, plain.sampling.repetition_penalty) == (0, 1.0)


def test_a_server_has_the_defaults_of_its_model(tokenizer):
  runner, sampling = Runner(tokenizer), {'temperature': 0.625}
  with web.serving(tokenizer, runner=runner, sampling=sampling) as server:
    for more, want in (({}, 0.625), ({'temperature': 0.25}, 0.25)):
      runner.temperatures.clear()
      data = json.dumps({'messages': MESSAGES} | more).encode()
      assert web.fetch(f'{server[0]}/v1/chat/completions', data)[0] == 200
      assert runner.temperatures == {want}
