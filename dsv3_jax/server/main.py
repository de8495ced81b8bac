"""Runs the server until it is told to stop."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from dsv3_jax import errors
from dsv3_jax.inference import engine, llm, warmup
from dsv3_jax.server import app as server_app
from dsv3_jax.server import engine_thread


def bind(host: str, port: int) -> socket.socket:
  """A socket on an address, of IPv4 or IPv6; nobody is let in yet.

  Raises:
    InputError: the address cannot be had.
  """
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    bound = socket.socket(family)
    try:
      bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      bound.bind(address)
    except OSError:
      bound.close()
      raise
  except OSError as error:
    said = error.strerror
    raise errors.InputError(f'host={host}, port={port}: {said}') from error
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
  invariant: bool,
) -> None:
  """Serves a model on a bound socket; returns after SIGINT or SIGTERM.

  Answers that are under way then end with an error.

  Args:
    cache_tokens: places of the cache; 0: those of two rows of full length.
    warm_up: compiles ahead; `/health` is 503 and requests wait until then.
    invariant: as in `batching.Session`.

  Raises:
    SystemExit: 1, where the model failed, which ends the server.
  """
  longest = model.config.model.max_seq_len
  places = cache_tokens or 2 * longest
  session = engine.Engine(
    model.engine.steps,
    num_pages=-(-places // engine.PAGE),
    max_rows=max_rows,
    least_pages=warmup.least_pages(min(longest, places)),
    invariant=invariant,
  )
  warm = warmup.sizes(session, min(longest, places)) if warm_up else []
  progress = lambda done: _say_progress(done, len(warm))
  thread = engine_thread.Worker(session, max_waiting, warm, progress)
  app = server_app.Server(
    thread, model.tokenizer, name=name, max_tokens=max_tokens, api_key=api_key
  ).app()
  how = {'log_level': 'warning', 'timeout_graceful_shutdown': 2}
  running = _Running(uvicorn.Config(app, **how))
  try:
    asyncio.run(_serve(running, bound, thread, name))
  finally:
    bound.close()
    thread.close()
  if thread.error is not None:
    raise SystemExit(1)  # the thread has printed why


def _say_progress(done: int, count: int) -> None:
  end = '\r' if sys.stderr.isatty() and done < count else '\n'
  said = f'compiled {done} of {count} sizes of steps'
  print(said, end=end, file=sys.stderr, flush=True)


class _Running(uvicorn.Server):
  """Leaves signals to us: its own way raises them again at the end."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _serve(
  running: _Running,
  bound: socket.socket,
  thread: engine_thread.Worker,
  name: str,
) -> None:
  """Until a signal, or until the model's thread has ended."""
  loop = asyncio.get_running_loop()
  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, thread.stop)

  async def watch():
    while thread.is_alive and not (thread.is_ready and running.started):
      await asyncio.sleep(0.1)
    if thread.is_alive:
      print(f'serving {name} on {_url(bound)}', flush=True)
    while thread.is_alive:
      await asyncio.sleep(0.1)
    running.should_exit = True

  watching = asyncio.create_task(watch())
  await running.serve([bound])
  watching.cancel()


def _url(bound: socket.socket) -> str:
  host, port = bound.getsockname()[:2]
  is_v6 = bound.family == socket.AF_INET6
  return f'http://[{host}]:{port}' if is_v6 else f'http://{host}:{port}'
