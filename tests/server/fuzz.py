"""Fuzzes requests to the server: each gets an answer, or a reason in one line.

  python -m tests.server.fuzz 100000 [seed]

All go through sockets to uvicorn, the app and the engine. The model only
counts, but its tokens are sampled as a real model's are.
"""

import contextlib
import gc
import http.client
import json
import logging
import pathlib
import resource
import socket
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import request as requests
from dsv3_jax.inference import sampling
from dsv3_jax.server import responses
from tests import fuzzing, limits
from tests.inference import counting
from tests.server import fuzz_requests, web

_ROWS = 16  # of a step at most
_EVERY = 200  # requests between two looks at the whole server
_PLAIN = b'{"prompt": "Hello", "seed": 3, "top_p": 0.9, "logprobs": 2}'
# Whatever the number of requests: a variable or two holds the last ones.
_HELD, _MORE_BYTES = 4, 300 * 2**20


class SamplingRunner(counting.Runner):
  """Samples, with what it counts the likeliest, if any row is special."""

  def _sampled(self, output, rows, arrays):
    if not _is_special(arrays, self.vocab):
      return output
    next_B = output.tokens_Bt[:, 0]
    place_B = np.take_along_axis(rows.index_BT, rows.last_B[:, None], 1)[:, 0]
    logits_BV = np.float32((next_B[:, None] * 7 + np.arange(self.vocab)) % 5)
    logits_BV[np.arange(len(next_B)), next_B] = 8
    args = jax.tree.map(_padded, (logits_BV, arrays, place_B))
    new_B, logprobs = jax.device_get(_sample(*args))
    split = lambda x: x[: len(next_B), None]
    return output._replace(
      tokens_Bt=split(new_B), logprobs=jax.tree.map(split, logprobs)
    )

  @property
  def vocab(self):
    return self.cfg.model.vocab_size

  def extend(self, rows, caches, arrays):
    output, caches = super().extend(rows, caches, arrays)
    return self._sampled(output, rows, arrays), caches

  prefill = extend

  def decode(self, rows, caches, arrays):
    output, caches = super().decode(rows, caches, arrays)
    return self._sampled(output, rows, arrays), caches


def _is_special(arrays, vocab):
  adjustments = arrays.adjustments
  return (
    np.any(arrays.top_p_B < 1)
    or np.any(arrays.min_p_B > 0)
    or np.any(adjustments.repetition_B != 1)
    or np.any(adjustments.presence_B != 0)
    or np.any(adjustments.frequency_B != 0)
    or np.any(adjustments.bias_ids_BK < vocab)
    or np.any(adjustments.is_constrained_B)
  )


def _padded(x):
  """One row, or as many as a step can have: few programs."""
  if len(x) == 1:
    return x
  more = [(0, _ROWS - len(x))] + [(0, 0)] * (x.ndim - 1)
  return np.pad(x, more, mode='edge')


@jax.jit
def _sample(logits_BV, arrays, place_B):
  # Penalties count the likeliest token: this model keeps no others.
  last_B1 = jnp.argmax(logits_BV, axis=1, keepdims=True)
  row_tokens = sampling.RowTokens(last_B1, jnp.ones_like(place_B))
  new_B = sampling.sample(logits_BV, arrays, place_B, row_tokens)
  wanted = jnp.any(arrays.logprobs_B)
  return new_B, sampling.logprobs(logits_BV, new_B, wanted)


class _Client:
  """Sends cases to a server, over one connection while that is possible."""

  def __init__(self, address: str):
    host, port = address.removeprefix('http://').split(':')
    self._at, self._connection = (host, int(port)), None

  def close(self) -> None:
    if self._connection is not None:
      self._connection.close()
      self._connection = None

  def send(self, case: fuzz_requests.Case) -> tuple[int, str, bytes] | None:
    """Status, type and body of the answer; None: the client left, or no answer.

    Raises:
      OSError, HTTPException: the answer is none, except of broken HTTP.
    """
    if case.closes or case.leaves:
      self.close()
    is_new = self._connection is None
    try:
      return self._send(case)
    except (OSError, http.client.HTTPException):
      self.close()
      if not case.is_http:
        return None  # closed at once
      if is_new:
        raise
    return self._send(case)  # the server had closed an idle connection

  def _send(self, case):
    if self._connection is None:
      # Longer only if it hangs.
      self._connection = socket.create_connection(self._at, limits.HANG)
    try:
      self._connection.sendall(case.data)
    except ConnectionError:  # it need not read all of what it refuses
      if case.is_http:
        raise
    if case.leaves:
      self.close()
      return None
    with http.client.HTTPResponse(self._connection, method=case.method) as got:
      got.begin()
      kind, body = got.getheader('content-type', ''), got.read()
      if got.will_close or case.closes:
        self.close()
      return got.status, kind, body


def _strict(text: str | bytes):
  """JSON as every parser reads it: no NaN, no lone surrogate."""

  def refuse(name):
    raise ValueError(name)

  value = json.loads(text, parse_constant=refuse)
  json.dumps(value, ensure_ascii=False).encode()
  return value


