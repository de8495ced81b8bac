"""A job of several processes: joining it, agreeing within it, ending it.

All processes run the same program on the same values, and no process decides
anything alone. They communicate through the key-value store of JAX's
coordinator, which runs in the first process. This needs no device, so a thread
beside training may use it. A process that is alone sends nothing.

The environment says that a process is one of several:

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
# Missing heartbeats reveal a dead process, its own watchdog a stuck one. So no
# timeout has to bound the work itself.
_HEARTBEAT_SECONDS = 60
_SHUTDOWN_SECONDS = 30
_FAILURE_BARRIER_SECONDS = 10
_EVER_MS = 7 * 24 * 3600 * 1000


class PeerError(RuntimeError):
  """Another process of the job failed; the message has its index and error."""


@dataclasses.dataclass
class _Job:
  """The job that this process is part of.

  client: of the key-value store. num_calls: exchanges so far, by name.
  broadcast_keys: keys that the first process has yet to delete.
  """

  client: Any
  index: int
  count: int
  num_calls: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  broadcast_keys: list[str] = dataclasses.field(default_factory=list)

  def key(self, name: str) -> str:
    """A new key at each call, the same in all processes."""
    self.num_calls[name] += 1
    return f'dsv3/{name}/{self.num_calls[name]}'


_job: _Job | None = None


def index() -> int:
  """Index of this process; only process 0 writes and prints."""
  return _job.index if _job else 0


def count() -> int:
  """Number of processes in the job."""
  return _job.count if _job else 1


def from_environment(
  environment: Mapping[str, str],
) -> tuple[str, int, int] | None:
  """Address, count and index from the environment; None if none is set.

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
def join_job(cluster: bool = False) -> Iterator[None]:
  """Joins this process to its job, if it is one of several.

  Only the first process prints to stdout. If all processes raise an InputError,
  they leave the job in order. If this process alone raises one, or any other
  exception, it exits at once, so that processes that wait for it notice.

  Raises:
    InputError: the environment is wrong, or `cluster` and there is none.
  """
  global _job
  address = from_environment(os.environ)
  if cluster and address:
    raise errors.InputError(
      f'--cluster and {_ADDRESS}={address[0]}: only one may describe the job'
    )
  if not cluster and (address is None or address[1] == 1):
    yield
    return
  _job = _join(address)
  quiet = contextlib.redirect_stdout(None if _job.index else sys.stdout)
  try:
    with quiet:
      yield
    barrier('end')  # the first process may have more to do
  except errors.InputError as error:
    _leave_after_error(error)
    raise
  except BaseException as error:  # noqa: BLE001 - others may wait for this one
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
  _leave()


def _leave_after_error(error: errors.InputError) -> None:
  """Leaves the job if all processes raised an error; else exits at once."""
  try:
    _job.client.wait_at_barrier('dsv3/failed', 1000 * _FAILURE_BARRIER_SECONDS)
  except RuntimeError:  # the others did not fail
    print(f'dsv3: process {_job.index}: {error}', file=sys.stderr, flush=True)
    os._exit(errors.EXIT_BAD_INPUT)
  _leave()


def _join(address: tuple[str, int, int] | None) -> _Job:
  """Waits for all processes; called before JAX initialises any device."""
  import jax
  from jax._src import distributed  # its client has no public name

  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # JAX's service would take SIGTERM, which `watchdog.StopSignal` handles.
  jax.config.update('jax_enable_preemption_service', False)
  options = {}
  if address:
    names = ('coordinator_address', 'num_processes', 'process_id')
    options = dict(zip(names, address, strict=True))
    options['cluster_detection_method'] = 'deactivate'
  try:
    jax.distributed.initialize(
      **options,
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
  """Values of all processes, by index, in the first; [] in the others.

  Args:
    name: of this exchange. All processes must pass the same names in the same
      order, or they wait for each other for ever.
    value: anything that JSON can hold.
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
  # Every process has sent its value, so it has read all earlier broadcasts.
  for key in _job.broadcast_keys:
    _job.client.key_value_delete(key)
  _job.broadcast_keys.clear()
  return values


def broadcast(name: str, value: Any) -> Any:
  """The first process's value, in all of them."""
  if _job is None:
    return value
  key = _job.key(name)
  if _job.index == 0:
    _job.client.key_value_set(key, json.dumps(value))
    _job.broadcast_keys.append(key)
    return value
  return json.loads(_job.client.blocking_key_value_get(key, _EVER_MS))


def first_reported(name: str, value: Any) -> Any:
  """The first value that is not None, by process index; the same in all."""
  reported = (v for v in gather(name, value) if v is not None)
  return broadcast(name, next(reported, None))


def barrier(name: str) -> None:
  """Waits until all processes have called it."""
  broadcast(name, gather(name, None) and None)


def compile_then_barrier(function: Any) -> Callable:
  """A jitted function that no process runs before all have compiled it.

  A process with a warm compilation cache is much faster than one without, but
  Gloo waits only 30 seconds for all members of a group at its first collective.
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
  """Raises the error of one process in all; waits for all at the end.

  The body must not communicate with other processes.

  Raises:
    InputError: of this process, or of another, whose index it names.
    PeerError: another process failed with any other exception.
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
  report = None
  if mine is not None:
    who = f'process {_job.index}: ' if _job.index else ''
    is_input = isinstance(mine, errors.InputError)
    what = str(mine) if is_input else f'{type(mine).__name__}: {mine}'
    report = [is_input, who + what]
  failed = first_reported(name, report)
  if failed is None:
    return
  if mine is not None and not isinstance(mine, errors.InputError):
    raise mine
  is_input, what = failed
  raise (errors.InputError if is_input else PeerError)(what) from mine


def any_process(question: Callable[[], bool], mesh: Any) -> Callable[[], bool]:
  """Starts an any-reduction of `question()`; call the result for the answer.

  The devices reduce it, so all processes get the same answer. If it is started
  before a step, the answer is ready when the step before that is done.
  """
  if _job is None:
    return question
  import jax
  import numpy as np

  here = np.array([question()])
  spec = jax.sharding.PartitionSpec(mesh.axis_names)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  votes = jax.make_array_from_callback((mesh.size,), sharding, lambda at: here)
  answer = _any_jit()(votes)
  return lambda: bool(answer)


@functools.cache
def _any_jit() -> Callable:
  import jax
  import jax.numpy as jnp

  return compile_then_barrier(jax.jit(jnp.any))
