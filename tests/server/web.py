"""A server on a model that counts, and how tests talk to it."""

import asyncio
import contextlib
import threading
import time
import urllib.error
import urllib.request

import uvicorn

from dsv3_jax.inference import engine
from dsv3_jax.server import app as server_app
from dsv3_jax.server import engine_thread
from dsv3_jax.server import main as server_main
from tests import limits
from tests.inference import counting

TEXTS = ['Hello, world!\n\nx = 1', 'd\u00e9j\u00e0 vu \u2014 \u4f60\u597d']


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
  with server_main.bind('127.0.0.1', 0) as bound:
    config = uvicorn.Config(
      app, log_level='error', timeout_graceful_shutdown=1, ws='none'
    )
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
  import openai  # slow, so not by those who only collect tests

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


def idle(model):
  """Waits until nothing runs; no block is in use then."""
  end = time.monotonic() + limits.HANG
  while model.running or model.waiting:
    assert time.monotonic() < end
    time.sleep(0.01)
  assert model.stats().blocks_in_use == 0