def _check_error(status: int, body: bytes) -> None:
  assert 400 <= status < 500, status
  error = _strict(body)['error']
  assert error.keys() == {'message', 'type', 'param', 'code'}
  message = error['message']
  assert len(message.splitlines()) == 1 and len(message) < 1000, message
  assert message.isprintable() and error['type'].endswith('_error')


def _check_answer(path: str, kind: str, body: bytes) -> None:
  if path == '/tokenize':
    answer = _strict(body)
    assert answer['count'] == len(answer['tokens'])
    assert answer['max_model_len'] == fuzz_requests.ROOM
  elif path == '/detokenize':
    assert isinstance(_strict(body)['prompt'], str)
  elif kind.startswith('text/event-stream'):
    *events, last, end = body.decode().split('\n\n')
    assert (last, end) == ('data: [DONE]', '')
    chunks = [_strict(event.removeprefix('data: ')) for event in events]
    choices = [choice for chunk in chunks for choice in chunk['choices']]
    ends = [choice['index'] for choice in choices if choice['finish_reason']]
    assert sorted(ends) == list(range(1 + max(ends)))
  else:
    answer = _strict(body)
    usage, choices = answer['usage'], answer['choices']
    assert all(c['finish_reason'] in ('stop', 'length') for c in choices)
    assert [c['index'] for c in choices] == list(range(len(choices)))
    assert usage['total_tokens'] == sum(
      usage[f'{name}_tokens'] for name in ('prompt', 'completion')
    )


def check(case: fuzz_requests.Case, client: _Client) -> bool | None:
  """Sends one case; whether it was accepted, None if none of both is meant.

  Raises:
    AssertionError: the answer is neither.
  """
  answer = client.send(case)
  if answer is None or not case.is_http:
    assert answer is None or 400 <= answer[0] < 500, answer[0]
    return None
  status, kind, body = answer
  if case.method == 'HEAD' or not kind.startswith(
    ('application/json', 'text/e')
  ):
    assert status in (200, 405), status
    return None
  if status != 200:
    _check_error(status, body)
  elif case.data.split(b' ', 2)[1] == case.path.encode():
    _check_answer(case.path, kind, body)
  return status == 200


@contextlib.contextmanager
def _serving() -> Iterator[tuple]:
  """The address and the engine's thread; nothing of it is left afterwards."""
  threads = set(threading.enumerate())
  rooms = {'max_tokens': fuzz_requests.MAX_TOKENS, 'max_rows': _ROWS}
  runner = SamplingRunner(fuzz_requests.VOCAB, room=fuzz_requests.ROOM)
  bpe = tokenizers.train(web.TEXTS * 30, fuzz_requests.VOCAB)
  serving = web.serving(bpe, runner=runner, **rooms)
  with serving as (address, model), _logged() as faults:
    yield address, model, faults
  left = [x for x in threading.enumerate() if x not in threads]
  assert not left, left
  assert not faults, faults


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
  """A list that grows by what is logged as an error, with its traceback."""
  faults, handler = [], logging.Handler(logging.ERROR)
  handler.emit = lambda record: faults.append(handler.format(record))
  loggers = [logging.getLogger(name) for name in ('uvicorn', 'asyncio')]
  for logger in loggers:
    logger.addHandler(handler)
  yield faults
  for logger in loggers:
    logger.removeHandler(handler)


def _plain(client: _Client) -> dict:
  """The answer to a plain request, which is the same each time."""
  case = fuzz_requests.plain('/v1/completions', _PLAIN)
  status, _, body = client.send(case)
  assert status == 200, body
  answer = _strict(body)
  return {'choices': answer['choices'], 'usage': answer['usage']}


def _held() -> int:
  """Requests and streams that are still in memory."""
  gc.collect()
  kinds = (requests.Request, responses.ResponseStream)
  return sum(type(x) in kinds for x in gc.get_objects())


def _peak() -> int:
  """The most bytes that the process had; Linux counts kB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(folder: pathlib.Path, count: int, seed: int = 0) -> dict[str, list]:
  """Sends `count` requests; by path, how many were accepted and refused.

  Raises:
    AssertionError: with the case, or whatever it was that a case raised.
  """
  del folder
  counts = {path: [0, 0] for path in fuzz_requests.PATHS}
  with _serving() as (address, model, faults):
    client = _Client(address)
    want, before = _plain(client), None
    for i, case in enumerate(fuzz_requests.cases(seed, count)):
      try:
        accepted = check(case, client)
        assert not faults and model.error is None, faults
        if i % _EVERY == 0:
          web.idle(model)
          assert _plain(client) == want
      except BaseException as error:
        error.add_note(f'request {i} of seed {seed}: {case!r:.5000}')
        raise
      if accepted is not None:
        counts[case.path][not accepted] += 1
      if i == count // 4:
        before = _peak()
      if (i + 1) % 10_000 == 0:
        print(f'{i + 1}: [accepted, refused] {counts}', flush=True)
    client.close()
    web.idle(model)
    assert _plain(client) == want
    client.close()
    assert _held() <= _HELD
  assert _peak() < before + _MORE_BYTES, (before, _peak())
  return counts


if __name__ == '__main__':
  fuzzing.main(run, sys.argv)
