"""The server as OpenAI's own client meets it, and as one who wishes it ill."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import uvicorn

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine
from dsv3_jax.server import app as server_app
from dsv3_jax.server import engine_thread
from tests.inference import counting

TEXTS = ['Hello, world!\n\nx = 1', 'd\u00e9j\u00e0 vu \u2014 \u4f60\u597d']


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(TEXTS * 30, 280)


@contextlib.contextmanager
def serving(
  tokenizer,
  seconds=0.0,
  most_waiting=200,
  max_rows=16,
  warm=(),
  runner=None,
  **options,
):
  """(address, worker) of a server on a model that counts, or on `runner`."""
  runner = runner or counting.Runner(280, seconds, room=600)
  model_engine = engine.Engine(runner, num_blocks=100, max_rows=max_rows)
  model = engine_thread.EngineThread(model_engine, most_waiting, warm)
  options = {'name': 'tiny', 'max_tokens': 500} | options
  app = server_app.Server(model, tokenizer, **options).app()
  with socket.socket() as bound:
    bound.bind(('127.0.0.1', 0))
    config = uvicorn.Config(app, log_level='error', timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    run = lambda: asyncio.run(running.serve([bound]))
    thread = threading.Thread(target=run)
    thread.start()
    try:
      while not running.started:
        time.sleep(0.01)
      yield f'http://127.0.0.1:{bound.getsockname()[1]}', model
    finally:
      running.should_exit = True
      thread.join()
      model.close()


@pytest.fixture(scope='module')
def served(tokenizer):
  with serving(tokenizer) as server:
    yield server


def fetch(url, body=None, **headers):
  """(status, body, headers) of an answer, whatever it is."""
  request = urllib.request.Request(url, body, headers)
  try:
    answer = urllib.request.urlopen(request)
  except urllib.error.HTTPError as error:
    answer = error
  with answer:
    return answer.status, answer.read().decode(), answer.headers


def client(address, key='none'):
  return openai.OpenAI(base_url=f'{address}/v1', api_key=key, max_retries=0)


def text_of(tokenizer, prompt, count):
  """What the counting model says, up to the end of the sentence."""
  ids = counting.continued(prompt, count, 280)
  ends = tokenizer.eos_id in ids
  ids = ids[: ids.index(tokenizer.eos_id)] if ends else ids
  return tokenizer.decode(ids), 'stop' if ends else 'length'


def chat_ids(tokenizer, text):
  messages = [{'role': 'user', 'content': text}]
  return tokenizer.encode_chat(messages, True)[0].tolist()


def test_completions(served, tokenizer):
  ids = tokenizer.encode('Hello', add_bos=True).tolist()
  text, finish = text_of(tokenizer, ids, 9)
  with client(served[0]) as ask:
    fields = {'model': 'tiny', 'max_tokens': 9}
    response = ask.completions.create(prompt='Hello', **fields)
    assert (response.choices[0].text, response.choices[0].finish_reason) == (
      text,
      finish,
    )
    assert response.usage.prompt_tokens == len(ids)
    two = ask.completions.create(prompt=[ids, ids[:1]], n=2, **fields)
    texts = [choice.text for choice in two.choices]
    other, _ = text_of(tokenizer, ids[:1], 9)
    assert texts == [text, text, other, other]
    parts = ask.completions.create(prompt=ids, stream=True, **fields)
    assert ''.join(part.choices[0].text for part in parts) == text


def test_chat_streams_what_it_says_at_once(served, tokenizer):
  text, finish = text_of(tokenizer, chat_ids(tokenizer, 'Hello'), 30)
  fields = {'model': 'tiny', 'max_completion_tokens': 30}
  fields['messages'] = [{'role': 'user', 'content': 'Hello'}]
  with client(served[0]) as ask:
    response = ask.chat.completions.create(**fields)
    assert response.choices[0].message.content == text
    assert response.choices[0].message.role == 'assistant'
    options = {'include_usage': True}
    parts = ask.chat.completions.create(
      stream=True, stream_options=options, **fields
    )
    *parts, last = list(parts)
    assert parts[0].choices[0].delta.role == 'assistant'
    assert ''.join(p.choices[0].delta.content for p in parts) == text
    assert parts[-1].choices[0].finish_reason == finish
    assert last.usage.completion_tokens >= 1 and not last.choices


def test_what_newer_clients_send(served, tokenizer):
  text, _ = text_of(tokenizer, chat_ids(tokenizer, 'Hello'), 9)
  parts = [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]
  with client(served[0]) as ask:
    response = ask.chat.completions.create(
      model='tiny',
      messages=[{'role': 'user', 'content': parts}],
      max_tokens=9,
      store=False,
      tool_choice='none',
      parallel_tool_calls=False,
    )
    assert response.choices[0].message.content == text
    again = [{'role': 'developer', 'content': 'x'}, response.choices[0].message]
    response = ask.chat.completions.create(
      model='tiny', messages=[*again, {'role': 'user', 'content': 'x'}]
    )
    assert response.usage.prompt_tokens > 4
    with pytest.raises(openai.BadRequestError, match='best_of=2 is not'):
      ask.completions.create(model='tiny', prompt='a', best_of=2)


def test_the_model_has_one_name(served):
  with client(served[0]) as ask:
    assert ask.models.retrieve('tiny').id == 'tiny'
    wrong = [
      lambda: ask.models.retrieve('org/other'),
      lambda: ask.completions.create(model='other', prompt='a'),
      lambda: ask.chat.completions.create(
        model='other', messages=[{'role': 'user', 'content': 'a'}]
      ),
    ]
    for call in wrong:
      with pytest.raises(openai.NotFoundError, match='is not served') as caught:
        call()
      assert caught.value.code == 'model_not_found'
      assert caught.value.type == 'invalid_request_error'
  code, body, _ = fetch(f'{served[0]}/v1/nothing')
  assert code == 404 and 'invalid_request_error' in body


def test_several_answers_compute_their_prompt_once(tokenizer):
  with serving(tokenizer) as (address, model), client(address) as ask:
    ids = list(range(100)) * 3
    response = ask.completions.create(
      model='tiny', prompt=ids, n=5, max_tokens=9, temperature=0
    )
    want, _ = text_of(tokenizer, ids, 9)
    assert [choice.text for choice in response.choices] == [want] * 5
    assert model.counts['cached_tokens'] == 4 * 299
    idle(model)


def test_a_long_text_holds_up_nobody(tokenizer):
  begun, may_end = threading.Event(), threading.Event()

  class Slow(tokenizers.Tokenizer):
    def encode(self, *args, **options):
      begun.set()
      assert may_end.wait(30)
      return super().encode(*args, **options)

  slow = Slow(tokenizer.text)
  with serving(slow) as (address, _), client(address) as ask:
    fields = {'model': 'tiny', 'max_tokens': 1}
    say = lambda: ask.completions.create(prompt='Hello', **fields)
    thread = threading.Thread(target=say)
    thread.start()
    assert begun.wait(30)
    assert fetch(f'{address}/health')[0] == 200
    response = ask.completions.create(prompt=[5], **fields)
    assert response.usage.prompt_tokens == 1 and thread.is_alive()
    may_end.set()
    thread.join()


def test_it_is_unwell_until_it_is_warm(tokenizer, monkeypatch):
  may_end = threading.Event()
  wait = lambda self, shape: may_end.wait(30)
  monkeypatch.setattr(engine.Engine, 'warm_up', wait)
  warm = [engine.StepShape(1, 1, 1, 'decode')]
  with serving(tokenizer, warm=warm) as (address, _), client(address) as ask:
    code, body, _ = fetch(f'{address}/health')
    assert code == 503 and 'the model warms up' in body
    fields = {'model': 'tiny', 'prompt': [5], 'max_tokens': 1}
    parts = ask.completions.create(stream=True, **fields)
    may_end.set()
    assert len(list(parts)) == 1  # it has waited
    assert fetch(f'{address}/health')[0] == 200


def test_a_stop_cuts_the_text_and_frees_the_row(served, tokenizer):
  ids = tokenizer.encode('Hello', add_bos=True).tolist()
  text, _ = text_of(tokenizer, ids, 200)
  stop = text[10:13]
  with client(served[0]) as ask:
    response = ask.completions.create(
      model='tiny', prompt=ids, max_tokens=200, stop=[stop]
    )
  assert response.choices[0].text == text[: text.index(stop)]
  assert response.choices[0].finish_reason == 'stop'
  assert response.usage.completion_tokens < 200
  idle(served[1])


def idle(model):
  """Waits until nothing runs; no block is in use then."""
  end = time.monotonic() + 20
  while model.running or model.waiting:
    assert time.monotonic() < end
    time.sleep(0.01)
  assert model.stats().blocks_in_use == 0


def test_64_streams_at_once_get_their_own(served, tokenizer):
  address, model = served

  async def one(ask, i):
    ids = tokenizer.encode(f'x = {i}, world!' * (1 + i % 9)).tolist()
    count = 20 + i
    parts = await ask.completions.create(
      model='tiny', prompt=ids, max_tokens=count, stream=True
    )
    texts = [part.choices[0].text async for part in parts]
    assert ''.join(texts) == text_of(tokenizer, ids, count)[0]

  async def all_of_them():
    options = {'base_url': f'{address}/v1', 'api_key': 'x', 'max_retries': 0}
    async with openai.AsyncOpenAI(**options) as ask:
      await asyncio.gather(*(one(ask, i) for i in range(64)))

  before = model.counts['requests']
  asyncio.run(all_of_them())
  assert model.counts['requests'] - before == 64
  idle(model)


def test_who_goes_away_is_cancelled(tokenizer):
  with serving(tokenizer, seconds=0.02) as (address, model):
    with client(address) as ask:
      parts = ask.completions.create(
        model='tiny', prompt=[5], max_tokens=500, stream=True
      )
      next(iter(parts))
      parts.close()
    idle(model)
    assert model.counts['cancelled'] == 1
    host, port = address.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port))) as raw:
      body = json.dumps({'prompt': [5], 'max_tokens': 500}).encode()
      raw.sendall(
        b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: '
        + f'{len(body)}\r\n\r\n'.encode()
        + body
      )
      while not model.running:
        time.sleep(0.01)
    idle(model)
    assert model.counts['cancelled'] == 2


def test_a_full_queue_is_429(tokenizer):
  with serving(tokenizer, 0.02, most_waiting=1, max_rows=1) as (address, model):
    ask = client(address)
    fields = {'model': 'tiny', 'prompt': [5], 'stream': True}
    streams = [ask.completions.create(max_tokens=400, **fields)]
    next(iter(streams[0]))
    streams.append(ask.completions.create(max_tokens=2, **fields))
    with pytest.raises(openai.RateLimitError, match='try again later'):
      ask.completions.create(max_tokens=2, **fields)
    with pytest.raises(openai.RateLimitError):  # all or none of several
      ask.completions.create(max_tokens=2, n=2, **fields)
    with pytest.raises(openai.BadRequestError, match='n \\* prompts=3 must'):
      ask.completions.create(max_tokens=2, n=3, **fields)
    assert model.waiting == 1
    for stream in streams:
      stream.close()
    ask.close()
    idle(model)


def test_a_key_must_be_borne(tokenizer):
  with serving(tokenizer, api_key='secret') as (address, _):
    for wrong in ('Bearer', 'Bearer secre', 'Bearer secrets', 'Bearer s\u00e9'):
      code, body, _ = fetch(f'{address}/v1/models', authorization=wrong)
      assert code == 401 and 'the API key is missing or wrong' in body
    assert fetch(f'{address}/v1/completions', b'{}')[0] == 401
    with client(address, 'secret') as ask:
      assert [m.id for m in ask.models.list()] == ['tiny']
    assert fetch(f'{address}/health')[0] == 200


@pytest.mark.parametrize(
  ('path', 'body', 'message'),
  [
    ('completions', b'{', 'the body must be JSON'),
    ('completions', b'[' * 100_000, 'the body must be JSON'),
    ('completions', b'[]', 'the body must be a JSON object'),
    ('completions', b'{"prompt": "a", "beams": 2}', "'beams' is no field"),
    ('completions', b'{"prompt": 3}', 'prompt=3 has the wrong type'),
    ('completions', b'{"prompt": []}', 'prompt=[] must hold at least one'),
    ('completions', b'{"prompt": [[]]}', 'the prompt is empty'),
    ('completions', b'{"prompt": [true]}', 'prompt[0] must be a string'),
    ('completions', b'{"prompt": [999]}', 'ids outside 0..279'),
    ('completions', b'{"prompt": "a", "n": true}', 'n=True has the wrong type'),
    ('completions', b'{"prompt": "a", "n": 99}', 'n=99 must be in [1, 16]'),
    (
      'completions',
      b'{"prompt": "a", "max_tokens": 0}',
      'max_tokens=0 must be in',
    ),
    ('completions', b'{"prompt": "a", "max_tokens": 501}', 'in [1, 500]'),
    ('completions', b'{"prompt": "a", "temperature": NaN}', 'temperature=nan'),
    (
      'completions',
      b'{"prompt": "a", "top_p": 0}',
      'top_p=0 must be in (0, 1]',
    ),
    ('completions', b'{"prompt": "a", "seed": -1}', 'seed=-1 must be in'),
    ('completions', b'{"prompt": "a", "stop": [1]}', 'stop must be at most 16'),
    ('completions', b'{"prompt": "a", "echo": true}', 'echo=True is not supp'),
    ('completions', b'{"prompt": "\\ud800"}', 'lone surrogate at character 0'),
    ('completions', b'{"\\ud800": 1}', "'\\ud800' is no field"),
    ('completions', b'{"a\\nb": 1}', "'a\\nb' is no field"),
    ('completions', b'{"user": [' + b'1,' * 9999 + b'1]}', 'user=[1, 1, 1'),
    (
      'completions',
      b'{"prompt": "a", "stream_options": {"x": 1}}',
      'stream_options is for stream=true only',
    ),
    ('chat/completions', b'{}', 'messages=[] must hold'),
    ('chat/completions', b'{"messages": ["a"]}', 'messages[0] must be an'),
    (
      'chat/completions',
      b'{"messages": [{"role": "tool", "content": "a"}]}',
      "messages[0].role='tool' must be",
    ),
  ],
)
def test_wrong_bodies_are_one_line(served, path, body, message):
  code, text, _ = fetch(f'{served[0]}/v1/{path}', body)
  error = json.loads(text)['error']
  assert code == 400
  assert message in error['message'] and '\n' not in error['message']
  assert error['type'] == 'invalid_request_error'
  assert served[1].running == served[1].waiting == 0


def test_a_body_that_is_too_long_is_not_read(served):
  code, body, _ = fetch(f'{served[0]}/v1/completions', b' ' * (2**20 + 1))
  assert code == 413 and 'at most 1048576 bytes' in body


def test_metrics_count(tokenizer):
  with serving(tokenizer) as (address, _):
    with client(address) as ask:
      for _ in range(2):
        ask.completions.create(model='tiny', prompt=[3] * 200, max_tokens=5)
    _, body, _ = fetch(f'{address}/metrics')
  lines = dict(
    line.rsplit(' ', 1) for line in body.splitlines() if line[0] != '#'
  )
  assert float(lines['dsv3_requests_total']) == 2
  assert float(lines['dsv3_prompt_tokens_total']) == 400
  assert float(lines['dsv3_found_tokens_total']) == 192
  assert float(lines['dsv3_pages_in_use']) == 0
  assert float(lines['dsv3_pages']) == 100


def test_a_model_that_fails_is_said(tokenizer, capfd):
  runner = counting.Runner(280, 0.02, room=600)
  with serving(tokenizer, runner=runner) as (address, _):
    with client(address) as ask:
      parts = ask.completions.create(
        model='tiny', prompt=[5], max_tokens=400, stream=True
      )
      next(iter(parts))
      runner.fails = True
      with pytest.raises(openai.APIError, match='the model has ended'):
        list(parts)
      with pytest.raises(openai.InternalServerError) as caught:
        ask.completions.create(model='tiny', prompt=[5])
    assert caught.value.status_code == 503
    assert fetch(f'{address}/health')[0] == 503
  assert 'RuntimeError: out of order' in capfd.readouterr().err


def test_pages_of_other_sites_may_not_ask(served):
  other = {'sec-fetch-site': 'cross-site'}
  assert fetch(f'{served[0]}/v1/completions', b'{}', **other)[0] == 403
  assert served[1].running == served[1].waiting == 0


def test_a_body_that_breaks_off_is_no_fault(served, capfd):
  host, port = served[0].removeprefix('http://').split(':')
  with socket.create_connection((host, int(port))) as raw:
    raw.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\n')
    raw.sendall(b'content-length: 99\r\n\r\n{"prompt"')
  assert fetch(f'{served[0]}/health')[0] == 200
  assert 'Traceback' not in capfd.readouterr().err


def test_the_page_is_there(served):
  code, text, headers = fetch(served[0])
  assert code == 200 and '/v1/chat/completions' in text
  assert headers['content-type'].startswith('text/html')
