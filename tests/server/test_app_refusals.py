"""The server as one who wishes it ill meets it, and its failures."""

import json
import socket
import time

import pytest

from tests.inference import counting
from tests.server import web


def test_who_goes_away_is_cancelled(tokenizer):
  with web.serving(tokenizer, seconds=0.02) as (address, model):
    with web.client(address) as ask:
      parts = ask.completions.create(
        model='tiny', prompt=[5], max_tokens=500, stream=True
      )
      next(iter(parts))
      parts.close()
    web.idle(model)
    assert model.counts['abort'] == 1
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
    web.idle(model)
    assert model.counts['abort'] == 2


def test_a_full_queue_is_429(openai, tokenizer):
  with web.serving(tokenizer, 0.02, most_waiting=1, max_rows=1) as (
    address,
    model,
  ):
    ask = web.client(address)
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
    web.idle(model)


def test_a_key_must_be_borne(tokenizer):
  with web.serving(tokenizer, api_key='secret') as (address, _):
    for wrong in ('Bearer', 'Bearer secre', 'Bearer secrets', 'Bearer s\u00e9'):
      code, body, _ = web.fetch(f'{address}/v1/models', authorization=wrong)
      assert code == 401 and 'the API key is missing or wrong' in body
    assert web.fetch(f'{address}/v1/completions', b'{}')[0] == 401
    with web.client(address, 'secret') as ask:
      assert [m.id for m in ask.models.list()] == ['tiny']
    assert web.fetch(f'{address}/health')[0] == 200


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
      b'{"prompt": "a", "max_tokens": -1}',
      'max_tokens=-1 must be in',
    ),
    ('completions', b'{"prompt": "a", "max_tokens": 501}', 'in [0, 500]'),
    ('completions', b'{"prompt": "a", "temperature": NaN}', 'temperature=nan'),
    (
      'completions',
      b'{"prompt": "a", "top_p": 0}',
      'top_p=0 must be in (0, 1]',
    ),
    (
      'completions',
      b'{"prompt": "a", "seed": 1e30}',
      'seed=1e+30 has the wrong',
    ),
    ('completions', b'{"prompt": "a", "stop": [1]}', 'stop must be at most 16'),
    ('completions', b'{"prompt": "a", "echo": 1}', 'echo=1 has the wrong ty'),
    ('completions', b'{"prompt": "\\ud800"}', 'lone surrogate at character 0'),
    ('completions', b'{"guided_regex": "\\ud800"}', 'guided_regex has a lone'),
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
      'the tokenizer lacks the special token',
    ),
  ],
)
def test_wrong_bodies_are_one_line(served, path, body, message):
  code, text, _ = web.fetch(f'{served[0]}/v1/{path}', body)
  error = json.loads(text)['error']
  assert code == 400
  assert message in error['message'] and '\n' not in error['message']
  assert error['type'] == 'invalid_request_error'
  assert served[1].running == served[1].waiting == 0


def test_a_body_that_is_too_long_is_not_read(served):
  code, body, _ = web.fetch(f'{served[0]}/v1/completions', b' ' * (2**20 + 1))
  assert code == 413 and 'at most 1048576 bytes' in body


def test_a_model_that_fails_is_said(openai, tokenizer, capfd):
  runner = counting.Runner(280, 0.02, room=600)
  with web.serving(tokenizer, runner=runner) as (address, _):
    with web.client(address) as ask:
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
    assert web.fetch(f'{address}/health')[0] == 503
  assert 'RuntimeError: out of order' in capfd.readouterr().err


def test_a_model_that_fails_is_said_to_who_waits_for_the_whole(
  openai, tokenizer
):
  runner = counting.Runner(280, room=600)
  runner.fails = True
  with (
    web.serving(tokenizer, runner=runner) as (address, _),
    web.client(address) as ask,
    pytest.raises(openai.InternalServerError, match='the model has ended') as e,
  ):
    ask.completions.create(model='tiny', prompt=[5])
  assert e.value.status_code == 503


def test_pages_of_other_sites_may_not_ask(served):
  other = {'sec-fetch-site': 'cross-site'}
  assert web.fetch(f'{served[0]}/v1/completions', b'{}', **other)[0] == 403
  assert served[1].running == served[1].waiting == 0


def test_a_body_that_breaks_off_is_no_fault(served, capfd):
  host, port = served[0].removeprefix('http://').split(':')
  with socket.create_connection((host, int(port))) as raw:
    raw.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\n')
    raw.sendall(b'content-length: 99\r\n\r\n{"prompt"')
  assert web.fetch(f'{served[0]}/health')[0] == 200
  assert 'Traceback' not in capfd.readouterr().err
