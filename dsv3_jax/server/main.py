"""Runs the server until a signal, or until the model fails."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn

from dsv3_jax import errors
from dsv3_jax.inference import engine, llm, warmup
from dsv3_jax.server import app as server_app
from dsv3_jax.server import engine_thread

_OPTIONS = {
  'log_level': 'warning',
  'timeout_graceful_shutdown': 2,
  'ws': 'none',  # or it depends on what is installed
}


def bind(host: str, port: int) -> socket.socket:
  """A socket bound to an IPv4 or IPv6 address, which does not listen yet.

  Raises:
    InputError: the address cannot be bound.
  """
  try:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = infos[0]
    # With the protocol's number, or asyncio leaves TCP_NODELAY off: the second
    # write of an answer would wait 40 ms for the first one's acknowledgement.
    bound = socket.socket(family, kind, protocol)
    try:
      bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      bound.bind(address)
    except OSError:
      bound.close()
      raise
  except OSError as error:
    reason = error.strerror
    raise errors.InputError(f'host={host}, port={port}: {reason}') from error
  return bound


def run(
  model: llm.LLM,
  bound: socket.socket,
  *,
  name: str,
  cache_tokens: int,
  max_rows: int,
  max_waiting: int,
  max_tokens: int,
  api_key: str,
  warm_up: bool,
  batch_invariant: bool,
) -> None:
  """Serves a model on a bound socket; returns after SIGINT or SIGTERM.

  Unfinished answers then end with an error.

  Args:
    cache_tokens: size of the cache; 0: two rows of full length.
    warm_up: compile first; until then `/health` is 503 and requests wait.
    batch_invariant: as in `engine.Engine`.

  Raises:
    SystemExit: with code 1 if the model failed, which ends the server.
  """
  longest = model.config.model.max_seq_len
  cache_tokens = cache_tokens or 2 * longest
  longest = min(longest, cache_tokens)
  model_engine = engine.Engine(
    model.runner,
    num_blocks=-(-cache_tokens // engine.BLOCK_SIZE),
    max_rows=max_rows,
    min_blocks=warmup.min_blocks(longest),
    batch_invariant=batch_invariant,
  )
  shapes = warmup.shapes(model_engine, longest) if warm_up else []
  thread = engine_thread.EngineThread(
    model_engine,
    max_waiting,
    shapes,
    lambda done: _print_progress(done, len(shapes)),
  )
  server = server_app.Server(
    thread,
    model.tokenizer,
    name=name,
    max_tokens=max_tokens,
    api_key=api_key,
    sampling=model.sampling_defaults,
  )
  if warm_up:
    threading.Thread(target=server.grammars.load, daemon=True).start()
  http_server = _Server(uvicorn.Config(server.app(), **_OPTIONS))
  try:
    asyncio.run(_serve(http_server, bound, thread, name))
  finally:
    bound.close()
    thread.close()
  if thread.error is not None:
    raise SystemExit(1)  # the thread has printed why


def _print_progress(done: int, count: int) -> None:
  end = '\r' if sys.stderr.isatty() and done < count else '\n'
  message = f'compiled {done} of {count} sizes of steps'
  print(message, end=end, file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
  """Does not handle signals: uvicorn would raise them again at the end."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _serve(
  http_server: _Server,
  bound: socket.socket,
  thread: engine_thread.EngineThread,
  name: str,
) -> None:
  """Serves until a signal, or until the engine's thread has ended."""
  loop = asyncio.get_running_loop()
  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, thread.stop)

  async def watch():
    while thread.is_alive and not (thread.is_ready and http_server.started):
      await asyncio.sleep(0.1)
    if thread.is_alive:
      print(f'serving {name} on {_url(bound)}', flush=True)
    while thread.is_alive:
      await asyncio.sleep(0.1)
    http_server.should_exit = True

  watching = asyncio.create_task(watch())
  await http_server.serve([bound])
  watching.cancel()


def _url(bound: socket.socket) -> str:
  host, port = bound.getsockname()[:2]
  is_v6 = bound.family == socket.AF_INET6
  return f'http://[{host}]:{port}' if is_v6 else f'http://{host}:{port}'
