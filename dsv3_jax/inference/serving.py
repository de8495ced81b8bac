"""Runs the server until it is told to stop."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from dsv3_jax import errors
from dsv3_jax.inference import batching, loaded, server, worker


def run(
  model: loaded.LoadedModel,
  *,
  address: tuple[str, int],
  name: str,
  cache_tokens: int,
  max_rows: int,
  max_waiting: int,
  max_tokens: int,
  api_key: str,
) -> None:
  """Serves a model on an address; returns after SIGINT or SIGTERM.

  Answers that are under way then end with an error.

  Args:
    cache_tokens: places of the cache; 0: those of two rows of full length.

  Raises:
    InputError: the address cannot be had.
    SystemExit: 1, where the model failed, which ends the server.
  """
  places = cache_tokens or 2 * model.config.model.max_seq_len
  bound = _bind(address)
  session = batching.Session(
    model.engine.steps,
    num_pages=-(-places // batching.PAGE),
    max_rows=max_rows,
  )
  thread = worker.Worker(session, max_waiting)
  app = server.Server(
    thread, model.tokenizer, name=name, max_tokens=max_tokens, api_key=api_key
  ).app()
  how = {'log_level': 'warning', 'timeout_graceful_shutdown': 2}
  running = _Running(uvicorn.Config(app, **how))
  host, port = bound.getsockname()[:2]
  print(f'serving {name} on http://{host}:{port}', flush=True)
  try:
    asyncio.run(_serve(running, bound, thread))
  finally:
    bound.close()
    thread.close()
  if thread.error is not None:
    raise SystemExit(1)  # the thread has printed why


class _Running(uvicorn.Server):
  """Leaves signals to us: its own way raises them again at the end."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _serve(
  running: _Running, bound: socket.socket, thread: worker.Worker
) -> None:
  """Until a signal, or until the model's thread has ended."""
  loop = asyncio.get_running_loop()
  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, thread.stop)

  async def watch():
    while thread.is_alive:
      await asyncio.sleep(0.1)
    running.should_exit = True

  watching = asyncio.create_task(watch())
  await running.serve([bound])
  watching.cancel()


def _bind(address: tuple[str, int]) -> socket.socket:
  try:
    return socket.create_server(address)
  except OSError as error:
    (host, port), said = address, error.strerror
    raise errors.InputError(f'host={host}, port={port}: {said}') from error
