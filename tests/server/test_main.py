"""The server as a process: how it stops."""

import asyncio
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from dsv3_jax import errors
from dsv3_jax.server import main as server_main
from tests import limits

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_CODE = """
import sys, types
from dsv3_jax.data import tokenizer
from dsv3_jax.server import main
from tests.inference import counting

runner = counting.Runner(280, 0.02, room=600)
decode = runner.decode
def fails(*args):
  if runner.calls > {most}:
    raise RuntimeError('out of order')
  return decode(*args)
runner.decode = fails
space = types.SimpleNamespace
model = space(
  runner=runner,
  config=runner.cfg,
  tokenizer=tokenizer.train(['Hello, world!', 'x = 1'] * 30, 275),
  sampling_defaults={{}},
)
main.run(
  model,
  main.bind({host!r}, 0),
  name='tiny',
  cache_tokens=0,
  max_rows=2,
  max_waiting=2,
  max_tokens=500,
  api_key='',
  batch_invariant=False,
  warm_up={warm_up},
)
"""


def begun(openai, most, **options):
  """The process, and a stream that has begun."""
  options = {'host': '127.0.0.1', 'warm_up': False} | options
  child = subprocess.Popen(
    [sys.executable, '-c', _CODE.format(most=most, **options)],
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


@pytest.mark.parametrize(
  ('number', 'host', 'warm_up'),
  [
    (signal.SIGTERM, '127.0.0.1', True),
    pytest.param(signal.SIGINT, '::1', False, marks=pytest.mark.nightly),
  ],
)
def test_a_signal_ends_streams_with_a_word_and_the_process_with_0(
  openai, number, host, warm_up
):
  """Also at an address of IPv6, and after a warm-up that says how far it is."""
  child, ask, parts = begun(openai, 10**9, host=host, warm_up=warm_up)
  with child, ask:
    assert ask.base_url.host == host
    child.send_signal(number)
    with pytest.raises(openai.APIError, match='the model has ended'):
      list(parts)
    _, err = child.communicate(timeout=limits.HANG)
  assert child.returncode == 0
  count = err.count('\n')
  assert (count > 0) == warm_up
  message = f'of {count} sizes of steps'
  assert err.splitlines() == [
    f'compiled {i} {message}' for i in range(1, count + 1)
  ]


def test_a_port_that_is_taken_is_said():
  with server_main.bind('127.0.0.1', 0) as bound:
    bound.listen()
    with pytest.raises(errors.InputError, match='Address already in use'):
      server_main.bind(*bound.getsockname())
  with pytest.raises(errors.InputError, match='host=::1%nowhere, port=1:'):
    server_main.bind('::1%nowhere', 1)


def test_a_model_that_fails_ends_the_process(openai):
  child, ask, parts = begun(openai, 5)
  with child, ask:
    with pytest.raises(openai.APIError, match='the model has ended'):
      list(parts)
    _, err = child.communicate(timeout=limits.HANG)
  assert child.returncode == 1
  assert err.count('RuntimeError: out of order') == 1


@pytest.mark.parametrize('host', ['127.0.0.1', '::1'])
def test_no_write_waits_for_an_acknowledgement(host):
  """Of an answer's head by its body, or of a streamed token by the next."""
  options = []

  async def accept(reader, writer):
    accepted = writer.get_extra_info('socket')
    options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    writer.close()

  async def connect(bound):
    async with await asyncio.start_server(accept, sock=bound):
      reader, writer = await asyncio.open_connection(*bound.getsockname()[:2])
      assert not await reader.read()
      writer.close()

  with server_main.bind(host, 0) as bound:
    asyncio.run(connect(bound))
  assert len(options) == 1 and options[0]
