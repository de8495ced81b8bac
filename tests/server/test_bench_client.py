"""What benchmark clients send and measure: vLLM's, SGLang's, guidellm.

All stream, ask for the usage, and want answers of one length.
"""

import codecs
import concurrent.futures
import http.client
import json
import time

import pytest

from tests.inference import counting
from tests.server import web

COUNT = 24  # tokens of an answer
COMPLETION, CHAT = '/v1/completions', '/v1/chat/completions'
_USAGE = {'include_usage': True}
# Beside model, prompt, length and stream=true.
FIELDS = {
  'vllm': {
    'repetition_penalty': 1.0,
    'logprobs': None,
    'stream_options': _USAGE,
    'ignore_eos': True,
    'temperature': 0.0,
  },
  'vllm, all sampling flags': {
    'stream_options': _USAGE,
    'ignore_eos': True,
    'temperature': 0.0,
    'top_p': 1.0,
    'top_k': -1,
    'min_p': 0.0,
    'frequency_penalty': 0.0,
    'presence_penalty': 0.0,
    'repetition_penalty': 1.0,
    'use_beam_search': False,
    'add_special_tokens': True,
    'skip_special_tokens': True,
  },
  'sglang': {
    'temperature': 0.0,
    'stream_options': _USAGE,
    'ignore_eos': True,
  },
  'guidellm': {
    'temperature': 0,
    'stream_options': _USAGE | {'continuous_usage_stats': True},
    'stop': None,
    'ignore_eos': True,
  },
  'triton': {
    'temperature': 0,
    'stream_options': _USAGE,
    'min_tokens': COUNT,
    'ignore_eos': True,
  },
}


def measure(address, path, body):
  """Streams an answer as benchmarks do.

  Returns:
    text; usage of the last chunk; seconds to the first token; seconds from
    token to token; usage of each chunk before the last.
  """
  host, port = address.removeprefix('http://').split(':')
  connection = http.client.HTTPConnection(host, int(port))
  text, usage, ttft, itl, usages = [], None, None, [], []
  start = latest = time.perf_counter()
  connection.request('POST', path, json.dumps(body))
  with connection.getresponse() as response:
    assert response.status == 200, response.read()
    for data in _events(response):
      now = time.perf_counter()
      if not data['choices']:
        usage = data['usage']
        continue
      if ttft is None:
        ttft = now - start
      else:
        itl.append(now - latest)
      latest = now
      choice = data['choices'][0]
      text.append(
        choice['delta'].get('content', '')
        if 'delta' in choice
        else choice['text']
      )
      usages.append(data.get('usage'))
  connection.close()
  return ''.join(text), usage, ttft, itl, usages


def _events(response):
  """Objects of server-sent events, from pieces cut anywhere."""
  decoder, held = codecs.getincrementaldecoder('utf-8')(), ''
  while piece := response.read1(37):
    *messages, held = (held + decoder.decode(piece)).split('\n\n')
    for message in filter(None, map(str.strip, messages)):
      if message.startswith(':'):
        continue
      content = message.removeprefix('data: ')
      if content == '[DONE]':
        return
      yield json.loads(content)
  raise AssertionError('the stream did not end with [DONE]')


def question(path, text):
  """The body's prompt, as the benchmarks spell it."""
  if path == COMPLETION:
    return {'prompt': text, 'max_tokens': COUNT}
  content = [{'type': 'text', 'text': text}]
  messages = [{'role': 'user', 'content': content}]
  return {'messages': messages, 'max_completion_tokens': COUNT}


def expected(tokenizer, path, text):
  """Length of the prompt, and the text that follows, through any end."""
  ids = web.chat_ids(tokenizer, text)
  if path == COMPLETION:
    ids = tokenizer.encode(text, add_bos=True).tolist()
  new = counting.continued(ids, COUNT, 280)
  return len(ids), tokenizer.decode(new, True)


@pytest.mark.parametrize('path', [COMPLETION, CHAT])
@pytest.mark.parametrize('client', FIELDS)
def test_benchmarks_measure_an_answer(served, tokenizer, client, path):
  fields = {'model': 'tiny', 'stream': True} | FIELDS[client]
  if path == CHAT:
    fields.pop('logprobs', None)
  body = fields | question(path, 'Hello, x')
  text, usage, ttft, itl, usages = measure(served[0], path, body)
  length, want = expected(tokenizer, path, 'Hello, x')
  assert text == want
  assert usage == {
    'prompt_tokens': length,
    'completion_tokens': COUNT,
    'total_tokens': length + COUNT,
  }
  assert ttft > 0
  assert len(itl) > COUNT / 3 and all(seconds >= 0 for seconds in itl)
  if client == 'guidellm':
    counts = [x['completion_tokens'] for x in usages[path == CHAT :]]
    assert counts == sorted(counts) and counts[-1] == COUNT
    assert 1 <= counts[0] < COUNT
  else:
    assert not any(usages)


def test_benchmarks_measure_many_at_once(served, tokenizer):
  texts = [f'x = {i}, world!' for i in range(24)]
  fields = {'model': 'tiny', 'stream': True} | FIELDS['vllm']
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    run = lambda text: measure(
      served[0], COMPLETION, fields | question(COMPLETION, text)
    )
    for text, measured in zip(texts, pool.map(run, texts), strict=True):
      assert measured[0] == expected(tokenizer, COMPLETION, text)[1]
      assert measured[1]['completion_tokens'] == COUNT
  web.idle(served[1])


def test_a_benchmark_finds_the_model(served):
  """vLLM's asks for the name of the first model if it is not given."""
  status, body, _ = web.fetch(f'{served[0]}/v1/models')
  assert status == 200 and json.loads(body)['data'][0]['id'] == 'tiny'
