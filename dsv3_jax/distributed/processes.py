"""A job of several processes: how they join, agree and end together.

All run the same program on the same values; what none may do alone is to
decide. What they say to each other goes through the key-value store of JAX's
coordinator, in the first process. That needs no device, so a thread beside
training may use it. Alone, a process agrees with itself and nothing is sent.

A process is told that it is one of several by the environment:

  JAX_COORDINATOR_ADDRESS=HOST:PORT  of the first process
  JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=I

or, where JAX knows the cluster (SLURM, TPU pods), by `cluster=True`.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsv3_jax import errors

_ADDRESS, _COUNT, _INDEX = ENVIRONMENT = (
  'JAX_COORDINATOR_ADDRESS',
  'JAX_NUM_PROCESSES',
  'JAX_PROCESS_ID',
)
# A process that is dead is found by its missing heartbeats, one that is stuck
# by its own watchdog; so nobody has to guess how long work may take.
_HEARTBEAT_SECONDS = 60
_SHUTDOWN_SECONDS = 30
_MEET_SECONDS = 10
_EVER_MS = 7 * 24 * 3600 * 1000


class PeerError(RuntimeError):
  """Another process of the job failed; says which, and how."""


@dataclasses.dataclass
class _Job:
  """client: of the key-value store. told: what the first has yet to delete."""

  client: Any
  index: int
  count: int
  said: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  told: list[str] = dataclasses.field(default_factory=list)

  def key(self, name: str) -> str:
    """A new one at each call, the same in all processes."""
    self.said[name] += 1
    return f'dsv3/{name}/{self.said[name]}'


_job: _Job | None = None


def index() -> int:
  """Of this process; 0 alone writes and prints."""
  return _job.index if _job else 0


def count() -> int:
  """Of processes in the job."""
  return _job.count if _job else 1


def from_environment(
  environment: Mapping[str, str],
) -> tuple[str, int, int] | None:
  """Address, count and index from the environment; None if it tells nothing.

  Raises:
    InputError: one of the three is missing, or wrong.
  """
  given = {name: environment.get(name, '') for name in ENVIRONMENT}
  if not any(given.values()):
    return None
  for name, value in given.items():
    if not value:
      raise errors.InputError(
        f'{name} is missing: a process of a job needs {", ".join(ENVIRONMENT)}'
      )
  host, _, port = given[_ADDRESS].rpartition(':')
  if not host or not _is_int(port):
    raise errors.InputError(f'{_ADDRESS}={given[_ADDRESS]} must be HOST:PORT')
  if not _is_int(given[_COUNT]) or int(given[_COUNT]) < 1:
    raise errors.InputError(f'{_COUNT}={given[_COUNT]} must be a number >= 1')
  most = int(given[_COUNT])
  if not _is_int(given[_INDEX]) or int(given[_INDEX]) >= most:
    raise errors.InputError(
      f'{_INDEX}={given[_INDEX]} must be a number < {_COUNT}={most}'
    )
  return given[_ADDRESS], most, int(given[_INDEX])


def _is_int(text: str) -> bool:
  return text.isascii() and text.isdigit()


@contextlib.contextmanager
def joined(cluster: bool = False) -> Iterator[None]:
  """Makes this process one of its job, if it is one of several.

  Only the first process prints to stdout. After an InputError that all
  processes meet they end together; after one that this process meets alone, or
  any other exception, it ends at once: others may wait for it, and notice.

  Raises:
    InputError: the environment is wrong, or `cluster` and there is none.
  """
  global _job
  found = from_environment(os.environ)
  if cluster and found:
    raise errors.InputError(
      f'--cluster and {_ADDRESS}={found[0]}: only one may describe the job'
    )
  if not cluster and (found is None or found[1] == 1):
    yield
    return
  _job = _join(found)
  quiet = contextlib.redirect_stdout(None if _job.index else sys.stdout)
  try:
    with quiet:
      yield
    barrier('end')  # the first may have more to do
  except errors.InputError as error:
    _end_together(error)
    raise
  except BaseException as error:  # noqa: BLE001 - the others may wait for us
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
  _leave()


def _end_together(error: errors.InputError) -> None:
  """Leaves if all processes met the error; else ends this one."""
  try:
    _job.client.wait_at_barrier('dsv3/failed', 1000 * _MEET_SECONDS)
  except RuntimeError:  # they do not come
    print(f'dsv3: process {_job.index}: {error}', file=sys.stderr, flush=True)
    os._exit(2)
  _leave()


def _join(found: tuple[str, int, int] | None) -> _Job:
  """Waits for all processes; before any device is looked for."""
  import jax
  from jax._src import distributed  # its client has no public name

  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It would take SIGTERM, which `supervise.StopSignal` answers.
  jax.config.update('jax_enable_preemption_service', False)
  how = {}
  if found:
    names = ('coordinator_address', 'num_processes', 'process_id')
    how = dict(zip(names, found, strict=True))
    how['cluster_detection_method'] = 'deactivate'
  try:
    jax.distributed.initialize(
      **how,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except ValueError as error:
    raise errors.InputError(
      f'--cluster: JAX knows no cluster here ({error}): set '
      f'{", ".join(ENVIRONMENT)} instead'
    ) from error
  state = distributed.global_state
  return _Job(state.client, state.process_id, state.num_processes)


def _leave() -> None:
  import jax

  jax.distributed.shutdown()


def gather(name: str, value: Any) -> list[Any]:
  """What each process says, by index; [] in all but the first.

  Args:
    value: for JSON. name: says what is gathered; processes that come to other
      names wait for each other for ever.
  """
  if _job is None:
    return [value]
  key = _job.key(f'{name}/each')
  if _job.index:
    _job.client.key_value_set(f'{key}/{_job.index}', json.dumps(value))
    return []
  values = [value]
  for other in range(1, _job.count):
    text = _job.client.blocking_key_value_get(f'{key}/{other}', _EVER_MS)
    values.append(json.loads(text))
    _job.client.key_value_delete(f'{key}/{other}')
  for read in _job.told:  # by all: they have come further since
    _job.client.key_value_delete(read)
  _job.told.clear()
  return values


def broadcast(name: str, value: Any) -> Any:
  """The first process's value, in all of them."""
  if _job is None:
    return value
  key = _job.key(name)
  if _job.index == 0:
    _job.client.key_value_set(key, json.dumps(value))
    _job.told.append(key)
    return value
  return json.loads(_job.client.blocking_key_value_get(key, _EVER_MS))


