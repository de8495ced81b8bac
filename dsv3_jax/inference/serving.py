"""Runs the server until it is told to stop."""

import asyncio
import socket

import uvicorn

from dsv3_jax import errors
from dsv3_jax.inference import batching, loaded, server, worker


def run(
  model: loaded.LoadedModel,
  *,
  address: tuple[str, int],
  name: str,
  num_pages: int,
  max_rows: int,
  max_waiting: int,
  max_tokens: int,
  api_key: str,
) -> None:
  """Serves a model on an address; returns after SIGINT or SIGTERM.

  Args:
    num_pages: of the cache; 0: as many as two rows of full length take.

  Raises:
    InputError: the address cannot be had.
  """
  full = -(-model.config.model.max_seq_len // batching.PAGE)
  bound = _bind(address)
  session = batching.Session(
    model.engine.steps, num_pages=num_pages or 2 * full, max_rows=max_rows
  )
  thread = worker.Worker(session, max_waiting)
  app = server.Server(
    thread, model.tokenizer, name=name, max_tokens=max_tokens, api_key=api_key
  ).app()
  # Answers that are under way do not keep it from stopping.
  how = {'log_level': 'warning', 'timeout_graceful_shutdown': 2}
  running = uvicorn.Server(uvicorn.Config(app, **how))
  host, port = bound.getsockname()[:2]
  print(f'serving {name} on http://{host}:{port}', flush=True)
  try:
    asyncio.run(running.serve([bound]))
  except KeyboardInterrupt:  # which it raises again when it has stopped
    pass
  finally:
    bound.close()
    thread.close()


def _bind(address: tuple[str, int]) -> socket.socket:
  try:
    return socket.create_server(address)
  except OSError as error:
    host, port = address
    raise errors.InputError(
      f'host={host}, port={port}: {error.strerror}'
    ) from (error)
