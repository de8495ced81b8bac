"""The server as a process: how it stops."""

import pathlib
import signal
import subprocess
import sys

import openai
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_CODE = """
import sys, types
from dsv3_jax.data import tokenizer
from dsv3_jax.inference import serving
from tests.inference import counting

made = counting.Steps(280, 0.02, room=600)
decode = made.decode
def fails(*args):
  if made.calls > {most}:
    raise RuntimeError('out of order')
  return decode(*args)
made.decode = fails
space = types.SimpleNamespace
model = space(
  engine=space(steps=made),
  config=made.cfg,
  tokenizer=tokenizer.train(['Hello, world!', 'x = 1'] * 30, 275),
)
serving.run(
  model,
  address=('127.0.0.1', 0),
  name='tiny',
  cache_tokens=0,
  max_rows=2,
  max_waiting=2,
  max_tokens=500,
  api_key='',
)
"""


def begun(most):
  """The process, and a stream that has begun."""
  child = subprocess.Popen(
    [sys.executable, '-c', _CODE.format(most=most)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=_ROOT,
    text=True,
  )
  address = child.stdout.readline().split()[-1]
  ask = openai.OpenAI(base_url=f'{address}/v1', api_key='x', max_retries=0)
  parts = ask.completions.create(
    model='tiny', prompt=[5], max_tokens=500, stream=True
  )
  next(iter(parts))
  return child, ask, parts


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_with_a_word_and_the_process_with_0(number):
  child, ask, parts = begun(10**9)
  with child, ask:
    child.send_signal(number)
    with pytest.raises(openai.APIError, match='the model has ended'):
      list(parts)
    _, err = child.communicate(timeout=30)
  assert (child.returncode, err) == (0, '')


def test_a_model_that_fails_ends_the_process():
  child, ask, parts = begun(5)
  with child, ask:
    with pytest.raises(openai.APIError, match='the model has ended'):
      list(parts)
    _, err = child.communicate(timeout=30)
  assert child.returncode == 1
  assert err.count('RuntimeError: out of order') == 1