def first_reported(name: str, value: Any) -> Any:
  """The value of the first process that has one that is not None, in all."""
  found = (v for v in gather(name, value) if v is not None)
  return broadcast(name, next(found, None))


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  broadcast(name, gather(name, None) and None)


def compile_then_barrier(function: Any) -> Callable:
  """A jitted function that none begins to run before all have compiled it.

  Compiling may take one process longer than another, which has it in a cache,
  but at the first exchange of a group Gloo waits 30 seconds for its members.
  """
  if _job is None:
    return function
  import jax

  ready = set()

  def call(*args):
    leaves, form = jax.tree.flatten(args)
    shapes = (form, *((x.shape, x.dtype) for x in leaves))
    if shapes not in ready:
      function.lower(*args).compile()
      barrier('compiled')
      ready.add(shapes)
    return function(*args)

  return call


@contextlib.contextmanager
def propagate_errors(name: str) -> Iterator[None]:
  """What fails in one process fails in all; ends when all are through.

  Nothing inside may itself talk to the others.

  Raises:
    InputError: of this process or, with its number, of another.
    PeerError: another process failed otherwise.
  """
  mine = None
  try:
    yield
  except Exception as error:
    if _job is None:
      raise
    mine = error
  if _job is None:
    return
  said = None
  if mine is not None:
    who = f'process {_job.index}: ' if _job.index else ''
    is_input = isinstance(mine, errors.InputError)
    what = str(mine) if is_input else f'{type(mine).__name__}: {mine}'
    said = [is_input, who + what]
  failed = first_reported(name, said)
  if failed is None:
    return
  if mine is not None and not isinstance(mine, errors.InputError):
    raise mine
  is_input, what = failed
  raise (errors.InputError if is_input else PeerError)(what) from mine


def any_process(question: Callable[[], bool], mesh: Any) -> Callable[[], bool]:
  """Begins to ask whether it is so in any process; call it for the answer.

  The same in all processes, as it comes from their devices: put before a step,
  the answer is there when the step before is done.
  """
  if _job is None:
    return question
  import jax
  import numpy as np

  here = np.array([question()])
  each = jax.sharding.PartitionSpec(mesh.axis_names)
  cut = jax.sharding.NamedSharding(mesh, each)
  votes = jax.make_array_from_callback((mesh.size,), cut, lambda at: here)
  answer = _any_jit()(votes)
  return lambda: bool(answer)


@functools.cache
def _any_jit() -> Callable:
  import jax
  import jax.numpy as jnp

  return compile_then_barrier(jax.jit(jnp.any))
