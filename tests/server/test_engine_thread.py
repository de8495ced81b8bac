"""The engine in its own thread: each token is reported once."""

import queue
import threading

import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import engine
from dsv3_jax.inference import request as requests
from dsv3_jax.server import engine_thread
from tests import limits
from tests.inference import counting


@pytest.fixture
def start():
  """Makes workers that are closed in the end."""
  threads = []

  def begin(most_waiting=100, max_rows=4, runner=None, **options):
    runner = runner or counting.Runner(**options)
    model_engine = engine.Engine(runner, num_blocks=30, max_rows=max_rows)
    threads.append(engine_thread.EngineThread(model_engine, most_waiting))
    return threads[-1]

  yield begin
  for one in threads:
    one.close()


class Client:
  """Puts the outputs of its request into a queue."""

  def __init__(self, model, prompt, count):
    self.outputs = queue.Queue()
    self.request = requests.Request(prompt, count)
    model.submit(self.request, self.outputs.put)

  def tokens(self):
    """All, up to the last."""
    tokens = []
    while True:
      output = self.outputs.get(timeout=limits.HANG)
      assert output.request is self.request
      tokens.append(output.token)
      if output.is_last:
        assert self.outputs.empty()
        return tokens


def test_many_threads_get_their_own_tokens(start):
  model = start()
  rng = np.random.default_rng(0)
  cases = [
    (rng.integers(0, 23, rng.integers(1, 150)).tolist(), int(n))
    for n in rng.integers(1, 30, 40)
  ]
  got = [None] * len(cases)

  def ask(i):
    got[i] = Client(model, *cases[i]).tokens()

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=limits.HANG)
  assert got == [counting.continued(*case) for case in cases]
  assert model.counts['length'] == len(cases) == model.counts['requests']
  assert model.counts['tokens'] == sum(count for _, count in cases)
  assert model.stats().blocks_in_use == 0


def test_a_cancelled_request_is_silent_and_releases_its_blocks(start):
  model = start(seconds=0.01)
  stays = Client(model, [1, 2, 3], 60)
  goes = Client(model, [4, 5, 6], 300)
  goes.outputs.get(timeout=limits.HANG)
  model.cancel(goes.request)
  model.cancel(goes.request)
  count = goes.outputs.qsize()
  assert stays.tokens() == counting.continued([1, 2, 3], 60)
  assert goes.outputs.qsize() <= count + 1
  assert model.counts['abort'] == 1
  assert model.stats().blocks_in_use == 0


def test_one_that_is_cancelled_before_it_is_read_never_runs(start):
  runner = counting.Runner()
  runner.may_run.clear()
  model = start(runner=runner)
  first = Client(model, [1], 3)
  second = Client(model, [2], 300)
  model.cancel(second.request)
  runner.may_run.set()
  first.tokens()
  assert second.outputs.empty()
  assert model.running == model.waiting == 0


def test_a_full_queue_refuses_and_opens_again(start):
  runner = counting.Runner()
  model = start(runner=runner, most_waiting=2, max_rows=1)
  runner.may_run.clear()
  clients = [Client(model, [i], 2) for i in (1, 2, 3)]
  with pytest.raises(engine_thread.QueueFull):
    Client(model, [4], 2)
  assert model.counts['refused'] == 1
  runner.may_run.set()
  for client in clients:
    client.tokens()
  assert Client(model, [4], 2).tokens() == counting.continued([4], 2)


def test_bad_requests_are_refused_in_the_caller_s_thread(start):
  model = start()
  with pytest.raises(errors.InputError, match='the prompt is empty'):
    Client(model, [], 3)
  with pytest.raises(errors.InputError, match='ids outside'):
    Client(model, [99], 3)


def test_an_error_of_the_model_reaches_all(start):
  runner = counting.Runner(seconds=0.01)
  model = start(runner=runner, max_rows=1)
  clients = [Client(model, [i], 300) for i in (1, 2)]
  clients[0].outputs.get(timeout=limits.HANG)
  runner.fails = True
  assert clients[0].tokens()[-1] is clients[1].tokens()[-1] is None
  assert str(model.error) == 'out of order'
  with pytest.raises(engine_thread.Closed):
    Client(model, [1], 1)


def test_an_error_before_a_request_is_read_reaches_it(start, monkeypatch):
  model = start(seconds=0.05)
  first = Client(model, [1], 300)
  first.outputs.get(timeout=limits.HANG)

  def fails(*args):
    raise RuntimeError('no device')

  monkeypatch.setattr(engine.Engine, 'add', fails)
  others = [Client(model, [i], 3) for i in (2, 3)]
  assert [other.tokens() for other in others] == [[None], [None]]
  assert first.tokens()[-1] is None


def test_idle_rows_count_as_room(start):
  runner = counting.Runner()
  model = start(runner=runner, most_waiting=1, max_rows=4)
  runner.may_run.clear()
  clients = [Client(model, [i], 5) for i in range(5)]
  with pytest.raises(engine_thread.QueueFull):
    Client(model, [9], 1)
  assert model.waiting + model.running == 5
  runner.may_run.set()
  for client in clients:
    client.tokens()
  assert model.waiting == 0


def test_close_aborts_those_who_wait(start):
  model = start(seconds=0.01)
  client = Client(model, [1], 300)
  client.outputs.get(timeout=limits.HANG)
  model.close()
  assert client.tokens()[-1] is None
  assert model.error is None
